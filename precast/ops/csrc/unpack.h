// Single rows of packed weights, as an embedding needs them.
#pragma once

#include "simd.h"

namespace precast {
namespace {

constexpr int kStepBytes = kPanel * 4;  // four inputs of a panel's columns

template <typename W>
inline void unpack_float_row(const uint8_t* panel, int64_t k, int64_t column, float* y) {
  const W* values = reinterpret_cast<const W*>(panel) + column;
  for (int64_t i = 0; i < k; ++i) y[i] = to_float(values[i * kPanel]);
}

template <Format F>
inline void unpack_grouped_row(const uint8_t* panel, int64_t k, int64_t column, float* y) {
  for (int64_t i = 0; i < k; ++i) {
    const uint8_t* block = panel + i / (2 * kGroup) * block_bytes(F);
    const int64_t group = i / kGroup % 2, at = i % kGroup;
    const uint8_t* values = block + group * group_bytes(F) + column * 4 + at % 4;
    const Float16* scales = reinterpret_cast<const Float16*>(block + 2 * group_bytes(F)) + column;
    const float scale = to_float(scales[group * kPanel]);
    if constexpr (F == Format::kQ8_0) {
      y[i] = scale * static_cast<int8_t>(values[at / 4 * kStepBytes]);
    } else {
      const uint8_t both = values[at / 4 % 4 * kStepBytes];
      const int q = at < kGroup / 2 ? both & 15 : both >> 4;
      y[i] = F == Format::kQ4_0 ? scale * (q - 8)
                                : scale * q + to_float(scales[(2 + group) * kPanel]);
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
  }
}

}  // namespace
}  // namespace precast
