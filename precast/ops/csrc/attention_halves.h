// The sums that attention_amx.h has of AMX, to the bit, of a few rows without it: matrices of which most rows
// would be empty take longer than the multiply-adds, and the cache is read as it is.
//
// The instruction sums 32 products: those of even places and those of odd ones, in order and rounded once
// each, are added, and then to what was there. Numbers too small for a normal float are zeros to it, so they
// have to be for all of attention's functions (FlushDenormals).
#pragma once

#if defined(__AMX_BF16__)

#include "attention_amx.h"

namespace precast {
namespace {

class FlushDenormals {
 public:
  explicit FlushDenormals(bool flush) : before_(_mm_getcsr()) {
    if (flush) _mm_setcsr(before_ | 0x8040);
  }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  const unsigned before_;
};

constexpr int kHalvesRows = 6;

// Vectors at once: four sums of each are under way.
constexpr int halves_vectors(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// Adds products [first, last) of one depth of matrices to sums. left(k, rest, r): a row's half;
// right(k, v): a vector.
template <int MR, int NV, typename Left, typename Right>
[[gnu::always_inline]] inline void add_depth(int first, int last, Left&& left, Right&& right,
                                             vfloat (&sums)[MR][NV]) {
  vfloat parts[2][2][MR][NV];  // of upper halves and rests, of even places and odd ones
  clear(parts);
  const auto add = [&](auto odd, int k) {
    vfloat value[NV];
    for (int v = 0; v < NV; ++v) value[v] = right(k, v);
    for (int rest = 0; rest < 2; ++rest) {
      for (int r = 0; r < MR; ++r) {
        const vfloat factor = splat(left(k, rest, r));
        for (int v = 0; v < NV; ++v) {
          vfloat& part = parts[rest][odd][r][v];
          part = multiply_add(value[v], factor, part);
        }
      }
    }
  };
  constexpr std::integral_constant<int, 0> even{};
  constexpr std::integral_constant<int, 1> odd{};
  int k = first;
  for (; k + 1 < last; k += 2) {
    add(even, k);
    add(odd, k + 1);
  }
  if (k < last) add(even, k);
  for (int rest = 0; rest < 2; ++rest) {
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < NV; ++v) sums[r][v] += parts[rest][0][r][v] + parts[rest][1][r][v];
    }
  }
}

// q: [dim][2][MR].
template <int MR, typename T>
inline void score_halves(const float* q, const KeyBlock<T>& block, Seen tile, int dim, float* scores) {
  constexpr int NV = halves_vectors(MR);
  for (int p = tile.low / kPanel / NV * NV; p * kPanel < tile.high; p += NV) {
    vfloat sums[MR][NV];
    clear(sums);
    for (int d = 0; d < dim; d += kMatrixDepth) {
      add_depth<MR, NV>(
          0, kMatrixDepth,
          [&](int k, int rest, int r) { return q[((d + k) * 2 + rest) * MR + r]; },
          [&](int k, int v) [[gnu::always_inline]] {
            const int64_t at = static_cast<int64_t>(d + k) * block.key_stride;
            soon(block.next_keys[p + v] + at);
            return load(block.keys[p + v] + at);
          },
          sums);
    }
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < NV; ++v) store(scores + r * kKeyBlock + (p + v) * kPanel, sums[r][v]);
    }
  }
}

// weights: [2][MR][kKeyBlock].
template <int MR, typename T>
inline void add_halves(const float* weights, const KeyBlock<T>& block, Seen tile, int width,
                       const Factors& factors, float* out) {
  constexpr int NV = halves_vectors(MR) < 2 ? 1 : 2;
  for (int f = 0; f < width; f += NV * kLanes) {
    vfloat sums[MR][NV];
    clear(sums);
    for (int start = 0; start < kKeyBlock; start += kMatrixDepth) {
      const int low = tile.low / 2 * 2 - start, high = tile.high - start;
      add_depth<MR, NV>(
          low < 0 ? 0 : low, high > kMatrixDepth ? kMatrixDepth : high,
          [&](int k, int rest, int r) { return weights[(rest * MR + r) * kKeyBlock + start + k]; },
          [&](int k, int v) [[gnu::always_inline]] {
            const int j = start + k;
            const int64_t at = j % kPanel * block.value_stride + f + v * kLanes;
            if (v == 0) soon(block.next_values[j / kPanel] + at);
            return load(block.values[j / kPanel] + at);
          },
          sums);
    }
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < NV; ++v) {
        float* y = out + r * width + f + v * kLanes;
        store(y, folded(load(y), factors.before[r], sums[r][v], factors.block[r]));
      }
    }
  }
}

inline vfloat widened(const Half* halves) {
  return load(reinterpret_cast<const BFloat16*>(halves));
}

// From halves as matrices have them. `to`: [2][rows][kKeyBlock].
inline void widen_weights(Halves from, int rows, float* to) {
  for (int i = 0; i < rows * kKeyBlock; i += kLanes) {
    store(to + i, widened(from.upper + i));
    store(to + rows * kKeyBlock + i, widened(from.rest + i));
  }
}

inline void widen_queries(Halves from, int rows, int dim, float* to) {
  for (int r = 0; r < rows; ++r) {
    for (int d = 0; d < dim; ++d) {
      to[(d * 2 + 0) * rows + r] = to_float(BFloat16{from.upper[r * dim + d]});
      to[(d * 2 + 1) * rows + r] = to_float(BFloat16{from.rest[r * dim + d]});
    }
  }
}

// As attend_matrices. `wide`: room for weights as floats.
template <int MR, typename T>
inline void attend_halves(const float* q, const KeyBlock<T>& block, const Weighing& weighing,
                          const Seen* seen, int dim, float* scores, Halves weights, float* wide,
                          const State& state) {
  const auto [tile, all] = seen_by_any(MR, seen);
  if (tile.low >= tile.high) return;
  score_halves<MR>(q, block, tile, dim, scores);
  BlockSums sums;
  soften(weighing, MR, tile, seen, all, scores, sums);
  Factors factors;
  fold_sums(state, MR, load(sums.maxima), sums.totals, factors);
  split_weights(MR, tile, scores, weights);
  widen_weights(weights, MR, wide);
  add_halves<MR>(wide, block, tile, dim, factors, state.out);
}

}  // namespace
}  // namespace precast

#endif
