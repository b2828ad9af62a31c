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

// y = f(a) of n values, the last ones in a vector of their own.
template <typename F>
inline void map_row(const float* a, float* y, int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i)));
  if (i == n) return;
  float rest[kLanes] = {};
  std::memcpy(rest, a + i, (n - i) * sizeof(float));
  store(rest, f(load(rest)));
  std::memcpy(y + i, rest, (n - i) * sizeof(float));
}

// y = f(a) b.
template <typename F>
inline void map_and_mul_row(const float* a, const float* b, float* y, int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i)) * load(b + i));
  if (i == n) return;
  float rest[2][kLanes] = {};
  std::memcpy(rest[0], a + i, (n - i) * sizeof(float));
  std::memcpy(rest[1], b + i, (n - i) * sizeof(float));
  store(rest[0], f(load(rest[0])) * load(rest[1]));
  std::memcpy(y + i, rest[0], (n - i) * sizeof(float));
}

void silu_and_mul_row(const float* gate, const float* up, float* y, int64_t n) {
  map_and_mul_row(gate, up, y, n, [](vfloat x) { return x * sigmoid(x); });
}

// x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
void gelu_tanh_and_mul_row(const float* gate, const float* up, float* y, int64_t n) {
  map_and_mul_row(gate, up, y, n, [](vfloat x) {
    const vfloat inner = multiply_add(x * x, splat(0.044715f), splat(1.0f));
    return x * sigmoid(1.59576912f * x * inner);
  });
}

// (1 - e) / (1 + e), e = exp(-2 |x|); near zero, where that cancels, the polynomial of Cephes' tanhf
// (S. L. Moshier).
inline vfloat hyperbolic_tangent(vfloat x) {
  const vfloat size = maximum(x, -x), square = x * x;
  const vfloat e = exp_negative(-2.0f * size);
  const vfloat far = (1.0f - e) / (1.0f + e);
  vfloat p = splat(-5.70498872745e-3f);
  p = multiply_add(p, square, splat(2.06390887954e-2f));
  p = multiply_add(p, square, splat(-5.37397155531e-2f));
  p = multiply_add(p, square, splat(1.33314422036e-1f));
  p = multiply_add(p, square, splat(-3.33332819422e-1f));
  const vfloat near = multiply_add(p * square, x, x);
  return size >= 0.625f ? (x > 0.0f ? far : -far) : near;  // NaN stays NaN
}

void soft_cap_row(const float* x, float cap, float* y, int64_t n) {
  map_row(x, y, n, [cap](vfloat v) { return cap * hyperbolic_tangent(v / cap); });
}

void softmax_row(const float* x, float* y, int64_t n) {
  float largest = x[0], total = 0;
  for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  map_row(x, y, n, [largest](vfloat v) { return exp_negative(v - largest); });
  for (int64_t i = 0; i < n; ++i) total += x[i] == x[i] ? y[i] : x[i];  // NaN makes all NaN
  for (int64_t i = 0; i < n; ++i) y[i] /= total;
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
