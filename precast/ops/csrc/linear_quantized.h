// Linears with 8-bit and 4-bit weights and inputs quantised to 8 bits on the fly.
//
// The grouped formats follow GGUF's blocks (32 inputs, one scale, perhaps a minimum), regrouped into
// panels so that a vector holds four inputs of each of 16 columns: the dot product's own shape.
#pragma once

#include "linear_float.h"

namespace precast {
namespace {

constexpr int kStepBytes = kPanel * 4;  // four inputs of a panel's columns

// ---- inputs ----------------------------------------------------------------------------------

inline float largest_magnitude(const float* x, int64_t n) {
  vfloat largest = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat v = load(x + i);
    largest = maximum(largest, maximum(v, -v));
  }
  float result = reduce_max(largest);
  for (; i < n; ++i) result = std::fabs(x[i]) > result ? std::fabs(x[i]) : result;
  return result;
}

// Returns the sum of the quantised values. Rounds halves to even.
inline int32_t quantize(const float* x, int8_t* q, int64_t n, float inverse) {
  vint sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    const vfloat shifted = load(x + i) * inverse + 12582912.0f;
    const vint value = (vint)shifted - 0x4b400000;
    sums += value;
    const vbyte bytes = __builtin_convertvector(value, vbyte);
    std::memcpy(q + i, &bytes, sizeof(bytes));
  }
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  for (; i < n; ++i) {
    q[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
    sum += q[i];
  }
  return sum;
}

inline float quantize_run(const float* x, int8_t* q, int64_t n, int64_t padded, int32_t* sum) {
  const float largest = largest_magnitude(x, n);
  *sum = quantize(x, q, n, largest > 0 ? 127.0f / largest : 0.0f);
  for (int64_t i = n; i < padded; ++i) q[i] = 0;
  return largest / 127.0f;
}

void quantize_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t padded = padded_k(a.format, a.k), groups = input_groups(a.format, a.k);
  int8_t* q = const_cast<int8_t*>(a.xq);
  float* scales = const_cast<float*>(a.x_scales);
  float* sums = const_cast<float*>(a.x_sums);
  for (int64_t r = begin; r < end; ++r) {
    const float* x = a.x + r * a.x_stride;
    float row_sum = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroup, left = a.k - first;
      const int64_t count = left < 0 ? 0 : left < kGroup ? left : kGroup;
      const int64_t room = padded - first < kGroup ? padded - first : kGroup;
      const int64_t at = r * groups + g;
      int32_t sum;
      scales[at] = quantize_run(x + first, q + r * padded + first, count, room, &sum);
      const float scaled = static_cast<float>(sum) * scales[at];
      row_sum += scaled;
      if (a.format != Format::kInt8) sums[at] = scaled;
    }
    if (a.format == Format::kInt8) sums[r] = row_sum;
  }
}

// ---- dot products ----------------------------------------------------------------------------

inline int32_t load4(const int8_t* x) { return load_as<int32_t>(x); }

// acc[c] += sum over j < 4 of x[j] * w[4 c + j] for kLanes columns: `dot8` for weights in [-127, 127]
// that went through `prepare`, `dot4` for weights in [0, 15].
#if defined(__AVX512VNNI__)
// vpdpbusd takes unsigned times signed: weights get +128, and their product with it is taken back by
// the sum of the inputs. The inputs' broadcast is part of the instruction.
constexpr float kOffset = 128;
inline vint prepare(const uint8_t* w) {
  return (vint)_mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8(-128));
}
inline vint dot8(vint acc, vint w, const int8_t* x) {
  return (vint)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(load4(x)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr float kOffset = 0;
inline vint prepare(const uint8_t* w) { return load_as<vint>(w); }
inline vint dot8(vint acc, vint w, const int8_t* x4) {
  // |x| and |w| are at most 127: the 16-bit sums of pairs (127 * 127 * 2 < 32768) can't saturate.
  const __m256i x = _mm256_set1_epi32(load4(x4));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8((__m256i)w, x));
  return acc + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr float kOffset = 0;
inline vint prepare(const uint8_t* w) { return load_as<vint>(w); }
inline vint dot8(vint acc, vint w, const int8_t* x) {
  int8_t bytes[kLanes * 4];
  std::memcpy(bytes, &w, sizeof(bytes));
  for (int c = 0; c < kLanes; ++c) {
    for (int j = 0; j < 4; ++j) acc[c] += static_cast<int32_t>(x[j]) * bytes[c * 4 + j];
  }
  return acc;
}
#endif

// dots[r][v] = the group's integer dot products of MR rows with a panel's columns.
template <int MR>
inline void group_dots8(const uint8_t* w, const int8_t* x, int64_t x_stride,
                        vint (&dots)[MR][kVectors]) {
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) dots[r][v] = vint{};
  }
  for (int s = 0; s < kGroup / 4; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      const vint weights = prepare(w + s * kStepBytes + v * kLanes * 4);
      for (int r = 0; r < MR; ++r) dots[r][v] = dot8(dots[r][v], weights, x + r * x_stride + s * 4);
    }
  }
}

#if defined(__AVX512VNNI__)
template <int MR>
inline void group_dots4(const uint8_t* w, const int8_t* x, int64_t x_stride,
                        vint (&dots)[MR][kVectors]) {
  const __m512i mask = _mm512_set1_epi8(15);
  __m512i weights[8];
  for (int s = 0; s < 4; ++s) {
    const __m512i both = _mm512_loadu_si512(w + s * kStepBytes);
    weights[s] = _mm512_and_si512(both, mask);
    weights[s + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
  for (int r = 0; r < MR; ++r) {
    vint low = {}, high = {};  // two chains: the instruction takes several cycles
    for (int s = 0; s < 4; ++s) {
      low = dot8(low, (vint)weights[s], x + r * x_stride + s * 4);
      high = dot8(high, (vint)weights[s + 4], x + r * x_stride + s * 4 + 16);
    }
    dots[r][0] = low + high;
  }
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
template <int MR>
inline void group_dots4(const uint8_t* w, const int8_t* x, int64_t x_stride,
                        vint (&dots)[MR][kVectors]) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int v = 0; v < kVectors; ++v) {
    // Eight sums of pairs fit 16 bits: 8 * 2 * 15 * 127 < 32768.
    __m256i sums[MR];
    for (int r = 0; r < MR; ++r) sums[r] = _mm256_setzero_si256();
    for (int s = 0; s < 4; ++s) {
      const __m256i both =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + s * kStepBytes + v * 32));
      const __m256i low = _mm256_and_si256(both, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
      for (int r = 0; r < MR; ++r) {
        const int8_t* at = x + r * x_stride + s * 4;
        sums[r] = _mm256_add_epi16(
            sums[r], _mm256_maddubs_epi16(low, _mm256_set1_epi32(load4(at))));
        sums[r] = _mm256_add_epi16(
            sums[r], _mm256_maddubs_epi16(high, _mm256_set1_epi32(load4(at + 16))));
      }
    }
    for (int r = 0; r < MR; ++r) {
      dots[r][v] = (vint)_mm256_madd_epi16(sums[r], _mm256_set1_epi16(1));
    }
  }
}
#else
template <int MR>
inline void group_dots4(const uint8_t* w, const int8_t* x, int64_t x_stride,
                        vint (&dots)[MR][kVectors]) {
  for (int r = 0; r < MR; ++r) {
    for (int c = 0; c < kPanel; ++c) {
      int32_t sum = 0;
      for (int i = 0; i < 16; ++i) {
        const uint8_t both = w[i / 4 * kStepBytes + c * 4 + i % 4];
        sum += x[r * x_stride + i] * (both & 15) + x[r * x_stride + i + 16] * (both >> 4);
      }
      dots[r][c / kLanes][c % kLanes] = sum;
    }
  }
}
#endif

// ---- tiles -----------------------------------------------------------------------------------

// MR rows against NP panels, one scale for each column and each group of a row.
template <int MR, int NP>
inline void int8_tile(const LinearArgs& a, int64_t row, int64_t panel) {
  constexpr int U = MR * NP * kVectors >= 4 ? 1 : 4;
  const int64_t stride = panel_bytes(a.format, a.k), k = padded_k(a.format, a.k);
  const int64_t groups = input_groups(a.format, a.k), steps = k / 4;
  const uint8_t* weight = a.weight + panel * stride;
  const int8_t* x = a.xq + row * k;
  vfloat totals[MR][NP][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    vint acc[U][MR][NP][kVectors] = {};
    const auto step = [&](int64_t s, int u) {
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          const vint w = prepare(weight + p * stride + s * kStepBytes + v * kLanes * 4);
          for (int r = 0; r < MR; ++r) {
            acc[u][r][p][v] = dot8(acc[u][r][p][v], w, x + r * k + s * 4);
          }
        }
      }
    };
    int64_t s = g * (kGroup / 4);
    const int64_t end = s + kGroup / 4 < steps ? s + kGroup / 4 : steps;
    for (; s + U <= end; s += U) {
      for (int u = 0; u < U; ++u) step(s + u, u);
    }
    for (; s < end; ++s) step(s, 0);
    for (int r = 0; r < MR; ++r) {
      const int64_t at = (row + r) * groups + g;
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          vint total = acc[0][r][p][v];
          for (int u = 1; u < U; ++u) total += acc[u][r][p][v];
          totals[r][p][v] += to_float(total) * a.x_scales[at];
        }
      }
    }
  }
  for (int p = 0; p < NP; ++p) {
    const float* scales = reinterpret_cast<const float*>(weight + p * stride + k * kPanel);
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const vfloat dot = totals[r][p][v] - kOffset * a.x_sums[row + r];
        totals[r][p][v] = dot * load(scales + v * kLanes);
      }
      write_row(a, row + r, (panel + p) * kPanel, totals[r][p]);
    }
  }
}

// MR rows against a panel, one scale for each group of a row and of a column.
template <Format F, int MR>
inline void grouped_tile(const LinearArgs& a, int64_t row, int64_t panel) {
  const int64_t k = padded_k(F, a.k), groups = k / kGroup;
  const uint8_t* block = a.weight + panel * panel_bytes(F, a.k);
  const int8_t* x = a.xq + row * k;
  vfloat acc[MR][kVectors] = {};
  for (int64_t first = 0; first < groups; first += 2, block += block_bytes(F)) {
    const Float16* scales = reinterpret_cast<const Float16*>(block + 2 * group_bytes(F));
    for (int g = 0; g < 2; ++g) {
      const uint8_t* w = block + g * group_bytes(F);
      vint dots[MR][kVectors];
      if constexpr (F == Format::kQ8_0) {
        group_dots8<MR>(w, x + (first + g) * kGroup, k, dots);
      } else {
        group_dots4<MR>(w, x + (first + g) * kGroup, k, dots);
      }
      for (int v = 0; v < kVectors; ++v) {
        const vfloat scale = load(scales + g * kPanel + v * kLanes);
        const vfloat minimum =
            F == Format::kQ4_1 ? load(scales + (2 + g) * kPanel + v * kLanes) : vfloat{};
        for (int r = 0; r < MR; ++r) {
          const int64_t at = (row + r) * groups + first + g;
          const float sum = a.x_sums[at];
          vfloat dot = to_float(dots[r][v]) * a.x_scales[at];
          if constexpr (F == Format::kQ8_0 && kOffset != 0) dot -= splat(kOffset * sum);
          if constexpr (F == Format::kQ4_0) dot -= splat(8.0f * sum);
          acc[r][v] += dot * scale;
          if constexpr (F == Format::kQ4_1) acc[r][v] += minimum * sum;
        }
      }
    }
  }
  for (int r = 0; r < MR; ++r) write_row(a, row + r, panel * kPanel, acc[r]);
}

void linear_int8(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int MR = kVectors == 1 ? 8 : 4, NP = kVectors == 1 ? 2 : 1;
  int64_t panel = begin;
  const auto rest = [&](int64_t r, int64_t p) {
    if constexpr (MR > 4) {
      for (; r + 4 <= a.m; r += 4) int8_tile<4, 1>(a, r, p);
    }
    for (; r + 2 <= a.m; r += 2) int8_tile<2, 1>(a, r, p);
    for (; r < a.m; ++r) int8_tile<1, 1>(a, r, p);
  };
  for (; a.m >= MR && panel + NP <= end; panel += NP) {
    int64_t r = 0;
    for (; r + MR <= a.m; r += MR) int8_tile<MR, NP>(a, r, panel);
    for (int p = 0; p < NP; ++p) rest(r, panel + p);
  }
  for (; panel < end; ++panel) {
    int64_t r = 0;
    for (; r + MR <= a.m; r += MR) int8_tile<MR, 1>(a, r, panel);
    rest(r, panel);
  }
}

template <Format F>
void linear_grouped(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int MR = kVectors == 1 ? 8 : 4;
  for (int64_t panel = begin; panel < end; ++panel) {
    int64_t r = 0;
    for (; r + MR <= a.m; r += MR) grouped_tile<F, MR>(a, r, panel);
    if constexpr (MR > 4) {
      for (; r + 4 <= a.m; r += 4) grouped_tile<F, 4>(a, r, panel);
    }
    for (; r + 2 <= a.m; r += 2) grouped_tile<F, 2>(a, r, panel);
    for (; r < a.m; ++r) grouped_tile<F, 1>(a, r, panel);
  }
}

void linear(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.format) {
    case Format::kFloat32: return linear_float<float>(a, begin, end);
    case Format::kBFloat16: return linear_float<BFloat16>(a, begin, end);
    case Format::kFloat16: return linear_float<Float16>(a, begin, end);
    case Format::kInt8: return linear_int8(a, begin, end);
    case Format::kQ8_0: return linear_grouped<Format::kQ8_0>(a, begin, end);
    case Format::kQ4_0: return linear_grouped<Format::kQ4_0>(a, begin, end);
    case Format::kQ4_1: return linear_grouped<Format::kQ4_1>(a, begin, end);
  }
}

// ---- rows ------------------------------------------------------------------------------------

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
