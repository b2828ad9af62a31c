// What is in a panel of a grouped format: blocks of groups of 32 inputs, as GGUF has them, regrouped so that
// a vector holds four inputs of each of 16 columns.
//
// A group's values are rows of 64 bytes, [16 columns][4 inputs]:
//   8 bits  [8] rows of int8
//   4 bits  [4] rows: row r has the inputs 4 r + j in its low halves, the inputs 16 + 4 r + j in the high ones
//   5 bits  the same, then a row whose bit s is the highest one of the inputs 4 s + j
//   6 bits  the same as 4 bits, then two rows: bits 2 s and 2 s + 1 of the first are the highest two of the
//           inputs 4 s + j, those of the second of the inputs 16 + 4 s + j
//
// Parameters, of 16 columns each, and what a weight of value q is:
//   kQ8_0, kQ4_0, kQ5_0, kIQ4_NL  scales fp16 [2];                         scale * q
//   kQ4_1, kQ5_1                  scales fp16 [2], minima fp16 [2];        scale * q + minimum
//   kMXFP4                        exponents [4];                           2^(exponent - 128) * q
//   kQ4_K, kQ5_K                  d fp16, e fp16, s [8], m [8];            d s q - e m
//   kQ6_K                         d fp32, s int8 [16], of half groups;     d s q
//   kIQ4_XS                       d fp32, s int8 [8];                      d s q
// Scales lie between the values because a row at a time reads a panel as one stream: with the scales behind
// it, two streams, it took 1.4 times as long.
#pragma once

#include "simd.h"

namespace precast {
namespace {

constexpr int kStepBytes = kPanel * 4;  // four inputs of a panel's columns

// kIQ4_NL's and kIQ4_XS's values, and twice kMXFP4's.
constexpr int8_t kCurve[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFloat4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

constexpr bool has_curve(Format f) { return f == Format::kIQ4_NL || f == Format::kIQ4_XS; }

// A value as its bits have it.
template <Format F>
inline int bits_of(const uint8_t* group, int64_t column, int64_t input) {
  const int64_t at = column * 4 + input % 4, step = input / 4;
  if constexpr (block_of(F).bits == 8) return static_cast<int8_t>(group[step * kStepBytes + at]);
  const int low = group[step % 4 * kStepBytes + at] >> (step < 4 ? 0 : 4) & 15;
  const uint8_t* high = group + 4 * kStepBytes + at;
  if constexpr (block_of(F).bits == 5) return low | (*high >> step & 1) << 4;
  if constexpr (block_of(F).bits == 6) {
    return low | (high[step / 4 * kStepBytes] >> (step % 4 * 2) & 3) << 4;
  }
  return low;
}

// The value that it stands for.
template <Format F>
inline int value_of(const uint8_t* group, int64_t column, int64_t input) {
  const int bits = bits_of<F>(group, column, input);
  if constexpr (has_curve(F)) return kCurve[bits];
  if constexpr (F == Format::kMXFP4) return kFloat4[bits];
  if constexpr (F == Format::kQ4_0) return bits - 8;
  if constexpr (F == Format::kQ5_0) return bits - 16;
  if constexpr (F == Format::kQ6_K) return bits - 32;
  return bits;
}

// Of the columns of a vector.
struct GroupParameters {
  vfloat scales, minima;
};

// 2^(exponent - 128). For the two least, which is no normal number, the second of these is larger.
inline vfloat half_power(vint exponents) {
  const vint normal = (exponents - 1) << 23, small = (exponents + 1) << 21;
  return as_float(normal > small ? normal : small);
}

// d, where it is fp32.
inline vfloat block_scales(const uint8_t* parameters, int v) {
  return load(reinterpret_cast<const float*>(parameters) + v * kLanes);
}

// Of has_halves, whole numbers.
inline vint half_scales(const uint8_t* parameters, int64_t group, int half, int v) {
  const uint8_t* s = parameters + 4 * kPanel + (2 * group + half) * kPanel + v * kLanes;
  return widen(reinterpret_cast<const int8_t*>(s));
}

// `parameters`: of a block; `group`: its number in the block; `half`: of has_halves, whose scales have to be
// multiplied by block_scales.
template <Format F>
inline GroupParameters group_parameters(const uint8_t* parameters, int64_t group, int half, int v) {
  const int64_t at = v * kLanes, own = group * kPanel + at;
  const auto* halves = reinterpret_cast<const Float16*>(parameters);
  if constexpr (F == Format::kMXFP4) return {half_power(widen(parameters + own)), vfloat{}};
  if constexpr (F == Format::kQ4_K || F == Format::kQ5_K) {
    const uint8_t* bytes = parameters + 4 * kPanel + own;
    const vfloat e = -load(halves + kPanel + at);
    return {load(halves + at) * to_float(widen(bytes)),
            e * to_float(widen(bytes + block_of(F).groups * kPanel))};
  }
  if constexpr (has_halves(F)) return {to_float(half_scales(parameters, group, half, v)), vfloat{}};
  if constexpr (F == Format::kIQ4_XS) {
    const auto* s = reinterpret_cast<const int8_t*>(parameters + 4 * kPanel);
    return {block_scales(parameters, v) * load(s + own), vfloat{}};
  }
  GroupParameters found{load(halves + own), vfloat{}};
  if constexpr (F == Format::kQ4_1 || F == Format::kQ5_1) found.minima = load(halves + 2 * kPanel + own);
  return found;
}

}  // namespace
}  // namespace precast
