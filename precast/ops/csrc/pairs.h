// Products of 16-bit integers, of which each 32-bit lane of a vector has a pair: twice as many an instruction as
// multiply-adds of floats. Sums of them are exact.
#pragma once

#include "simd.h"

namespace precast {
namespace {

inline vint splat_pair(int32_t pair) {
#if defined(__AVX512F__)
  return (vint)_mm512_set1_epi32(pair);
#elif defined(__AVX2__)
  return (vint)_mm256_set1_epi32(pair);
#else
  return (vint)_mm_set1_epi32(pair);
#endif
}

// sum + a's first * b's first + a's second * b's second.
[[gnu::always_inline]] inline vint add_dots(vint sum, vint a, vint b) {
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (vint)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
#if defined(__AVX2__)
  sum += (vint)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  sum += (vint)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  // Left alone GCC 12 puts additions off, and has no registers for their terms.
  asm volatile("" : "+x"(sum));
  return sum;
#endif
}

// Pairs of the kPanel values at `first` and of those at `second`.
[[gnu::always_inline]] inline void load_pairs(const int8_t* first, const int8_t* second, vint (&to)[kVectors]) {
  const __m128i a = load_as<__m128i>(first), b = load_as<__m128i>(second);
#if defined(__AVX512F__)
  alignas(64) static constexpr uint16_t kByTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
  to[0] = (vint)_mm512_permutexvar_epi16(_mm512_load_si512(kByTurns), _mm512_cvtepi8_epi16(both));
#else
  const __m128i low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
#if defined(__AVX2__)
  to[0] = (vint)_mm256_cvtepi8_epi16(low);
  to[1] = (vint)_mm256_cvtepi8_epi16(high);
#else
  to[0] = (vint)_mm_srai_epi16(_mm_unpacklo_epi8(low, low), 8);
  to[1] = (vint)_mm_srai_epi16(_mm_unpackhi_epi8(low, low), 8);
  to[2] = (vint)_mm_srai_epi16(_mm_unpacklo_epi8(high, high), 8);
  to[3] = (vint)_mm_srai_epi16(_mm_unpackhi_epi8(high, high), 8);
#endif
#endif
}

// Neighbouring values in pairs, as the instruction set makes them in the least time: those of a pair are
// kApart apart.
constexpr int kApart = kLanes == 16 ? 1 : kLanes;
constexpr int first_of_pair(int pair) { return pair / kApart * 2 * kApart + pair % kApart; }

// The nearest integers of x[0..count) * factor in such pairs. count: a multiple of kPanel.
inline void round_to_pairs(const float* x, int count, float factor, int32_t* to) {
#if defined(__AVX512F__)
  for (int i = 0; i < count; i += kLanes, to += kLanes / 2) {
    const __m256i halves = _mm512_cvtepi32_epi16((__m512i)rounded(load(x + i), factor));
    std::memcpy(to, &halves, sizeof(halves));
  }
#else
  for (int i = 0; i < count; i += 2 * kLanes, to += kLanes) {
    const vint low = rounded(load(x + i), factor), high = rounded(load(x + i + kLanes), factor) << 16;
#if defined(__AVX2__)
    const vint pairs = (vint)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#else
    const vint pairs = (low & 0xffff) | high;
#endif
    std::memcpy(to, &pairs, sizeof(pairs));
  }
#endif
}

// The steps that values are rounded to: their size, and how many are in 1.
struct Steps {
  float size, in_one;
};

// `most` steps to the largest value. What is not finite makes the size no number, whatever it is multiplied
// with; as good as nothing, in any sum that matters, is 0.
inline Steps steps_of(float largest, float most) {
  if (!(largest < INFINITY)) return {NAN, 0};
  if (largest < 1e-30f) return {0, 0};
  return {largest * (1 / most), most / largest};
}

// The larger of values without a sign; NaN if either is: their bits, as integers, are in that order.
inline vuint larger_bits(vuint a, vuint b) {
#if defined(__AVX512F__)
  return (vuint)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vuint)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

inline float largest_of_bits(vuint bits) {
  uint32_t most;
#if defined(__AVX512F__)
  most = _mm512_reduce_max_epu32((__m512i)bits);
#elif defined(__AVX2__)
  __m128i x = _mm_max_epu32(_mm256_castsi256_si128((__m256i)bits), _mm256_extracti128_si256((__m256i)bits, 1));
  x = _mm_max_epu32(x, _mm_unpackhi_epi64(x, x));
  most = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(x, _mm_shuffle_epi32(x, 1))));
#else
  most = bits[0];
  for (int i = 1; i < kLanes; ++i) most = bits[i] > most ? bits[i] : most;
#endif
  float largest;
  std::memcpy(&largest, &most, sizeof(largest));
  return largest;
}

}  // namespace
}  // namespace precast
