// AMX: registers that are small matrices. GCC's intrinsics take a register's number from the source text and
// don't say that they read memory; these do, and take it as a template argument.
#pragma once

#if defined(__AMX_INT8__)

#include <cstdint>

namespace precast {
namespace {

constexpr int kTileRegisters = 8;

// What the registers hold: rows, and bytes of each.
struct alignas(64) TileShapes {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int count, int bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// While it lives, its thread's registers have these shapes. Without, they are not saved where the kernel
// switches threads.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

// What was written before is there for loads that follow: they don't say what they read, so that what the
// compiler knows to be in registers stays there.
inline void written() { asm volatile("" : : : "memory"); }

// Rows `stride` bytes apart.
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T));
}

// Rows one behind the other, into the whole of an array.
template <int T, typename V, int N>
inline void tile_store(V (&to)[N]) {
  const int64_t stride = 64;
  asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(to) : "r"(to), "r"(stride), "i"(T));
}

// Rows `stride` bytes apart.
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}

// T += A B, of signed bytes: four of A's neighbours with four of B's.
template <int T, int A, int B>
inline void tile_dots() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(T), "i"(A), "i"(B));
}

// T += A B, of pairs of bf16.
template <int T, int A, int B>
inline void tile_dots_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(T), "i"(A), "i"(B));
}

}  // namespace
}  // namespace precast

#endif
