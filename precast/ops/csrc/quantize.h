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

// Returns the sum of the quantised values. Rounds halves to even.
inline int32_t quantize(const float* x, int8_t* q, int64_t n, float inverse) {
  vint sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vint value = nearest(load(x + i) * inverse);
    sums += value;
    narrow(value, q + i);
  }
  int32_t sum = reduce_add(sums);
  for (; i < n; ++i) {
    q[i] = static_cast<int8_t>(std::nearbyintf(x[i] * inverse));
    sum += q[i];
  }
  return sum;
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
      const int64_t at = input_at(a.m, groups, row, group);
      int8_t* q = a.inputs.values + at * kGroup;
      const float largest = largest_magnitude(x, count);
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      const int32_t sum = quantize(x, q, count, inverse);
      for (int64_t i = count; i < kGroup; ++i) q[i] = 0;
      if (a.inputs.wide != nullptr) widen_inputs(q, a.inputs.wide + at * kGroup);
      a.inputs.scales[at] = largest / 127.0f;
      a.inputs.sums[at] = static_cast<float>(sum) * a.inputs.scales[at];
      if (a.inputs.halves != nullptr) {
        a.inputs.halves[at] = half_sums(q);
        a.inputs.halves[at + a.inputs.entries] = half_sums(q + kGroup / 2);
      } else if (kAvx2Dots) {
        a.inputs.starts[at] = start_of(offset, half_sums(q), half_sums(q + kGroup / 2));
      } else {
        a.inputs.starts[at] = start_of(offset, sum);
      }
    }
  }
}

}  // namespace
}  // namespace precast
