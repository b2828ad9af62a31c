// Attention of a few rows to one block of kKeyBlock keys of 8 bits, in products of integers.
//
// A query is rounded to steps of 16 bits, relative to its largest feature; a row's weights, times their
// values' scales, are so within each block. Sums of integers are exact: a row has the same bits whatever
// reads the cache, and in which order. What is rounded besides is 200 times less than the cache's own steps.
#pragma once

#include "attention_blocks.h"
#include "pairs.h"

namespace precast {
namespace {

// Steps to the largest value: such that their upper and lower bytes, each with a sign, are bytes.
constexpr float kMostSteps = 127 * 256 + 127;
constexpr int kKeyPairs = kKeyBlock / 2;

// For queries: a sum of so many products of them with bytes stays within 32 bits.
inline float most_steps(int dim) { return dim <= 512 ? kMostSteps : std::floor(kMostSteps * 512 / dim); }
inline int feature_pairs(int dim) { return (dim + 1) / 2; }

// A register tile's queries [feature_pairs][MR] and the size of each row's steps.
struct IntegerQueries {
  const int32_t* pairs;
  const float* steps;
};

// A block in pairs: keys [feature_pairs][kKeyBlock], values [kKeyPairs][width].
struct PairBlock {
  const int32_t *keys, *values;
};

// The whole panels that the keys lie in.
inline Seen whole_panels(Seen keys) {
  return {keys.low / kPanel * kPanel, padded(keys.high, kPanel)};
}

inline int32_t* as_integers(float* scratch) { return reinterpret_cast<int32_t*>(scratch); }

// Panels at once, of a cache that is read as it is.
constexpr int panels_at_once(int rows) {
  int panels = 1;
  while (panels * 2 <= kKeyPanels && panels * 2 * kVectors * rows <= kTileSums) panels *= 2;
  return panels;
}

// sums[r][v] of the products of a row's `count` pairs with those of vector v. Pairs of a row are kNextPair
// apart, rows kNextRow; right's rows `stride`.
template <int kNextRow, int kNextPair, int MR, int NV>
inline void sum_pairs(const int32_t* left, const int32_t* right, int stride, int count, vint (&sums)[MR][NV]) {
  clear(sums);
  for (int i = 0; i < count; ++i, left += kNextPair, right += stride) {
    vint values[NV];
    for (int v = 0; v < NV; ++v) values[v] = load_as<vint>(right + v * kLanes);
    for (int r = 0; r < MR; ++r) {
      const vint factor = splat_pair(left[r * kNextRow]);
      for (int v = 0; v < NV; ++v) sums[r][v] = add_dots(sums[r][v], values[v], factor);
    }
  }
}

// Adds the products of a row's pairs, which are kNextRow apart, with NP panels' of bytes as they lie in the cache.
// read(p, values) reads a panel's.
template <int kNextRow, int NP, int MR, int NV, typename Read>
[[gnu::always_inline]] inline void add_bytes(const int32_t* left, Read&& read, vint (&sums)[MR][NV]) {
  for (int p = 0; p < NP; ++p) {
    vint values[kVectors];
    read(p, values);
    for (int r = 0; r < MR; ++r) {
      const vint factor = splat_pair(left[r * kNextRow]);
      for (int v = 0; v < kVectors; ++v) {
        vint& sum = sums[r][p * kVectors + v];
        sum = add_dots(sum, values[v], factor);
      }
    }
  }
}

template <int MR, int NV>
inline void store_scores(const vint (&sums)[MR][NV], const float* steps, float* scores) {
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) {
      store(scores + r * kKeyBlock + v * kLanes, to_float(sums[r][v]) * steps[r]);
    }
  }
}

template <int MR>
inline void score_pairs(IntegerQueries q, const PairBlock& block, Seen tile, int dim, float* scores) {
  constexpr int NV = tile_vectors(MR, kKeyBlock / kLanes), kKeys = NV * kLanes;
  for (int j = tile.low / kKeys * kKeys; j < tile.high; j += kKeys) {
    vint sums[MR][NV];
    sum_pairs<1, MR>(q.pairs, block.keys + j, kKeyBlock, feature_pairs(dim), sums);
    store_scores(sums, q.steps, scores + j);
  }
}

template <int MR>
[[gnu::noinline]] void score_pairs(IntegerQueries q, const KeyBlock<int8_t>& block, Seen tile, int dim, float* scores) {
  constexpr int NP = panels_at_once(MR);
  for (int first = tile.low / kPanel / NP * NP; first * kPanel < tile.high; first += NP) {
    vint sums[MR][NP * kVectors];
    clear(sums);
    const int8_t *keys[NP], *next[NP];
    for (int p = 0; p < NP; ++p) {
      keys[p] = block.keys[first + p];
      next[p] = block.next_keys[first + p];
    }
    const int64_t stride = block.key_stride;
    const int32_t* pairs = q.pairs;
    for (int i = 0; i < dim / 2; ++i, pairs += MR) {
      add_bytes<1, NP>(
          pairs,
          [&](int p, vint (&values)[kVectors]) [[gnu::always_inline]] {
            soon(next[p]);
            soon(next[p] + stride);
            load_pairs(keys[p], keys[p] + stride, values);
            keys[p] += 2 * stride;
            next[p] += 2 * stride;
          },
          sums);
    }
    store_scores(sums, q.steps, scores + first * kPanel);
  }
}

// How a row's sums of integers are folded: they become a block's outputs first, so that the bits are those of a
// block whose state was kept apart.
struct Folding {
  Factors factors;
  float steps[kLanes];  // the size of a row's
};

inline void fold_integers(vint sum, const Folding& folding, int row, float* y) {
  const vfloat block = to_float(sum) * folding.steps[row];
  store(y, folded(load(y), folding.factors.before[row], block, folding.factors.block[row]));
}

template <int MR, int NV>
inline void fold_features(const vint (&sums)[MR][NV], const Folding& folding, int width, float* out) {
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) fold_integers(sums[r][v], folding, r, out + r * width + v * kLanes);
  }
}

template <int MR>
inline void add_pairs(const int32_t* weights, const PairBlock& block, Seen tile, int width,
                      const Folding& folding, float* out) {
  const int begin = tile.low / 2, count = (tile.high - tile.low) / 2;
  const auto add = [&](auto vectors, int feature) {
    vint sums[MR][vectors];
    sum_pairs<kKeyPairs, 1>(weights + begin, block.values + begin * width + feature, width, count, sums);
    fold_features(sums, folding, width, out + feature);
  };
  constexpr std::integral_constant<int, tile_vectors(MR, 8)> most{};
  constexpr std::integral_constant<int, kVectors> rest{};
  int d = 0;
  for (; d + most * kLanes <= width; d += most * kLanes) add(most, d);
  for (; d < width; d += kPanel) add(rest, d);
}

template <int MR>
[[gnu::noinline]] void add_pairs(const int32_t* weights, const KeyBlock<int8_t>& block, Seen tile, int width,
                      const Folding& folding, float* out) {
  const auto add = [&](auto panels, int feature) {
    vint sums[MR][panels * kVectors];
    clear(sums);
    const int64_t stride = block.value_stride;
    for (int j = tile.low; j < tile.high; j += kPanel) {
      const int8_t *value = block.values[j / kPanel] + feature, *next = block.next_values[j / kPanel] + feature;
      const int32_t* pairs = weights + j / 2;
      for (int i = 0; i < kPanel / 2; ++i, ++pairs) {
        add_bytes<kKeyPairs, panels>(
            pairs,
            [&](int p, vint (&values)[kVectors]) [[gnu::always_inline]] {
              const int64_t first = first_of_pair(i) * stride, second = first + kApart * stride;
              if (p == 0) {
                soon(next + first);
                soon(next + second);
              }
              load_pairs(value + first + p * kPanel, value + second + p * kPanel, values);
            },
            sums);
      }
    }
    fold_features(sums, folding, width, out + feature);
  };
  constexpr std::integral_constant<int, panels_at_once(MR)> most{};
  constexpr std::integral_constant<int, 1> one{};
  int d = 0;
  for (; d + most * kPanel <= width; d += most * kPanel) add(most, d);
  for (; d < width; d += kPanel) add(one, d);
}

// Calls use(row, its weights within `tile`, the factor that makes integers of them) for weights
// [rows][kKeyBlock].
template <typename F>
inline void for_rounded_weights(const float* weights, int rows, Seen tile, Folding& folding, F&& use) {
  float in_one[kLanes];
  for (int r = 0; r < rows; ++r) {
    vuint most = {};
    for (int j = tile.low; j < tile.high; j += kLanes) {
      most = larger_bits(most, load_as<vuint>(reinterpret_cast<const uint32_t*>(weights + r * kKeyBlock + j)));
    }
    const Steps steps = steps_of(largest_of_bits(most), kMostSteps);
    folding.steps[r] = steps.size;
    in_one[r] = steps.in_one;
  }
  for (int r = 0; r < rows; ++r) use(r, weights + r * kKeyBlock + tile.low, in_one[r]);
}

// `to`: [rows][kKeyPairs].
inline void round_weights(const float* weights, int rows, Seen tile, int32_t* to, Folding& folding) {
  for_rounded_weights(weights, rows, tile, folding, [&](int r, const float* from, float in_one) {
    round_to_pairs(from, tile.high - tile.low, in_one, to + r * kKeyPairs + tile.low / 2);
  });
}

// As attend_block. Scratch: scores [MR][kKeyBlock], weights [MR][kKeyPairs]. Not inline, as what it calls, for the
// same reason.
template <int MR, typename Block>
[[gnu::noinline]] void attend_pairs(IntegerQueries q, const Block& block, const Weighing& weighing, const Seen* seen,
                         int dim, int width, float* scores, int32_t* weights, const State& state) {
  const auto [keys, all] = seen_by_any(MR, seen);
  if (keys.low >= keys.high) return;
  const Seen tile = whole_panels(keys);
  score_pairs<MR>(q, block, tile, dim, scores);
  BlockSums sums;
  soften(weighing, MR, tile, seen, all, scores, sums);
  Folding folding;
  fold_sums(state, MR, load(sums.maxima), sums.totals, folding.factors);
  round_weights(scores, MR, tile, weights, folding);
  add_pairs<MR>(weights, block, tile, width, folding, state.out);
}

}  // namespace
}  // namespace precast
