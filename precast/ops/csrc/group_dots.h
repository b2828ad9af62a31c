// Integer dot products of a group of inputs with a panel's columns.
#pragma once

#include "quantize.h"
#include "unpack.h"

namespace precast {
namespace {

inline int32_t load4(const int8_t* x) { return load_as<int32_t>(x); }

// group_dots calls use(row, panel, vector, dots) for MR rows, each 32 inputs at x + 32 row, and each
// vector of the columns of NP panels, `stride` bytes apart. Weights are those of `steps` times four
// inputs: 8, and less in kInt8's last group. A row's dots begin at its entry of `starts`, which takes
// back the weights' offset.

#if defined(__AVX512VNNI__)
template <Format F>
inline __m512i load_weights(const uint8_t* w, int step) {
  if constexpr (F == Format::kQ4_0 || F == Format::kQ4_1) {
    const __m512i both = _mm512_loadu_si512(w + step % 4 * kStepBytes);
    return _mm512_and_si512(step < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
  } else {
    return _mm512_xor_si512(_mm512_loadu_si512(w + step * kStepBytes), _mm512_set1_epi8(-128));
  }
}

template <Format F, int MR, int NP, typename Use>
inline void group_dots(const uint8_t* w, int64_t stride, int steps, const int8_t* x,
                       const int32_t* starts, Use&& use) {
  constexpr int U = MR * NP < 4 ? 2 : 1;  // few sums: the instruction takes several cycles
  __m512i dots[U][MR][NP] = {};
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) dots[0][r][p] = _mm512_set1_epi32(starts[r]);
  }
  const auto step = [&](int s) {
    __m512i weights[NP];
    for (int p = 0; p < NP; ++p) weights[p] = load_weights<F>(w + p * stride, s);
    for (int r = 0; r < MR; ++r) {
      const __m512i inputs = _mm512_set1_epi32(load4(x + r * kGroup + s * 4));
      for (int p = 0; p < NP; ++p) {
        __m512i& sum = dots[s % U][r][p];
        sum = _mm512_dpbusd_epi32(sum, weights[p], inputs);
      }
    }
  };
  if (F != Format::kInt8 || steps == kGroup / 4) {
#pragma GCC unroll 8
    for (int s = 0; s < kGroup / 4; ++s) step(s);
  } else {
    for (int s = 0; s < steps; ++s) step(s);
  }
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      if constexpr (U == 2) dots[0][r][p] = _mm512_add_epi32(dots[0][r][p], dots[1][r][p]);
      use(r, p, 0, (vint)dots[0][r][p]);
    }
  }
}
#else
#if defined(__AVX2__)
inline __m256i load_inputs(const int8_t* x) { return _mm256_set1_epi32(load4(x)); }

inline __m256i add_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Sums stay in registers only if GCC 12 neither puts off their additions nor repeats an input's
// broadcast for each vector of a panel: left alone it did both, and kept a group's inputs and products
// on the stack. Four bits at 16 rows of 576 to 1536, one core: 129 billion operations a second, 208 so.
inline void settle(__m256i& sum) { asm volatile("" : "+x"(sum)); }

template <int MR, typename Use>
inline void group_dots_of_halves(const uint8_t* w, const int8_t* x, const int32_t* starts,
                                 Use&& use) {
  const __m256i mask = _mm256_set1_epi8(15);
  // Eight sums of pairs fit 16 bits: 8 * 2 * 15 * 127 < 32768.
  __m256i sums[MR][kVectors];
  clear(sums);
  const auto add = [&](const __m256i* weights, const int8_t* inputs) {
    for (int r = 0; r < MR; ++r) {
      const __m256i four = load_inputs(inputs + r * kGroup);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm256_add_epi16(sums[r][v], _mm256_maddubs_epi16(weights[v], four));
        settle(sums[r][v]);
      }
    }
  };
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    __m256i both[kVectors], half[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      both[v] = load_as<__m256i>(w + s * kStepBytes + v * 32);
      half[v] = _mm256_and_si256(both[v], mask);
    }
    add(half, x + s * 4);
    for (int v = 0; v < kVectors; ++v) {
      half[v] = _mm256_and_si256(_mm256_srli_epi16(both[v], 4), mask);
    }
    add(half, x + s * 4 + 16);
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)add_pairs(sums[r][v]) + starts[r]);
  }
}

// |x| is at most 127 and |w| at most 128, which some checkpoints' own weights have: as a byte without
// sign it is what it should be, and the 16-bit sums of pairs (127 * 128 * 2 < 32768) can't saturate.
template <int MR, typename Use>
inline void group_dots_of_bytes(const uint8_t* w, int steps, const int8_t* x, Use&& use) {
  __m256i dots[MR][kVectors];
  clear(dots);
  const auto step = [&](int s) {
    __m256i weights[kVectors], sizes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = load_as<__m256i>(w + s * kStepBytes + v * 32);
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
  if (steps == kGroup / 4) {
#pragma GCC unroll 8
    for (int s = 0; s < kGroup / 4; ++s) step(s);
  } else {
    for (int s = 0; s < steps; ++s) step(s);
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) use(r, 0, v, (vint)dots[r][v]);
  }
}
#else
// acc[c] += sum over j < 4 of x[j] * w[4 c + j].
inline vint dot4(vint acc, vint w, const int8_t* x) {
  int8_t bytes[kLanes * 4];
  std::memcpy(bytes, &w, sizeof(bytes));
  for (int c = 0; c < kLanes; ++c) {
    for (int j = 0; j < 4; ++j) acc[c] += static_cast<int32_t>(x[j]) * bytes[c * 4 + j];
  }
  return acc;
}

template <int MR, typename Use>
inline void group_dots_of_bytes(const uint8_t* w, int steps, const int8_t* x, Use&& use) {
  vint dots[MR][kVectors] = {};
  for (int s = 0; s < steps; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      const vint weights = load_as<vint>(w + s * kStepBytes + v * kLanes * 4);
      for (int r = 0; r < MR; ++r) {
        dots[r][v] = dot4(dots[r][v], weights, x + r * kGroup + s * 4);
      }
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) use(r, 0, v, dots[r][v]);
  }
}

template <int MR, typename Use>
inline void group_dots_of_halves(const uint8_t* w, const int8_t* x, const int32_t* starts,
                                 Use&& use) {
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      vint dots = vint{} + starts[r];
      for (int c = 0; c < kLanes; ++c) {
        for (int i = 0; i < 16; ++i) {
          const uint8_t both = w[i / 4 * kStepBytes + (v * kLanes + c) * 4 + i % 4];
          dots[c] += x[r * kGroup + i] * (both & 15) + x[r * kGroup + i + 16] * (both >> 4);
        }
      }
      use(r, 0, v, dots);
    }
  }
}
#endif

template <Format F, int MR, int NP, typename Use>
inline void group_dots(const uint8_t* w, int64_t, int steps, const int8_t* x,
                       const int32_t* starts, Use&& use) {
  static_assert(NP == 1);
  if constexpr (F == Format::kQ4_0 || F == Format::kQ4_1) {
    group_dots_of_halves<MR>(w, x, starts, use);
  } else {
    group_dots_of_bytes<MR>(w, steps, x, use);  // these weights have no offset here
  }
}
#endif

}  // namespace
}  // namespace precast
