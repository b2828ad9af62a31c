// Single rows of packed weights, as an embedding needs them.
#pragma once

#include "blocks.h"

namespace precast {
namespace {

template <typename W>
inline void unpack_float_row(const uint8_t* panel, int64_t k, int64_t column, float* y) {
  const W* values = reinterpret_cast<const W*>(panel) + column;
  for (int64_t i = 0; i < k; ++i) y[i] = to_float(values[i * kPanel]);
}

template <Format F>
inline void unpack_grouped_row(const uint8_t* panel, int64_t k, int64_t column, float* y) {
  constexpr int64_t kSize = kGroup / 2, kGroups = block_of(F).groups;
  const int v = static_cast<int>(column / kLanes), lane = static_cast<int>(column % kLanes);
  for (int64_t i = 0; i < k; i += kSize) {
    const uint8_t* block = panel + i / (kGroups * kGroup) * block_bytes(F);
    const int64_t group = i / kGroup % kGroups, first = i % kGroup;
    const auto own =
        group_parameters<F>(block + parameters_at(F), group, static_cast<int>(first / kSize), v);
    const vfloat scales = has_halves(F) ? block_scales(block + parameters_at(F), v) * own.scales : own.scales;
    const float scale = scales[lane], minimum = own.minima[lane];
    const uint8_t* values = block + values_at(F) + group * group_bytes(F);
    for (int64_t j = 0; j < kSize && i + j < k; ++j) {
      y[i + j] = scale * value_of<F>(values, column, first + j) + minimum;
    }
  }
}

void unpack_row(Format format, const uint8_t* weight, int64_t k, int64_t row, float* y) {
  const uint8_t* panel = weight + row / kPanel * panel_bytes(format, k);
  const int64_t column = row % kPanel;
  switch (format) {
    case Format::kFloat32: return unpack_float_row<float>(panel, k, column, y);
    case Format::kBFloat16: return unpack_float_row<BFloat16>(panel, k, column, y);
    case Format::kFloat16: return unpack_float_row<Float16>(panel, k, column, y);
    case Format::kInt8: {
      const float scale =
          reinterpret_cast<const float*>(panel + padded_k(format, k) * kPanel)[column];
      for (int64_t i = 0; i < k; ++i) {
        y[i] = scale * static_cast<int8_t>(panel[i / 4 * kStepBytes + column * 4 + i % 4]);
      }
      return;
    }
    case Format::kQ8_0: return unpack_grouped_row<Format::kQ8_0>(panel, k, column, y);
    case Format::kQ4_0: return unpack_grouped_row<Format::kQ4_0>(panel, k, column, y);
    case Format::kQ4_1: return unpack_grouped_row<Format::kQ4_1>(panel, k, column, y);
    case Format::kQ4_K: return unpack_grouped_row<Format::kQ4_K>(panel, k, column, y);
    case Format::kQ5_K: return unpack_grouped_row<Format::kQ5_K>(panel, k, column, y);
    case Format::kQ6_K: return unpack_grouped_row<Format::kQ6_K>(panel, k, column, y);
    case Format::kQ5_0: return unpack_grouped_row<Format::kQ5_0>(panel, k, column, y);
    case Format::kQ5_1: return unpack_grouped_row<Format::kQ5_1>(panel, k, column, y);
    case Format::kIQ4_NL: return unpack_grouped_row<Format::kIQ4_NL>(panel, k, column, y);
    case Format::kIQ4_XS: return unpack_grouped_row<Format::kIQ4_XS>(panel, k, column, y);
    case Format::kMXFP4: return unpack_grouped_row<Format::kMXFP4>(panel, k, column, y);
    case Format::kMixed: return;  // its parts have formats of their own
  }
}

}  // namespace
}  // namespace precast
