// Kernels that are compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace precast {

// Of functions that units of several instruction sets share. A copy of its own would be the one that the linker
// takes, whichever set that is for; and calls of block_of for each group took a seventh of a linear of 8 rows.
#define PRECAST_INLINE [[gnu::always_inline]] inline

// Output columns in a packed panel.
constexpr int kPanel = 16;
// Inputs that share a scale in the grouped formats, as in GGUF's Q4_0, Q4_1 and Q8_0.
constexpr int kGroup = 32;

// Formats of a linear's weights, as `precast.linear` takes them (precast/ops/packing.py). A weight
// [N, K] is packed into ceil(N / 16) panels of panel_bytes() each:
//   floats  [K][16]
//   kInt8   [K/4][16][4] int8, then scales float32 [16]
//   grouped blocks of groups of 32 inputs, with the groups' parameters: see blocks.h
//   kMixed  no panels: parts of formats of their own, one below the other: see mixed.h
// Panels begin on cache lines; rows past N and inputs past K are zero.
enum class Format : int64_t {
  kFloat32, kBFloat16, kFloat16, kInt8, kQ8_0, kQ4_0, kQ4_1,
  kQ4_K, kQ5_K, kQ6_K, kQ5_0, kQ5_1, kIQ4_NL, kIQ4_XS, kMXFP4, kMixed
};
constexpr int64_t kFormats = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A group's values have 4, 5, 6 or 8 bits.
struct Block {
  int groups = 0;      // of 32 inputs; 0: a format without groups
  int bits = 0;        // of a value
  int parameters = 0;  // bytes of all groups' scales and minima
};

PRECAST_INLINE constexpr Block block_of(Format f) {
  switch (f) {
    case Format::kQ8_0: return {2, 8, 64};
    case Format::kQ4_0: return {2, 4, 64};
    case Format::kQ4_1: return {2, 4, 128};
    case Format::kQ5_0: return {2, 5, 64};
    case Format::kQ5_1: return {2, 5, 128};
    case Format::kIQ4_NL: return {2, 4, 64};
    case Format::kMXFP4: return {4, 4, 64};
    case Format::kQ4_K: return {8, 4, 320};
    case Format::kQ5_K: return {8, 5, 320};
    case Format::kQ6_K: return {8, 6, 320};
    case Format::kIQ4_XS: return {8, 4, 192};
    default: return {};
  }
}

PRECAST_INLINE constexpr bool is_grouped(Format f) { return block_of(f).groups > 0; }
PRECAST_INLINE constexpr bool is_quantized(Format f) { return f == Format::kInt8 || is_grouped(f); }
// Whether each half of a group, 16 inputs, has a scale of its own.
PRECAST_INLINE constexpr bool has_halves(Format f) { return f == Format::kQ6_K; }

PRECAST_INLINE int64_t padded_k(Format f, int64_t k) {
  const int64_t unit = is_grouped(f) ? block_of(f).groups * kGroup : f == Format::kInt8 ? 4 : 1;
  return (k + unit - 1) / unit * unit;
}

// Groups of a row's inputs, each with its scale; kInt8's last one may be short. One scale for a whole row
// would do for kInt8's weights, but a few large activations leave the others of their row few steps:
// SmolLM2-135M's perplexity rose by 3.9 %, by 1.3 % with groups of 64, and by 0.9 % with these.
PRECAST_INLINE int64_t input_groups(Format f, int64_t k) { return (padded_k(f, k) + kGroup - 1) / kGroup; }

// Bytes of one group's values, and of a block with its parameters. Large blocks have these in front, which
// a row at a time reads as one stream; small ones behind.
PRECAST_INLINE constexpr int64_t group_bytes(Format f) { return kGroup * kPanel * block_of(f).bits / 8; }
PRECAST_INLINE constexpr int64_t block_bytes(Format f) {
  return block_of(f).groups * group_bytes(f) + block_of(f).parameters;
}
PRECAST_INLINE constexpr int64_t values_at(Format f) { return block_of(f).groups > 2 ? block_of(f).parameters : 0; }
PRECAST_INLINE constexpr int64_t parameters_at(Format f) {
  return block_of(f).groups > 2 ? 0 : block_of(f).groups * group_bytes(f);
}

PRECAST_INLINE int64_t panel_bytes(Format f, int64_t k) {
  if (is_grouped(f)) return padded_k(f, k) / (block_of(f).groups * kGroup) * block_bytes(f);
  const int64_t values = padded_k(f, k) * kPanel;
  if (f == Format::kInt8) return (values + kPanel * 4 + 63) / 64 * 64;
  return (values * (f == Format::kFloat32 ? 4 : 2) + 63) / 64 * 64;
}

// Inputs that were quantised for a linear (quantize_inputs). Rows lie in blocks of kRowBlock, within a
// block by group and then by row, so that a tile of rows finds its inputs at constant distances. An
// entry is a group of a row: see input_at.
struct QuantizedInputs {
  int8_t* values;   // [entries, kGroup]; zeros past K
  int16_t* wide;    // null, or the same in 16 bits, of each group first those at even places
  float* scales;    // [entries]; value = scale * q
  int32_t* starts;  // what sums of integer products begin at, to make up for the weights' offset
  float* sums;      // scale * sum of q
  int32_t* halves;  // null, or half_sums of a group's first 16 and, `entries` further, of its last 16
  int64_t entries;  // of has_halves, a group's second half has its start so much further in starts
};

constexpr int64_t kRowBlock = 16;

// Inputs as sums of two bf16 each, rounded and what is left: as linears take them where Kernels::takes_halves.
// Entries as above, and zeros past K.
struct alignas(64) HalfInputs {
  uint16_t values[kGroup];
};
struct SplitInputs {
  HalfInputs *rounded, *left;  // [entries], and kRowBlock of any values behind them
};

inline int64_t rows_of_block(int64_t m, int64_t first) {
  return m - first < kRowBlock ? m - first : kRowBlock;
}
// The entry of a row's group; the next group's is rows_of_block(m, its block's first row) further.
inline int64_t input_at(int64_t m, int64_t groups, int64_t row, int64_t group) {
  const int64_t first = row / kRowBlock * kRowBlock;
  return first * groups + group * rows_of_block(m, first) + row - first;
}

struct LinearArgs {
  Format format;
  int64_t m, n, k;
  const float* x;  // [M, K], row stride x_stride
  int64_t x_stride;
  const uint8_t* weight;
  const float* bias;  // [N] or null
  float* y;           // [M, N], row stride y_stride
  int64_t y_stride;
  int64_t groups;          // of a row of inputs: those of the format, or more
  QuantizedInputs inputs;  // for the formats that need them
  SplitInputs halves;      // likewise
};

inline int64_t input_units(const LinearArgs& a) { return ceil_div(a.m, kRowBlock) * a.groups; }

struct Kernels {
  const char* isa;
  // Panels that a tile of several rows has: threads get whole tiles.
  int tile_panels;

  // Whether so many rows' inputs are wanted in 16 bits as well.
  bool (*takes_wide)(Format format, int64_t rows);

  // Symmetric quantisation of args.x: q = round(x / scale), scale = max|x| / 127 over the group. Writes
  // units [begin, end) of args.inputs, of input_units(args): a unit is a group of a block of rows.
  void (*quantize_inputs)(const LinearArgs& args, int64_t begin, int64_t end);

  // Whether a format's inputs are wanted as sums of two bf16, which this writes as quantize_inputs does.
  bool (*takes_halves)(Format format);
  void (*split_inputs)(const LinearArgs& args, int64_t begin, int64_t end);

  // Writes the starts that a format needs, out of `halves`.
  void (*find_starts)(Format format, const QuantizedInputs& inputs);

  // y = x w^T + bias for the panels [panel_begin, panel_end).
  void (*linear)(const LinearArgs& args, int64_t panel_begin, int64_t panel_end);

  // y = row `row` of a packed weight [N, k], as floats.
  void (*unpack_row)(Format format, const uint8_t* weight, int64_t k, int64_t row, float* y);

  // out = sum over `count` arrays of n floats, added in order.
  void (*sum)(const float* const* arrays, int count, float* out, int64_t n);

  // One row of n values each.
  void (*rms_norm)(const float* x, const float* weight, float eps, float* y, int64_t n);
  void (*silu_and_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*gelu_tanh_and_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*soft_cap)(const float* x, float cap, float* y, int64_t n);  // cap tanh(x / cap)
  void (*softmax)(const float* x, float* y, int64_t n);
  // One head: pairs (i, i + half) of its first 2 * half features are rotated.
  void (*rotate)(const float* x, const float* cos, const float* sin, float* y, int64_t half,
                 int64_t dim);
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avxvnni();  // and AVX2
const Kernels& kernels_avx512();
const Kernels& kernels_amx();  // and AVX-512

// The best set that this CPU runs, or the one that PRECAST_NATIVE_ISA names (scalar, avx2, avxvnni, avx512, amx).
const Kernels& kernels();

}  // namespace precast
