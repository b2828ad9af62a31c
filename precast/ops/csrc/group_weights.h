// A group's weights as its dot products take them: four inputs of each of a vector's columns.
#pragma once

#include <type_traits>

#include "blocks.h"
#include "quantize.h"

namespace precast {
namespace {

inline int32_t load4(const int8_t* x) { return load_as<int32_t>(x); }

// Rows of a group, four inputs each; parts of it that have scales of their own.
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
constexpr bool is_wide(Format f) {
  return kAvx2Dots && (f == Format::kInt8 || block_of(f).bits == 8 || has_curve(f));
}

// Whether halves' scales are multiplied with sums of 16 bits, in the place of ones that only widen these.
constexpr bool weighs_pairs(Format f) { return kAvx2Dots && has_halves(f); }

#if defined(__AVX2__)
typedef uint8_t BytesOfWeights __attribute__((vector_size(kLanes * 4)));
typedef uint16_t PairsOfWeights __attribute__((vector_size(kLanes * 4)));

// Bits of bytes moved by `by`, to the left if it is positive; callers mask what comes from their neighbours.
inline BytesOfWeights moved(BytesOfWeights x, int by) {
  return (BytesOfWeights)(by >= 0 ? (PairsOfWeights)x << by : (PairsOfWeights)x >> -by);
}

template <Format F>
inline vint look_up(BytesOfWeights at) {
  alignas(16) int8_t values[16];
  for (int i = 0; i < 16; ++i) values[i] = has_curve(F) ? kCurve[i] + kOffset : kFloat4[i] + 12;
  const __m128i table = load_as<__m128i>(values);
#if defined(__AVX512F__)
  return (vint)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)at);
#else
  return (vint)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)at);
#endif
}

// weight_offset(F) too much.
template <Format F>
inline vint load_weights(const uint8_t* w, int step, int v) {
  constexpr int kBits = F == Format::kInt8 ? 8 : block_of(F).bits;
  w += v * kLanes * 4;
  if constexpr (kBits == 8) return (vint)(load_as<BytesOfWeights>(w + step * kStepBytes) ^ static_cast<uint8_t>(kOffset));
  const auto both = load_as<BytesOfWeights>(w + step % 4 * kStepBytes);
  const BytesOfWeights low = (step < 4 ? both : moved(both, -4)) & 15;
  const uint8_t* high = w + 4 * kStepBytes;
  if constexpr (kBits == 5) return (vint)(low | (moved(load_as<BytesOfWeights>(high), 4 - step) & 16));
  if constexpr (kBits == 6) {
    const auto bits = load_as<BytesOfWeights>(high + step / 4 * kStepBytes);
    return (vint)(low | (moved(bits, 4 - step % 4 * 2) & 48));
  }
  if constexpr (has_curve(F) || F == Format::kMXFP4) return look_up<F>(low);
  return (vint)low;
}
#else
// Without an offset.
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
#endif

// Writes what load_weights gave into a group of unpacked weights. Wide ones: rows of 64 bytes, [16 columns][2
// inputs], the first and third of each four inputs; behind all of those the second and fourth.
template <Format F>
inline void put_weights(uint8_t* group, int step, int v, vint four) {
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

// `Unpacked`: they are bytes, as load_weights gives them.
template <Format F, bool Unpacked>
inline vint weights_of(const uint8_t* w, int step, int v) {
  return Unpacked ? load_as<vint>(w + step * kStepBytes + v * kLanes * 4) : load_weights<F>(w, step, v);
}

}  // namespace
}  // namespace precast
