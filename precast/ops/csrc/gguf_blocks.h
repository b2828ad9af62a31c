// Blocks of weights as GGUF files have them: their values as bits, and their scales.
//
// Written from the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml's block structs.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace precast {

// GGUF's numbers of types.
enum class GgufType : int64_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10, kQ3_K = 11, kQ4_K = 12,
  kQ5_K = 13, kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kBF16 = 30, kMXFP4 = 39
};

struct GgufLayout {
  Format format;  // that holds it; kQ2_K is rounded to it, all others keep their values
  int64_t inputs = 0, bytes = 0;  // of a block
};

constexpr GgufLayout layout_of(GgufType type) {
  switch (type) {
    case GgufType::kF32: return {Format::kFloat32, 1, 4};
    case GgufType::kF16: return {Format::kFloat16, 1, 2};
    case GgufType::kBF16: return {Format::kBFloat16, 1, 2};
    case GgufType::kQ4_0: return {Format::kQ4_0, 32, 18};
    case GgufType::kQ4_1: return {Format::kQ4_1, 32, 20};
    case GgufType::kQ5_0: return {Format::kQ5_0, 32, 22};
    case GgufType::kQ5_1: return {Format::kQ5_1, 32, 24};
    case GgufType::kQ8_0: return {Format::kQ8_0, 32, 34};
    case GgufType::kIQ4_NL: return {Format::kIQ4_NL, 32, 18};
    case GgufType::kMXFP4: return {Format::kMXFP4, 32, 17};
    case GgufType::kQ2_K: return {Format::kQ8_0, 256, 84};
    case GgufType::kQ3_K: return {Format::kQ6_K, 256, 110};
    case GgufType::kQ4_K: return {Format::kQ4_K, 256, 144};
    case GgufType::kQ5_K: return {Format::kQ5_K, 256, 176};
    case GgufType::kQ6_K: return {Format::kQ6_K, 256, 210};
    case GgufType::kIQ4_XS: return {Format::kIQ4_XS, 256, 136};
  }
  return {};
}

// A block, or as much of it as it has.
struct GgufBlock {
  uint16_t d = 0, e = 0;      // fp16: of scales and of minima
  uint8_t scales[16] = {};    // of groups, or of half groups; int8 in some
  uint8_t minima[8] = {};
  uint8_t bits[256] = {};     // of values
};

namespace gguf {

inline uint16_t half_at(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

// 16 bytes with the low halves of 16 values and the high halves of the next 16.
inline void take_halves(const uint8_t* p, uint8_t* bits) {
  for (int i = 0; i < 16; ++i) {
    bits[i] = p[i] & 15;
    bits[16 + i] = p[i] >> 4;
  }
}

// The fifth bits of 32 values.
inline void take_fifths(const uint8_t* p, uint8_t* bits) {
  uint32_t high;
  std::memcpy(&high, p, 4);
  for (int i = 0; i < 32; ++i) bits[i] |= (high >> i & 1) << 4;
}

// Eight scales and eight minima of 6 bits in 12 bytes.
inline void take_scales(const uint8_t* p, GgufBlock& block) {
  for (int i = 0; i < 4; ++i) {
    block.scales[i] = p[i] & 63;
    block.minima[i] = p[i + 4] & 63;
    block.scales[i + 4] = (p[i + 8] & 15) | (p[i] >> 6) << 4;
    block.minima[i + 4] = p[i + 8] >> 4 | (p[i + 4] >> 6) << 4;
  }
}

// Of kQ4_K and kQ5_K: 64 values of 32 bytes, the low halves first.
inline void take_long_halves(const uint8_t* p, uint8_t* bits) {
  for (int i = 0; i < 128; ++i) {
    bits[i / 32 * 64 + i % 32] = p[i] & 15;
    bits[i / 32 * 64 + 32 + i % 32] = p[i] >> 4;
  }
}

inline void take_q6(const uint8_t* p, GgufBlock& block) {
  for (int n = 0; n < 2; ++n) {
    const uint8_t *low = p + n * 64, *high = p + 128 + n * 32;
    for (int i = 0; i < 128; ++i) {
      const int half = low[i % 64] >> (i < 64 ? 0 : 4) & 15;
      block.bits[n * 128 + i] = half | (high[i % 32] >> i / 32 * 2 & 3) << 4;
    }
  }
  std::memcpy(block.scales, p + 192, 16);
  block.d = half_at(p + 208);
}

// Of 3 bits, -4 to 3, as kQ6_K has them: 32 too much; its scales likewise.
inline void take_q3(const uint8_t* p, GgufBlock& block) {
  const uint8_t *low = p + 32, *scales = p + 96;
  for (int i = 0; i < 256; ++i) {
    const int two = low[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, high = p[i % 32] >> i / 32 & 1;
    block.bits[i] = static_cast<uint8_t>(two + 4 * high - 4 + 32);
  }
  for (int i = 0; i < 16; ++i) {
    const int four = scales[i % 8] >> (i < 8 ? 0 : 4) & 15, two = scales[8 + i % 4] >> i / 4 * 2 & 3;
    block.scales[i] = static_cast<uint8_t>((four | two << 4) - 32);
  }
  block.d = half_at(p + 108);
}

// Of 2 bits; a half group's scale and minimum have 4 each.
inline void take_q2(const uint8_t* p, GgufBlock& block) {
  for (int i = 0; i < 256; ++i) block.bits[i] = p[16 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
  std::memcpy(block.scales, p, 16);
  block.d = half_at(p + 80);
  block.e = half_at(p + 82);
}

inline void take_iq4_xs(const uint8_t* p, GgufBlock& block) {
  const int high = half_at(p + 2);
  for (int g = 0; g < 8; ++g) {
    const int low = p[4 + g / 2] >> g % 2 * 4 & 15;
    block.scales[g] = static_cast<uint8_t>((low | (high >> 2 * g & 3) << 4) - 32);
    take_halves(p + 8 + 16 * g, block.bits + 32 * g);
  }
  block.d = half_at(p);
}

}  // namespace gguf

inline void read_block(GgufType type, const uint8_t* p, GgufBlock& block) {
  using namespace gguf;
  block.d = half_at(p);
  switch (type) {
    case GgufType::kQ4_0:
    case GgufType::kIQ4_NL: return take_halves(p + 2, block.bits);
    case GgufType::kQ4_1: block.e = half_at(p + 2); return take_halves(p + 4, block.bits);
    case GgufType::kQ5_0: take_halves(p + 6, block.bits); return take_fifths(p + 2, block.bits);
    case GgufType::kQ5_1:
      block.e = half_at(p + 2);
      take_halves(p + 8, block.bits);
      return take_fifths(p + 4, block.bits);
    case GgufType::kQ8_0: std::memcpy(block.bits, p + 2, 32); return;
    case GgufType::kMXFP4:
      block.d = 0;
      block.scales[0] = p[0];
      return take_halves(p + 1, block.bits);
    case GgufType::kQ4_K:
    case GgufType::kQ5_K: {
      const bool five = type == GgufType::kQ5_K;
      block.e = half_at(p + 2);
      take_scales(p + 4, block);
      take_long_halves(p + (five ? 48 : 16), block.bits);
      for (int i = 0; i < 256 && five; ++i) block.bits[i] |= (p[16 + i % 32] >> i / 32 & 1) << 4;
      return;
    }
    case GgufType::kQ6_K: return take_q6(p, block);
    case GgufType::kQ3_K: return take_q3(p, block);
    case GgufType::kQ2_K: return take_q2(p, block);
    case GgufType::kIQ4_XS: return take_iq4_xs(p, block);
    default: return;
  }
}

}  // namespace precast
