// group_dots where one instruction multiplies bytes and adds up four neighbours: AVX-512 VNNI and AVX-VNNI.
// Weights are its factor without a sign, weight_offset too much; inputs have one.
#pragma once

#include "group_weights.h"

namespace precast {
namespace {

inline vint repeated(int32_t x) {
#if defined(__AVX512F__)
  return (vint)_mm512_set1_epi32(x);
#else
  return (vint)_mm256_set1_epi32(x);
#endif
}

inline vint add_fours(vint sum, vint weights, vint inputs) {
#if defined(__AVX512F__)
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)inputs);
#else
  sum = (vint)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)inputs);
  asm volatile("" : "+x"(sum));  // as AVX2's settle
  return sum;
#endif
}

template <Format F, int MR, int NP, bool Unpacked = false, typename Use>
inline void group_dots(const uint8_t* w, int64_t stride, int steps, const int8_t* x, Starts starts, Use&& use) {
  constexpr int U = MR * NP * kVectors < 4 ? 2 : 1;  // few sums: the instruction takes several cycles
  constexpr int kParts = parts_of(F), kOwn = kSteps / kParts;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    vint dots[U][MR][NP][kVectors];
    clear(dots);
    for (int r = 0; r < MR; ++r) {
      const vint start = repeated(starts.first[r + part * starts.to_second]);
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) dots[0][r][p][v] = start;
      }
    }
    const auto step = [&](int s) {
      vint weights[NP][kVectors];
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) weights[p][v] = weights_of<F, Unpacked>(w + p * stride, s, v);
      }
      for (int r = 0; r < MR; ++r) {
        const vint inputs = repeated(load4(x + r * kGroup + s * 4));
        for (int p = 0; p < NP; ++p) {
          for (int v = 0; v < kVectors; ++v) {
            vint& sum = dots[s % U][r][p][v];
            sum = add_fours(sum, weights[p][v], inputs);
          }
        }
      }
    };
    if (F != Format::kInt8 || steps == kSteps) {
#pragma GCC unroll 8
      for (int s = 0; s < kOwn; ++s) step(part * kOwn + s);
    } else {
      for (int s = 0; s < steps; ++s) step(s);
    }
    for (int r = 0; r < MR; ++r) {
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (U == 2) dots[0][r][p][v] += dots[1][r][p][v];
          use(r, p, v, dots[0][r][p][v], part);
        }
      }
    }
  }
}

}  // namespace
}  // namespace precast
