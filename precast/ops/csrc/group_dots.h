// Integer dot products of a group of inputs with a panel's columns.
#pragma once

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "quantize.h"

namespace precast {
namespace {

inline int32_t load4(const int8_t* x) { return load_as<int32_t>(x); }

// Rows of a group, four inputs each; parts of it that have scales of their own, and rows of these.
constexpr int kSteps = kGroup / 4;
constexpr int parts_of(Format f) { return has_halves(f) ? 2 : 1; }

// Where a row's sums begin, to take back the weights' offset: part p's start is that of its first one,
// `to_second` p further.
struct Starts {
  const int32_t* first;
  int64_t to_second;
};

// Whether weights that are unpacked once have 16 bits each. With AVX2, bytes with signs take four instructions for
// 32 products: one moves the weight's sign to the input, one multiplies, two widen the sums and add them. Products
// of 16 bits take four too. But of the former, three have only two of an Intel core's three ports; of these, two.
constexpr bool is_wide([[maybe_unused]] Format f) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  return f == Format::kInt8 || block_of(f).bits == 8 || has_curve(f);
#else
  return false;
#endif
}

// Whether halves' scales are multiplied with sums of 16 bits, in the place of ones that only widen these.
constexpr bool weighs_pairs([[maybe_unused]] Format f) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  return has_halves(f);
#else
  return false;
#endif
}

// As group_dots, of unpacked weights of such a format: whole groups' sums times their scales. `scales`: three rows
// of pairs of 16 bits, the first half's scales twice, the second's twice, and both times -32. `halves`: sums of
// inputs, of a group's second half `to_second` further.
template <int MR, typename Use>
inline void group_dots_of_pairs(const uint8_t* w, const int8_t* x, const int32_t* scales, const int32_t* halves,
                                int64_t to_second, Use&& use);

// group_dots of such weights, as put_weights has them, with inputs as widen_inputs has them.
template <int MR, typename Use>
inline void group_dots_of_wide(const uint8_t* w, const int16_t* x, Use&& use);

// Writes what load_weights gave into a group of unpacked weights. Wide ones: rows of 64 bytes, [16 columns][2
// inputs], the first and third of each four inputs; behind all of those the second and fourth.
template <Format F, typename V>
inline void put_weights(uint8_t* group, int step, int v, V four) {
  uint8_t* to = group + step * kStepBytes + v * kLanes * 4;
  if constexpr (is_wide(F)) {
    typedef int16_t Pairs __attribute__((vector_size(kLanes * 4)));
    const Pairs pairs = (Pairs)four, even = (pairs << 8) >> 8, odd = pairs >> 8;
    std::memcpy(to, &even, sizeof(even));
    std::memcpy(to + kSteps * kStepBytes, &odd, sizeof(odd));
  } else {
    std::memcpy(to, &four, sizeof(four));
  }
}

// group_dots calls use(row, panel, vector, dots, part) for MR rows, each 32 inputs at x + 32 row, each vector
// of the columns of NP panels, `stride` bytes apart, and each part of the group, the first one first. Weights
// are those of `steps` times four inputs: 8, and less in kInt8's last group. `Unpacked`: they are bytes, as
// load_weights gives them.

#if defined(__AVX512VNNI__)
// Bits of bytes moved by `by`, to the left if it is positive; callers mask what comes from their neighbours.
inline __m512i moved(__m512i x, int by) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  return by >= 0 ? (__m512i)((Halves)x << by) : (__m512i)((Halves)x >> -by);
}

template <Format F>
inline __m512i table_of() {
  alignas(16) int8_t values[16];
  for (int i = 0; i < 16; ++i) values[i] = has_curve(F) ? kCurve[i] + 128 : kFloat4[i] + 12;
  return _mm512_broadcast_i32x4(load_as<__m128i>(values));
}

// Values without a sign: weight_offset(F) too much.
template <Format F>
inline __m512i load_weights(const uint8_t* w, int step, int = 0) {
  constexpr int kBits = F == Format::kInt8 ? 8 : block_of(F).bits;
  if constexpr (kBits == 8) {
    return _mm512_xor_si512(_mm512_loadu_si512(w + step * kStepBytes), _mm512_set1_epi8(-128));
  }
  const __m512i both = _mm512_loadu_si512(w + step % 4 * kStepBytes);
  const __m512i low = _mm512_and_si512(step < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
  const uint8_t* high = w + 4 * kStepBytes;
  if constexpr (kBits == 5) {
    const __m512i bits = moved(_mm512_loadu_si512(high), 4 - step);
    return _mm512_or_si512(low, _mm512_and_si512(bits, _mm512_set1_epi8(16)));
  }
  if constexpr (kBits == 6) {
    const __m512i bits = moved(_mm512_loadu_si512(high + step / 4 * kStepBytes), 4 - step % 4 * 2);
    return _mm512_or_si512(low, _mm512_and_si512(bits, _mm512_set1_epi8(48)));
  }
  if constexpr (has_curve(F) || F == Format::kMXFP4) return _mm512_shuffle_epi8(table_of<F>(), low);
  return low;
}

template <Format F, bool Unpacked>
inline __m512i weights_of(const uint8_t* w, int step, int) {
  return Unpacked ? _mm512_load_si512(w + step * kStepBytes) : load_weights<F>(w, step);
}

template <Format F, int MR, int NP, bool Unpacked = false, typename Use>
inline void group_dots(const uint8_t* w, int64_t stride, int steps, const int8_t* x, Starts starts, Use&& use) {
  constexpr int U = MR * NP < 4 ? 2 : 1;  // few sums: the instruction takes several cycles
  constexpr int kParts = parts_of(F), kOwn = kSteps / kParts;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    __m512i dots[U][MR][NP] = {};
    for (int r = 0; r < MR; ++r) {
      for (int p = 0; p < NP; ++p) dots[0][r][p] = _mm512_set1_epi32(starts.first[r + part * starts.to_second]);
    }
    const auto step = [&](int s) {
      __m512i weights[NP];
      for (int p = 0; p < NP; ++p) weights[p] = weights_of<F, Unpacked>(w + p * stride, s, 0);
      for (int r = 0; r < MR; ++r) {
        const __m512i inputs = _mm512_set1_epi32(load4(x + r * kGroup + s * 4));
        for (int p = 0; p < NP; ++p) {
          __m512i& sum = dots[s % U][r][p];
          sum = _mm512_dpbusd_epi32(sum, weights[p], inputs);
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
        if constexpr (U == 2) dots[0][r][p] = _mm512_add_epi32(dots[0][r][p], dots[1][r][p]);
        use(r, p, 0, (vint)dots[0][r][p], part);
      }
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

// As above.
inline __m256i moved(__m256i x, int by) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  return by >= 0 ? (__m256i)((Halves)x << by) : (__m256i)((Halves)x >> -by);
}

template <Format F>
inline __m256i table_of() {
  alignas(16) int8_t values[16];
  for (int i = 0; i < 16; ++i) values[i] = has_curve(F) ? kCurve[i] : kFloat4[i] + 12;
  return _mm256_broadcastsi128_si256(load_as<__m128i>(values));
}

// Values of half a row; weight_offset(F) too much.
template <Format F>
inline __m256i load_weights(const uint8_t* w, int step, int v) {
  constexpr int kBits = F == Format::kInt8 ? 8 : block_of(F).bits;
  w += v * 32;
  if constexpr (kBits == 8) return load_as<__m256i>(w + step * kStepBytes);
  const __m256i both = load_as<__m256i>(w + step % 4 * kStepBytes);
  const __m256i low = _mm256_and_si256(step < 4 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
  const uint8_t* high = w + 4 * kStepBytes;
  if constexpr (kBits == 5) {
    const __m256i bits = moved(load_as<__m256i>(high), 4 - step);
    return _mm256_or_si256(low, _mm256_and_si256(bits, _mm256_set1_epi8(16)));
  }
  if constexpr (kBits == 6) {
    const __m256i bits = moved(load_as<__m256i>(high + step / 4 * kStepBytes), 4 - step % 4 * 2);
    return _mm256_or_si256(low, _mm256_and_si256(bits, _mm256_set1_epi8(48)));
  }
  if constexpr (has_curve(F) || F == Format::kMXFP4) return _mm256_shuffle_epi8(table_of<F>(), low);
  return low;
}

template <Format F, bool Unpacked>
inline __m256i weights_of(const uint8_t* w, int step, int v) {
  return Unpacked ? load_as<__m256i>(w + step * kStepBytes + v * 32) : load_weights<F>(w, step, v);
}

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
      for (int v = 0; v < kVectors; ++v) weights[v] = weights_of<F, Unpacked>(w, s, v);
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
      weights[v] = weights_of<F, Unpacked>(w, s, v);
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

// The bytes of a vector of a row, without an offset.
template <Format F>
inline vint load_weights(const uint8_t* w, int step, int v) {
  if constexpr (F == Format::kInt8 || block_of(F).bits == 8) {
    return load_as<vint>(w + step * kStepBytes + v * kLanes * 4);
  } else {
    int8_t bytes[kLanes * 4];
    for (int i = 0; i < kLanes * 4; ++i) {
      bytes[i] = static_cast<int8_t>(value_of<F>(w, v * kLanes + i / 4, step * 4 + i % 4));
    }
    return load_as<vint>(bytes);
  }
}

template <Format F, bool Unpacked>
inline vint weights_of(const uint8_t* w, int step, int v) {
  return Unpacked ? load_as<vint>(w + step * kStepBytes + v * kLanes * 4) : load_weights<F>(w, step, v);
}

template <Format F, int MR, bool Unpacked, typename Use>
inline void group_dots_of_bytes(const uint8_t* w, int steps, const int8_t* x, Use&& use) {
  constexpr int kParts = parts_of(F), kOwn = kSteps / kParts;
  for (int part = 0; part < kParts; ++part) {
    vint dots[MR][kVectors] = {};
    for (int s = part * kOwn; s < std::min(steps, (part + 1) * kOwn); ++s) {
      for (int v = 0; v < kVectors; ++v) {
        const vint weights = weights_of<F, Unpacked>(w, s, v);
        for (int r = 0; r < MR; ++r) dots[r][v] = dot4(dots[r][v], weights, x + r * kGroup + s * 4);
      }
    }
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < kVectors; ++v) use(r, 0, v, dots[r][v], part);
    }
  }
}
#endif

template <Format F, int MR, int NP, bool Unpacked = false, typename Use>
inline void group_dots(const uint8_t* w, int64_t, int steps, const int8_t* x, [[maybe_unused]] Starts starts,
                       Use&& use) {
  static_assert(NP == 1);
#if defined(__AVX2__)
  if constexpr (block_of(F).bits < 8 && F != Format::kInt8 && !has_curve(F)) {
    return group_dots_of_few_bits<F, MR, Unpacked>(w, x, starts, use);
  }
#endif
  group_dots_of_bytes<F, MR, Unpacked>(w, steps, x, use);  // these weights have no offset here
}
#endif

}  // namespace
}  // namespace precast
