// Inputs of the linears with quantised weights: 8 bits, a scale for each group of 32 of a row.
#pragma once

#include <algorithm>

#include "simd.h"

namespace precast {
namespace {

// How integer products are made: by one instruction (vpdpbusd), by AVX2's several, or by a loop.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kVnniDots = true, kAvx2Dots = false;
#elif defined(__AVX2__)
constexpr bool kVnniDots = false, kAvx2Dots = true;
#else
constexpr bool kVnniDots = false, kAvx2Dots = false;
#endif

// What a byte of weight has too much when the integer products are made of it: vpdpbusd takes unsigned ones.
constexpr int32_t kOffset = kVnniDots ? 128 : 0;

constexpr int32_t weight_offset(Format f) {
  switch (f) {
    case Format::kQ4_0: return 8;
    case Format::kMXFP4: return 12;
    case Format::kQ5_0: return 16;
    case Format::kQ6_K: return 32;
    case Format::kInt8:
    case Format::kQ8_0:
    case Format::kIQ4_NL:
    case Format::kIQ4_XS: return kOffset;
    default: return 0;
  }
}

// What 16 inputs leave for start_of: their sum. AVX2's sums of products are pairs of 16 bits, of inputs 4 i and
// 4 i + 1, and of 4 i + 2 and 4 i + 3; so are these then.
inline int32_t half_sums(const int8_t* q) {
#if defined(__AVX2__)
  __m128i sums = _mm_maddubs_epi16(_mm_set1_epi8(1), load_as<__m128i>(q));
  sums = _mm_add_epi16(sums, _mm_unpackhi_epi64(sums, sums));
  const int32_t pairs = _mm_cvtsi128_si32(_mm_add_epi16(sums, _mm_shuffle_epi32(sums, 1)));
  return kAvx2Dots ? pairs : static_cast<int16_t>(pairs) + (pairs >> 16);
#else
  int32_t sum = 0;
  for (int i = 0; i < kGroup / 2; ++i) sum += q[i];
  return sum;
#endif
}

// The sum itself.
inline int32_t sum_of(int32_t sums) { return kAvx2Dots ? static_cast<int16_t>(sums) + (sums >> 16) : sums; }

// What products begin at, of inputs with these sums.
inline int32_t start_of(int32_t offset, int32_t sums, int32_t more = 0) {
  if constexpr (!kAvx2Dots) return -offset * (sums + more);
  const int32_t low = static_cast<int16_t>(sums) + static_cast<int16_t>(more), high = (sums >> 16) + (more >> 16);
  return static_cast<int32_t>((-offset * low & 0xffffu) | static_cast<uint32_t>(-offset * high) << 16);
}

void find_starts(Format format, const QuantizedInputs& inputs) {
  const int32_t offset = weight_offset(format);
  const int32_t *first = inputs.halves, *second = first + inputs.entries;
  for (int64_t i = 0; i < inputs.entries; ++i) {
    inputs.starts[i] = start_of(offset, first[i], has_halves(format) ? 0 : second[i]);
  }
  for (int64_t i = 0; i < inputs.entries && has_halves(format); ++i) {
    inputs.starts[inputs.entries + i] = start_of(offset, second[i]);
  }
}

// The low bytes of a group's integers.
inline void narrow_group(const vint (&v)[kGroup / kLanes], int8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Each shuffle puts four bytes of each half where the others have zeros: a quarter of narrow()'s instructions.
  const auto lowest = [](int place) {
    const auto at = [&](int i) { return i == place ? 0x0c080400 : -1; };
    return _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(0), at(1), at(2), at(3));
  };
  __m256i bytes = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) bytes = _mm256_or_si256(bytes, _mm256_shuffle_epi8((__m256i)v[i], lowest(i)));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
#else
  for (int i = 0; i < kGroup / kLanes; ++i) narrow(v[i], to + i * kLanes);
#endif
}

// A group's values as bytes, halves rounded to even ones, in units of what it returns divided by 127.
inline float quantize_group(const float* x, int8_t* q) {
  constexpr int kParts = kGroup / kLanes;
  vfloat values[kParts], magnitude = {};
  for (int i = 0; i < kParts; ++i) {
    values[i] = load(x + i * kLanes);
    magnitude = larger(magnitude, (vfloat)((vint)values[i] & 0x7fffffff));
  }
  const float largest = reduce_max(magnitude);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  vint bytes[kParts];
  for (int i = 0; i < kParts; ++i) bytes[i] = rounded(values[i], inverse);
  narrow_group(bytes, q);
  return largest;
}

// A group's inputs, those at even places first, as linears multiply weights of 16 bits with them.
inline void widen_inputs(const int8_t* q, int16_t* to) {
  int16_t pairs[kGroup / 2];
  std::memcpy(pairs, q, sizeof(pairs));
  for (int i = 0; i < kGroup / 2; ++i) {
    to[i] = static_cast<int16_t>(pairs[i] << 8) >> 8;
    to[kGroup / 2 + i] = pairs[i] >> 8;
  }
}

void quantize_inputs(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.groups;
  const int32_t offset = weight_offset(a.format);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / groups * kRowBlock, group = unit % groups;
    const int64_t first = group * kGroup, left = a.k - first;
    const int64_t count = left < 0 ? 0 : left < kGroup ? left : kGroup;
    for (int64_t row = block; row < block + rows_of_block(a.m, block); ++row) {
      const float* x = a.x + row * a.x_stride + first;
      float padded[kGroup];
      if (count < kGroup) {
        clear(padded);
        x = static_cast<const float*>(std::memcpy(padded, x, count * sizeof(float)));
      }
      const int64_t at = input_at(a.m, groups, row, group);
      int8_t* q = a.inputs.values + at * kGroup;
      const float scale = quantize_group(x, q) / 127.0f;
      const int32_t low = half_sums(q), high = half_sums(q + kGroup / 2);
      if (a.inputs.wide != nullptr) widen_inputs(q, a.inputs.wide + at * kGroup);
      a.inputs.scales[at] = scale;
      a.inputs.sums[at] = static_cast<float>(sum_of(low) + sum_of(high)) * scale;
      if (a.inputs.halves != nullptr) {
        a.inputs.halves[at] = low;
        a.inputs.halves[at + a.inputs.entries] = high;
      } else {
        a.inputs.starts[at] = start_of(offset, low, high);
      }
    }
  }
}

}  // namespace
}  // namespace precast
