// Linears with float32, bfloat16 or float16 weights.
#pragma once

#include "simd.h"

namespace precast {
namespace {

inline void write_row(const LinearArgs& a, int64_t row, int64_t column, const vfloat* acc) {
  float* y = a.y + row * a.n + column;
  const float* bias = a.bias ? a.bias + column : nullptr;
  if (column + kPanel <= a.n) {
    for (int v = 0; v < kVectors; ++v) {
      store(y + v * kLanes, bias ? acc[v] + load(bias + v * kLanes) : acc[v]);
    }
    return;
  }
  float padded[kPanel];
  for (int v = 0; v < kVectors; ++v) store(padded + v * kLanes, acc[v]);
  for (int64_t c = 0; c < a.n - column; ++c) y[c] = padded[c] + (bias ? bias[c] : 0.0f);
}

// MR rows of x against NP neighbouring panels.
template <typename W, int MR, int NP>
inline void float_tile(const LinearArgs& a, int64_t row, int64_t panel) {
  // One row has too few accumulators to hide the latency of the multiply-add, so it runs over
  // several interleaved stretches of K.
  constexpr int U = MR * NP * kVectors >= 8 ? 1 : 4;
  const int64_t stride = panel_bytes(a.format, a.k) / sizeof(W);
  const W* weight = reinterpret_cast<const W*>(a.weight) + panel * stride;
  const float* x = a.x + row * a.x_stride;
  vfloat acc[U][MR][NP][kVectors] = {};
  const auto step = [&](int64_t i, int u) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const vfloat w = load(weight + p * stride + i * kPanel + v * kLanes);
        for (int r = 0; r < MR; ++r) acc[u][r][p][v] += w * x[r * a.x_stride + i];
      }
    }
  };
  int64_t i = 0;
  for (; i + U <= a.k; i += U) {
    for (int u = 0; u < U; ++u) step(i + u, u);
  }
  for (; i < a.k; ++i) step(i, 0);
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      for (int u = 1; u < U; ++u) {
        for (int v = 0; v < kVectors; ++v) acc[0][r][p][v] += acc[u][r][p][v];
      }
      write_row(a, row + r, (panel + p) * kPanel, acc[0][r][p]);
    }
  }
}

template <typename W, int NP>
inline void float_panels(const LinearArgs& a, int64_t panel) {
  int64_t r = 0;
  for (; r + 6 <= a.m; r += 6) float_tile<W, 6, NP>(a, r, panel);
  for (; r + 4 <= a.m; r += 4) float_tile<W, 4, NP>(a, r, panel);
  for (; r + 2 <= a.m; r += 2) float_tile<W, 2, NP>(a, r, panel);
  for (; r < a.m; ++r) float_tile<W, 1, NP>(a, r, panel);
}

template <typename W>
void linear_float(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int NP = kVectors == 1 ? 2 : 1;  // AVX-512 has the registers for two panels
  int64_t panel = begin;
  if (a.m > 1) {
    for (; panel + NP <= end; panel += NP) float_panels<W, NP>(a, panel);
  }
  for (; panel < end; ++panel) float_panels<W, 1>(a, panel);
}

}  // namespace
}  // namespace precast
