// Linears with float32, bfloat16 or float16 weights.
#pragma once

#include <type_traits>

#include "simd.h"

namespace precast {
namespace {

// A sum times its scale, if there are scales, plus its bias, if there is one.
inline vfloat finished(vfloat sum, const float* scales, const float* bias) {
  const vfloat added = bias == nullptr ? vfloat{} : load(bias);
  return scales == nullptr ? sum + added : multiply_add(sum, load(scales), added);
}

inline const float* from(const float* values, int64_t at) {
  return values == nullptr ? nullptr : values + at;
}

// A panel's sums, finished.
inline void write_row(const LinearArgs& a, int64_t row, int64_t column, const vfloat* sums,
                      const float* scales = nullptr) {
  float* y = a.y + row * a.y_stride + column;
  if (column + kPanel <= a.n) {
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      store(y + at, finished(sums[v], from(scales, at), from(a.bias, column + at)));
    }
    return;
  }
  float padded[kPanel], bias[kPanel] = {};
  for (int64_t c = 0; c < a.n - column && a.bias != nullptr; ++c) bias[c] = a.bias[column + c];
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * kLanes;
    store(padded + at, finished(sums[v], from(scales, at), bias + at));
  }
  for (int64_t c = 0; c < a.n - column; ++c) y[c] = padded[c];
}

// Rows of a tile, at the most, and panels of one with few rows and of one with many: enough sums to hide
// the latency of the multiply-add, where a tile of one row and one panel would wait for it.
constexpr int kFloatRows = 6, kFewRows = 2;
constexpr int kPanelsOfFew = kVectors == 1 ? 4 : 2, kPanelsOfMany = kVectors == 1 ? 2 : 1;

// MR rows of x against NP neighbouring panels. Each output is one sum over K in order: a row has the same
// bits in every tile.
template <typename W, int MR, int NP>
inline void float_tile(const LinearArgs& a, int64_t row, int64_t panel) {
  const int64_t stride = panel_bytes(a.format, a.k) / sizeof(W);
  const W* weight = reinterpret_cast<const W*>(a.weight) + panel * stride;
  const float* x = a.x + row * a.x_stride;
  vfloat sums[MR][NP][kVectors];
  clear(sums);
  for (int64_t i = 0; i < a.k; ++i) {
    vfloat w[NP][kVectors];
    for (int p = 0; p < NP; ++p) {
      if constexpr (MR <= kFewRows) {
        Prefetch(reinterpret_cast<const char*>(weight + p * stride + i * kPanel) + kPageBytes, 1).ask(1);
      }
      for (int v = 0; v < kVectors; ++v) {
        w[p][v] = load(weight + p * stride + i * kPanel + v * kLanes);
      }
    }
    for (int r = 0; r < MR; ++r) {
      const vfloat input = splat(x[r * a.x_stride + i]);
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          sums[r][p][v] = multiply_add(w[p][v], input, sums[r][p][v]);
        }
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) write_row(a, row + r, (panel + p) * kPanel, sums[r][p]);
  }
}

template <typename W, int NP>
inline void float_panels(const LinearArgs& a, int64_t panel) {
  int64_t row = 0;
  const auto tiles = [&](auto mr) {
    for (; row + mr <= a.m; row += mr) float_tile<W, mr, NP>(a, row, panel);
  };
  if constexpr (NP != kPanelsOfFew) {
    tiles(std::integral_constant<int, kFloatRows>{});
    tiles(std::integral_constant<int, 5>{});
    tiles(std::integral_constant<int, 4>{});
    tiles(std::integral_constant<int, 3>{});
  }
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

template <typename W>
void linear_float(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t panel = begin;
  const auto panels = [&](auto np) {
    for (; panel + np <= end; panel += np) float_panels<W, np>(a, panel);
  };
  if (a.m <= kFewRows) {
    panels(std::integral_constant<int, kPanelsOfFew>{});
  } else {
    panels(std::integral_constant<int, kPanelsOfMany>{});
  }
  panels(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace precast
