// Compiled once for each instruction set, with PRECAST_ISA naming it (see precast/ops/build.py).
// Vector code is written with the compiler's vector extensions, so that one text serves all widths;
// only the int8 dot product, which has no portable form, uses intrinsics.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

#define PRECAST_CAT_(a, b) a##b
#define PRECAST_CAT(a, b) PRECAST_CAT_(a, b)
#define PRECAST_STR_(a) #a
#define PRECAST_STR(a) PRECAST_STR_(a)

namespace precast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = kPanel / kLanes;  // vectors to a panel row

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }
inline vfloat splat(float x) { return vfloat{} + x; }

inline vfloat load_weight(const float* p) { return load(p); }
inline vfloat load_weight(const uint16_t* p) {  // bf16: the upper half of a float
  vshort half;
  std::memcpy(&half, p, sizeof(half));
  const vint bits = __builtin_convertvector(half, vint) << 16;
  vfloat v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// At one row a linear is bound by memory, and the hardware's prefetchers stop at every 4 KiB page:
// asking this far ahead (weights of neighbouring panels are contiguous) took ... more of its bandwidth.
constexpr int kPrefetchBytes = 2048;

template <int Bytes>
inline void prefetch(const void* p) {
  for (int i = 0; i < Bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 3);
}

inline float reduce_add(vfloat v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// ---- float linears ---------------------------------------------------------------------------

inline void write_row(float* y, const vfloat* acc, const float* bias, int columns) {
  float row[kPanel];
  for (int v = 0; v < kVectors; ++v) store(row + v * kLanes, acc[v]);
  for (int c = 0; c < columns; ++c) y[c] = row[c] + (bias ? bias[c] : 0.0f);
}

// MR rows of x against NP neighbouring panels.
template <int MR, int NP, typename W>
inline void float_tile(const float* x, int64_t x_stride, const W* weight, const float* bias,
                       float* y, int64_t n, int64_t k, int64_t column) {
  // One row has too few accumulators to hide the latency of the multiply-add, so it runs over
  // several interleaved stretches of K.
  constexpr int U = MR * NP * kVectors >= 8 ? 1 : 4;
  vfloat acc[U][MR][NP][kVectors] = {};
  const int64_t panel_size = k * kPanel;
  int64_t i = 0;
  for (; i + U <= k; i += U) {
    for (int u = 0; u < U; ++u) {
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          const vfloat w = load_weight(weight + p * panel_size + (i + u) * kPanel + v * kLanes);
          for (int r = 0; r < MR; ++r) acc[u][r][p][v] += w * x[r * x_stride + i + u];
        }
      }
    }
  }
  for (; i < k; ++i) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const vfloat w = load_weight(weight + p * panel_size + i * kPanel + v * kLanes);
        for (int r = 0; r < MR; ++r) acc[0][r][p][v] += w * x[r * x_stride + i];
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      for (int u = 1; u < U; ++u) {
        for (int v = 0; v < kVectors; ++v) acc[0][r][p][v] += acc[u][r][p][v];
      }
      const int64_t first = column + p * kPanel;
      const int columns = n - first < kPanel ? static_cast<int>(n - first) : kPanel;
      write_row(y + r * n + first, acc[0][r][p], bias ? bias + first : nullptr, columns);
    }
  }
}

template <int NP, typename W>
void float_panels(const float* x, int64_t x_stride, const W* weight, const float* bias, float* y,
                  int64_t m, int64_t n, int64_t k, int64_t panel) {
  const W* w = weight + panel * k * kPanel;
  const int64_t column = panel * kPanel;
  int64_t r = 0;
  for (; r + 6 <= m; r += 6) {
    float_tile<6, NP>(x + r * x_stride, x_stride, w, bias, y + r * n, n, k, column);
  }
  for (; r + 4 <= m; r += 4) {
    float_tile<4, NP>(x + r * x_stride, x_stride, w, bias, y + r * n, n, k, column);
  }
  for (; r + 2 <= m; r += 2) {
    float_tile<2, NP>(x + r * x_stride, x_stride, w, bias, y + r * n, n, k, column);
  }
  for (; r < m; ++r) {
    float_tile<1, NP>(x + r * x_stride, x_stride, w, bias, y + r * n, n, k, column);
  }
}

template <typename W>
void gemm_float_typed(const float* x, int64_t x_stride, const W* weight, const float* bias,
                      float* y, int64_t m, int64_t n, int64_t k, int64_t begin, int64_t end) {
  constexpr int NP = kVectors == 1 ? 2 : 1;  // AVX-512 has the registers for two panels
  int64_t panel = begin;
  if (m > 1) {
    for (; panel + NP <= end; panel += NP) {
      float_panels<NP>(x, x_stride, weight, bias, y, m, n, k, panel);
    }
  }
  for (; panel < end; ++panel) float_panels<1>(x, x_stride, weight, bias, y, m, n, k, panel);
}

void gemm_float(WeightType type, const float* x, int64_t x_stride, const void* weight,
                const float* bias, float* y, int64_t m, int64_t n, int64_t k, int64_t begin,
                int64_t end) {
  if (type == WeightType::kFloat32) {
    gemm_float_typed(x, x_stride, static_cast<const float*>(weight), bias, y, m, n, k, begin, end);
  } else {
    gemm_float_typed(x, x_stride, static_cast<const uint16_t*>(weight), bias, y, m, n, k, begin,
                     end);
  }
}

// ---- int8 linears ----------------------------------------------------------------------------

float quantize_row(const float* x, int8_t* q, int64_t k, int64_t k_padded) {
  float largest = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float a = std::fabs(x[i]);
    largest = a > largest ? a : largest;
  }
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < k; ++i) q[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
  for (int64_t i = k; i < k_padded; ++i) q[i] = 0;
  return largest / 127.0f;
}

// acc[c] += sum over 4 of x[j] * w[c][j], for kLanes columns. |x| and |w| are at most 127, so that the
// 16-bit sums of pairs in the AVX2 form (127 * 127 * 2 < 32768) can't saturate.
#if defined(__AVX512VNNI__)
constexpr bool kOffset = true;  // x carries +128: vpdpbusd takes unsigned times signed
inline vint dot4(vint acc, const int8_t* w, int32_t x4) {
  return (vint)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(x4),
                                   _mm512_loadu_si512(w));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kOffset = false;
inline vint dot4(vint acc, const int8_t* w, int32_t x4) {
  const __m256i x = _mm256_set1_epi32(x4);
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_sign_epi8(x, x), _mm256_sign_epi8(weights, x));
  return acc + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr bool kOffset = false;
inline vint dot4(vint acc, const int8_t* w, int32_t x4) {
  int8_t x[4];
  std::memcpy(x, &x4, 4);
  for (int c = 0; c < kLanes; ++c) {
    int32_t sum = 0;
    for (int j = 0; j < 4; ++j) sum += static_cast<int32_t>(x[j]) * w[c * 4 + j];
    acc[c] += sum;
  }
  return acc;
}
#endif

inline int32_t load4(const int8_t* x) {
  int32_t value;
  std::memcpy(&value, x, 4);
  return kOffset ? static_cast<int32_t>(static_cast<uint32_t>(value) ^ 0x80808080u) : value;
}

template <int MR>
inline void int8_tile(const int8_t* xq, const float* x_scales, const int8_t* weight,
                      const float* w_scales, const int32_t* sums, const float* bias, float* y,
                      int64_t n, int64_t k, int64_t column) {
  constexpr int U = MR * kVectors >= 4 ? 1 : 4;
  vint acc[U][MR][kVectors] = {};
  const int64_t groups = k / 4;
  int64_t g = 0;
  for (; g + U <= groups; g += U) {
    if (MR == 1) prefetch<U * kPanel * 4>(weight + g * kPanel * 4 + kPrefetchBytes);
    for (int u = 0; u < U; ++u) {
      for (int r = 0; r < MR; ++r) {
        const int32_t x4 = load4(xq + r * k + (g + u) * 4);
        for (int v = 0; v < kVectors; ++v) {
          acc[u][r][v] = dot4(acc[u][r][v], weight + (g + u) * kPanel * 4 + v * kLanes * 4, x4);
        }
      }
    }
  }
  for (; g < groups; ++g) {
    for (int r = 0; r < MR; ++r) {
      const int32_t x4 = load4(xq + r * k + g * 4);
      for (int v = 0; v < kVectors; ++v) {
        acc[0][r][v] = dot4(acc[0][r][v], weight + g * kPanel * 4 + v * kLanes * 4, x4);
      }
    }
  }
  const int columns = n - column < kPanel ? static_cast<int>(n - column) : kPanel;
  for (int r = 0; r < MR; ++r) {
    int32_t row[kPanel];
    for (int v = 0; v < kVectors; ++v) {
      vint total = acc[0][r][v];
      for (int u = 1; u < U; ++u) total += acc[u][r][v];
      std::memcpy(row + v * kLanes, &total, sizeof(total));
    }
    for (int c = 0; c < columns; ++c) {
      const int32_t exact = kOffset ? row[c] - 128 * sums[column + c] : row[c];
      y[r * n + column + c] = static_cast<float>(exact) * x_scales[r] * w_scales[column + c] +
                              (bias ? bias[column + c] : 0.0f);
    }
  }
}

void gemm_int8(const int8_t* xq, const float* x_scales, const int8_t* weight,
               const float* w_scales, const int32_t* sums, const float* bias, float* y, int64_t m,
               int64_t n, int64_t k, int64_t begin, int64_t end) {
  constexpr int MR = 4;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int8_t* w = weight + panel * k * kPanel;
    const int64_t column = panel * kPanel;
    int64_t r = 0;
    for (; r + MR <= m; r += MR) {
      int8_tile<MR>(xq + r * k, x_scales + r, w, w_scales, sums, bias, y + r * n, n, k, column);
    }
    for (; r + 2 <= m; r += 2) {
      int8_tile<2>(xq + r * k, x_scales + r, w, w_scales, sums, bias, y + r * n, n, k, column);
    }
    for (; r < m; ++r) {
      int8_tile<1>(xq + r * k, x_scales + r, w, w_scales, sums, bias, y + r * n, n, k, column);
    }
  }
}

// ---- attention -------------------------------------------------------------------------------

inline float dot(const float* a, const float* b, int n) {
  vfloat acc0 = {}, acc1 = {};
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    acc0 += load(a + i) * load(b + i);
    acc1 += load(a + i + kLanes) * load(b + i + kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) acc0 += load(a + i) * load(b + i);
  float total = reduce_add(acc0 + acc1);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

inline void axpy(float* y, float a, const float* x, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i) * a);
  for (; i < n; ++i) y[i] += a * x[i];
}

inline void rescale(float* y, float a, int n) {
  for (int i = 0; i < n; ++i) y[i] *= a;
}

// Softmax of one block's scores, kept stable across blocks by a running maximum (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
void attend(const AttentionArgs& a, int64_t token, int kv_head, int64_t context, float* scratch) {
  const int group = a.q_heads / a.kv_heads;
  const int dim = a.head_dim;
  float* out = scratch;                        // [group, dim]
  float* weights = out + group * dim;          // [group, block_size]
  float* maximum = weights + group * a.block_size;
  float* denominator = maximum + group;
  const float* q = a.q + token * a.q_stride + static_cast<int64_t>(kv_head) * group * dim;
  for (int i = 0; i < group * dim; ++i) out[i] = 0;
  for (int g = 0; g < group; ++g) {
    maximum[g] = -INFINITY;
    denominator[g] = 0;
  }
  for (int64_t start = 0; start < context; start += a.block_size) {
    const int64_t left = context - start;
    const int count = left < a.block_size ? static_cast<int>(left) : a.block_size;
    const int64_t block = a.block_table[start / a.block_size];
    const int64_t base = (block * a.kv_heads + kv_head) * a.block_size * dim;
    for (int i = 0; i < count; ++i) {
      for (int g = 0; g < group; ++g) {
        weights[g * a.block_size + i] = dot(q + g * dim, a.k_cache + base + i * dim, dim) * a.scale;
      }
    }
    for (int g = 0; g < group; ++g) {
      float* w = weights + g * a.block_size;
      float largest = maximum[g];
      for (int i = 0; i < count; ++i) largest = w[i] > largest ? w[i] : largest;
      const float shrink = std::exp(maximum[g] - largest);
      float total = 0;
      for (int i = 0; i < count; ++i) {
        w[i] = std::exp(w[i] - largest);
        total += w[i];
      }
      rescale(out + g * dim, shrink, dim);
      denominator[g] = denominator[g] * shrink + total;
      maximum[g] = largest;
      for (int i = 0; i < count; ++i) axpy(out + g * dim, w[i], a.v_cache + base + i * dim, dim);
    }
  }
  float* result = a.out + (token * a.q_heads + static_cast<int64_t>(kv_head) * group) * dim;
  for (int g = 0; g < group; ++g) {
    const float inverse = denominator[g] > 0 ? 1.0f / denominator[g] : 0.0f;
    for (int i = 0; i < dim; ++i) result[g * dim + i] = out[g * dim + i] * inverse;
  }
}

void sum(const float* const* arrays, int count, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vfloat total = load(arrays[0] + i);
    for (int c = 1; c < count; ++c) total += load(arrays[c] + i);
    store(out + i, total);
  }
  for (; i < n; ++i) {
    float total = arrays[0][i];
    for (int c = 1; c < count; ++c) total += arrays[c][i];
    out[i] = total;
  }
}

}  // namespace

const Kernels& PRECAST_CAT(kernels_, PRECAST_ISA)() {
  static const Kernels table = {PRECAST_STR(PRECAST_ISA), gemm_float, quantize_row, gemm_int8,
                                attend, sum};
  return table;
}

}  // namespace precast
