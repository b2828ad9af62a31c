// Norm, activation and rotary embedding, a row at a time.
#pragma once

#include "simd.h"

namespace precast {
namespace {

void rms_norm_row(const float* x, const float* weight, float eps, float* y, int64_t n) {
  vfloat squares{};
  float total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares += load(x + i) * load(x + i);
  for (; i < n; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt((total + reduce_add(squares)) / static_cast<float>(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// Of e = exp(-|x|), so that nothing overflows: 1 / (1 + e) for x >= 0, e / (1 + e) below.
inline vfloat sigmoid(vfloat x) {
  const vfloat e = exp_negative(x > 0.0f ? -x : x);
  return (x > 0.0f ? splat(1.0f) : e) / (1.0f + e);
}

void silu_and_mul_row(const float* gate, const float* up, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat g = load(gate + i);
    store(y + i, g * sigmoid(g) * load(up + i));
  }
  if (i == n) return;
  float rest[3][kLanes] = {};
  std::memcpy(rest[0], gate + i, (n - i) * sizeof(float));
  std::memcpy(rest[1], up + i, (n - i) * sizeof(float));
  const vfloat g = load(rest[0]);
  store(rest[2], g * sigmoid(g) * load(rest[1]));
  std::memcpy(y + i, rest[2], (n - i) * sizeof(float));
}

// One head: pairs (i, i + half) of its first 2 * half features; the others stay.
void rotate_head(const float* x, const float* cos, const float* sin, float* y, int64_t half,
                 int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vfloat a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(y + i, a * c - b * s);
    store(y + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
  std::memcpy(y + 2 * half, x + 2 * half, (dim - 2 * half) * sizeof(float));
}

}  // namespace
}  // namespace precast
