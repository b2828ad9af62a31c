// group_dots of AVX2: products of bytes as sums of pairs of 16 bits, which are widened in the end.
#pragma once

#include "group_weights.h"

namespace precast {
namespace {

inline __m256i load_inputs(const int8_t* x) { return _mm256_set1_epi32(load4(x)); }

inline __m256i add_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Sums stay in registers only if GCC 12 neither puts off their additions nor repeats an input's
// broadcast for each vector of a panel: left alone it did both, and kept a group's inputs and products
// on the stack. Four bits at 16 rows of 576 to 1536, one core: 129 billion operations a second, 208 so.
inline void settle(__m256i& sum) { asm volatile("" : "+x"(sum)); }

// The largest value without a sign.
constexpr int most_of(Format f) {
  return f == Format::kMXFP4 ? 24 : block_of(f).bits == 6 ? 63 : block_of(f).bits == 5 ? 31 : 15;
}

template <Format F, int MR, bool Unpacked, typename Use>
inline void group_dots_of_few_bits(const uint8_t* w, const int8_t* x, Starts starts, Use&& use) {
  constexpr int kParts = parts_of(F), kOwn = kSteps / kParts;
  // Sums of pairs that fit 16 bits: 8 * 2 * 15 * 127 < 32768.
  constexpr int kFit = 32767 / (2 * 127 * most_of(F)), kRun = kFit >= 8 ? 8 : kFit >= 4 ? 4 : 2;
  static_assert(kFit >= 2 && kRun <= kOwn);
  const auto run = [&](int first, __m256i (&sums)[MR][kVectors]) {
    clear(sums);
#pragma GCC unroll 8
    for (int s = first; s < first + kRun; ++s) {
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
  };
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    __m256i sums[MR][kVectors], dots[MR][kVectors];
#pragma GCC unroll 4
    for (int first = 0; first < kOwn; first += kRun) {
      run(part * kOwn + first, sums);
      for (int r = 0; r < MR; ++r) {
        const __m256i start = _mm256_set1_epi32(starts.first[r + part * starts.to_second]);
        for (int v = 0; v < kVectors; ++v) {
          dots[r][v] = _mm256_add_epi32(first == 0 ? start : dots[r][v], add_pairs(sums[r][v]));
        }
      }
    }
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)dots[r][v], part);
    }
  }
}

template <int MR, typename Use>
inline void group_dots_of_pairs(const uint8_t* w, const int8_t* x, const int32_t* scales, const int32_t* halves,
                                int64_t to_second, Use&& use) {
  __m256i dots[MR][kVectors];
  for (int r = 0; r < MR; ++r) {
    const __m256i sums = _mm256_set1_epi32((halves[r] & 0xffff) | halves[to_second + r] << 16);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i both = load_as<__m256i>(scales + 2 * kPanel + v * kLanes);
      dots[r][v] = _mm256_madd_epi16(both, sums);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; s += 2) {
    __m256i weights[2][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < 2; ++i) weights[i][v] = load_as<__m256i>(w + (s + i) * kStepBytes + v * 32);
    }
    for (int r = 0; r < MR; ++r) {
      const __m256i a = load_inputs(x + r * kGroup + s * 4), b = load_inputs(x + r * kGroup + s * 4 + 4);
      for (int v = 0; v < kVectors; ++v) {
        const __m256i first = _mm256_maddubs_epi16(weights[0][v], a), second = _mm256_maddubs_epi16(weights[1][v], b);
        const __m256i own = load_as<__m256i>(scales + s / (kSteps / 2) * kPanel + v * kLanes);
        dots[r][v] = _mm256_add_epi32(dots[r][v], _mm256_madd_epi16(_mm256_add_epi16(first, second), own));
        settle(dots[r][v]);
      }
    }
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
  const auto step = [&](int s) {
    __m256i weights[kVectors], sizes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = (__m256i)weights_of<F, Unpacked>(w, s, v);
      sizes[v] = _mm256_abs_epi8(weights[v]);
    }
    for (int r = 0; r < MR; ++r) {
      const __m256i four = load_inputs(x + r * kGroup + s * 4);
      for (int v = 0; v < kVectors; ++v) {
        const __m256i pairs = _mm256_maddubs_epi16(sizes[v], _mm256_sign_epi8(four, weights[v]));
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
