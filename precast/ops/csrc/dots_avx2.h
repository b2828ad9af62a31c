// group_dots of AVX2: products of bytes as sums of pairs of 16 bits, which are widened in the end.
#pragma once

#include <algorithm>
#include <bit>

#include "group_weights.h"

namespace precast {
namespace {

inline __m256i load_inputs(const int8_t* x) { return _mm256_set1_epi32(load4(x)); }

inline __m256i add_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Sums stay in registers only if GCC 12 neither puts off their additions nor repeats an input's
// broadcast for each vector of a panel: left alone it did both, and kept a group's inputs and products
// on the stack. Four bits at 16 rows of 576 to 1536, one core: 129 billion operations a second, 208 so.
inline void settle(__m256i& sum) { asm volatile("" : "+x"(sum)); }

// The largest value, without its offset if it has one.
constexpr int most_of(Format f) {
  if (weight_offset(f) != 0) return weight_offset(f);
  return block_of(f).bits == 5 ? 31 : 15;
}

// Steps whose sums of pairs fit 16 bits, as 8 * 2 * 15 * 127 < 32768. With an offset they needn't on the way: they
// begin at what it adds to them (pairs_start) and wrap around.
template <Format F>
constexpr int kRun = std::bit_floor(std::min<unsigned>(kSteps / parts_of(F), 32767 / (2 * 127 * most_of(F))));

template <Format F, int MR, bool Unpacked>
inline void add_run(const uint8_t* w, int first, const int8_t* x, __m256i (&sums)[MR][kVectors]) {
#pragma GCC unroll 8
  for (int s = first; s < first + kRun<F>; ++s) {
    __m256i weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = (__m256i)weights_of<F, Unpacked>(w, s, v);
    for (int r = 0; r < MR; ++r) {
      const __m256i four = load_inputs(x + r * kGroup + s * 4);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm256_add_epi16(sums[r][v], _mm256_maddubs_epi16(weights[v], four));
        settle(sums[r][v]);
      }
    }
  }
}

// Calls use(row, vector, sums) for each run of a part, of which with an offset there is one.
template <Format F, int MR, bool Unpacked, typename Use>
inline void pair_sums_of(const uint8_t* w, const int8_t* x, Starts starts, int part, Use&& use) {
  constexpr int kOwn = kSteps / parts_of(F);
  static_assert(weight_offset(F) == 0 || kRun<F> == kOwn);
#pragma GCC unroll 4
  for (int first = 0; first < kOwn; first += kRun<F>) {
    __m256i sums[MR][kVectors];
    clear(sums);
    for (int r = 0; r < MR && weight_offset(F) != 0; ++r) {
      const __m256i start = _mm256_set1_epi32(starts.first[r + part * starts.to_second]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = start;
    }
    add_run<F, MR, Unpacked>(w, part * kOwn + first, x, sums);
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < kVectors; ++v) use(r, v, sums[r][v]);
    }
  }
}

template <Format F, int MR, bool Unpacked, typename Use>
inline void group_dots_of_few_bits(const uint8_t* w, const int8_t* x, Starts starts, Use&& use) {
  constexpr int kParts = parts_of(F);
  constexpr bool kOneRun = kRun<F> == kSteps / kParts;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    __m256i dots[MR][kVectors];
    if constexpr (!kOneRun) clear(dots);
    pair_sums_of<F, MR, Unpacked>(w, x, starts, part, [&](int r, int v, __m256i sums) {
      const __m256i widened = add_pairs(sums);
      dots[r][v] = kOneRun ? widened : _mm256_add_epi32(dots[r][v], widened);
    });
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)dots[r][v], part);
    }
  }
}

template <Format F, int MR, typename Use>
inline void group_dots_of_pairs(const uint8_t* w, const int8_t* x, const int32_t* scales, Starts starts, Use&& use) {
  __m256i dots[MR][kVectors];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    pair_sums_of<F, MR, true>(w, x, starts, half, [&](int r, int v, __m256i sums) {
      const __m256i weighed = _mm256_madd_epi16(sums, load_as<__m256i>(scales + half * kPanel + v * kLanes));
      dots[r][v] = half == 0 ? weighed : _mm256_add_epi32(dots[r][v], weighed);
    });
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)dots[r][v], 0);
  }
}

template <int MR, typename Use>
inline void group_dots_of_wide(const uint8_t* w, const int16_t* x, Use&& use) {
  __m256i dots[MR][kVectors];
  clear(dots);
#pragma GCC unroll 16
  for (int s = 0; s < kGroup / 2; ++s) {
    __m256i weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load_as<__m256i>(w + s * kStepBytes + v * 32);
    for (int r = 0; r < MR; ++r) {
      const __m256i two = _mm256_set1_epi32(load_as<int32_t>(x + r * kGroup + s * 2));
      for (int v = 0; v < kVectors; ++v) {
        dots[r][v] = _mm256_add_epi32(dots[r][v], _mm256_madd_epi16(weights[v], two));
        settle(dots[r][v]);
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)dots[r][v], 0);
  }
}

// |x| is at most 127 and |w| at most 128, which some checkpoints' own weights have: as a byte without
// sign it is what it should be, and the 16-bit sums of pairs (127 * 128 * 2 < 32768) can't saturate.
template <Format F, int MR, bool Unpacked, typename Use>
inline void group_dots_of_bytes(const uint8_t* w, int steps, const int8_t* x, Use&& use) {
  __m256i dots[MR][kVectors];
  clear(dots);
  // The sign moves to the other factor: of one row, whose input is for all columns, that of the input. Not where a
  // weight may be -128, which has no counterpart.
  constexpr bool kSizesOfInputs = MR == 1 && has_curve(F);
  const auto step = [&](int s) {
    __m256i weights[kVectors], sizes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = (__m256i)weights_of<F, Unpacked>(w, s, v);
      if constexpr (!kSizesOfInputs) sizes[v] = _mm256_abs_epi8(weights[v]);
    }
    for (int r = 0; r < MR; ++r) {
      const __m256i four = load_inputs(x + r * kGroup + s * 4), size = _mm256_abs_epi8(four);
      for (int v = 0; v < kVectors; ++v) {
        const __m256i pairs = kSizesOfInputs ? _mm256_maddubs_epi16(size, _mm256_sign_epi8(weights[v], four))
                                             : _mm256_maddubs_epi16(sizes[v], _mm256_sign_epi8(four, weights[v]));
        dots[r][v] = _mm256_add_epi32(dots[r][v], add_pairs(pairs));
        settle(dots[r][v]);
      }
    }
  };
  if (F != Format::kInt8 || steps == kSteps) {
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) step(s);
  } else {
    for (int s = 0; s < steps; ++s) step(s);
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)dots[r][v], 0);
  }
}

template <Format F, int MR, int NP, bool Unpacked = false, typename Use>
inline void group_dots(const uint8_t* w, int64_t, int steps, const int8_t* x, [[maybe_unused]] Starts starts,
                       Use&& use) {
  static_assert(NP == 1);
  if constexpr (block_of(F).bits < 8 && F != Format::kInt8 && !has_curve(F)) {
    group_dots_of_few_bits<F, MR, Unpacked>(w, x, starts, use);
  } else {
    group_dots_of_bytes<F, MR, Unpacked>(w, steps, x, use);  // these weights have no offset here
  }
}

}  // namespace
}  // namespace precast
