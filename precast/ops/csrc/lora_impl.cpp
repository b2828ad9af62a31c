// Compiled once for each instruction set, with PRECAST_ISA naming it (see precast/ops/build.py).
#include "lora.h"
#include "simd.h"

#define PRECAST_CAT_(a, b) a##b
#define PRECAST_CAT(a, b) PRECAST_CAT_(a, b)

namespace precast {
namespace {

constexpr int kSums = 8;  // vectors that are summed up at once: enough to hide an addition's latency

typedef float four __attribute__((vector_size(16)));
typedef float eight __attribute__((vector_size(32)));

// With one rounding where the instruction set has that, as the compiler does it for vectors. A loop over
// single floats it would rather turn into products of vectors, and sums without them.
template <typename V>
V multiply_add(float factor, V weights, V sum) {
#if defined(__FMA__)
  if constexpr (std::is_same_v<V, float>) return __builtin_fmaf(factor, weights, sum);
#endif
  return sum + factor * weights;
}

template <typename V>
V weights_at(const float* p) {
  return load_as<V>(p);
}

template <typename V>
V weights_at(const Float16* p) {
  if constexpr (std::is_same_v<V, float>) {
    return to_float(*p);
  } else if constexpr (std::is_same_v<V, vfloat>) {
    return load(p);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<V, eight>) {
    return (eight)_mm256_maskz_cvtph_ps(0xff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    return (four)_mm_maskz_cvtph_ps(0xf, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__F16C__)
  } else {
    return (four)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  }
}

// M rows of N vectors, whose sums stay in registers.
template <typename V, int M, int N, typename W>
void tile(const float* const* x, int64_t depth, const W* w, int64_t stride, float* const* y,
          int64_t column, bool add) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  V sums[M][N];
  clear(sums);
  for (int64_t i = 0; i < depth; ++i) {
    V weights[N];
    for (int n = 0; n < N; ++n) weights[n] = weights_at<V>(w + i * stride + column + n * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float factor = x[m][i];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(factor, weights[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* to = y[m] + column + n * kWidth;
      if (add) sums[m][n] += load_as<V>(to);
      std::memcpy(to, &sums[m][n], sizeof(V));
    }
  }
}

// Columns from `column` on for M rows, as many vectors abreast as there are.
template <typename V, int M, int N, typename W>
int64_t columns(const float* const* x, int64_t depth, const W* w, int64_t stride, int64_t n,
                float* const* y, int64_t column, bool add) {
  constexpr int64_t kWidth = N * sizeof(V) / sizeof(float);
  for (; column + kWidth <= n; column += kWidth) tile<V, M, N>(x, depth, w, stride, y, column, add);
  if constexpr (N > 1) return columns<V, M, N / 2>(x, depth, w, stride, n, y, column, add);
  return column;
}

template <int M, typename W>
void some_rows(const float* const* x, int64_t depth, const W* w, int64_t stride, int64_t n,
               float* const* y, bool add) {
  int64_t column = columns<vfloat, M, kSums / M>(x, depth, w, stride, n, y, 0, add);
  if constexpr (kLanes > 8) column = columns<eight, M, 1>(x, depth, w, stride, n, y, column, add);
  if constexpr (kLanes > 4) column = columns<four, M, 1>(x, depth, w, stride, n, y, column, add);
  columns<float, M, 1>(x, depth, w, stride, n, y, column, add);
}

template <typename W>
void all_rows(const float* const* x, int64_t rows, int64_t depth, const W* w, int64_t stride, int64_t n,
              float* const* y, bool add) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) some_rows<4>(x + row, depth, w, stride, n, y + row, add);
  for (; row + 2 <= rows; row += 2) some_rows<2>(x + row, depth, w, stride, n, y + row, add);
  for (; row < rows; ++row) some_rows<1>(x + row, depth, w, stride, n, y + row, add);
}

void multiply(const float* const* x, int64_t rows, int64_t depth, const uint16_t* w, int64_t stride,
              int64_t n, float* const* y, bool add) {
  all_rows(x, rows, depth, reinterpret_cast<const Float16*>(w), stride, n, y, add);
}

void widen_all(const uint16_t* from, int64_t count, float* to) {
  const Float16* p = reinterpret_cast<const Float16*>(from);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(p + i));
  for (; i < count; ++i) to[i] = to_float(p[i]);
}

}  // namespace

const LoraKernels& PRECAST_CAT(lora_, PRECAST_ISA)() {
  static const LoraKernels table = {multiply, all_rows<float>, widen_all};
  return table;
}

}  // namespace precast
