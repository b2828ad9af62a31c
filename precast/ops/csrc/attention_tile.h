// Attention of a few rows to one block of kKeyBlock keys, blocked for registers.
//
// A score is summed over the features in order, a block's output over its keys in order, one fused
// multiply-add each: the same bits for every number of rows and both types of floats that hold the same values.
// Caches of 8 bits have sums of integers (attention_integers.h).
#pragma once

#include <utility>

#include "attention_softmax.h"

namespace precast {
namespace {

template <typename T>
constexpr int kExtra = sizeof(T) == 1 ? kScaleBytes : 0;  // rows of K, columns of V that hold scales

// Sums of a register tile: enough to hide an addition's latency, and few enough that they and what they are
// made of fit the registers.
constexpr int kTileSums = kLanes == 16 ? 24 : kLanes == 8 ? 12 : 2 * kTileRows;

// Vectors of a register tile of so many rows, along the keys or the features.
constexpr int tile_vectors(int rows, int most) {
  int vectors = 1;
  while (vectors * 2 * rows <= kTileSums && vectors * 2 <= most) vectors *= 2;
  return vectors;
}
constexpr int kTileFeatures = tile_vectors(kTileRows, 8) * kLanes;
// Panels of kPanel keys in a block.
constexpr int kKeyPanels = kKeyBlock / kPanel;

// A block's keys and values as they lie in the cache, or converted. A value's feature f is at
// f * feature_stride of the value's address, for features that begin a register tile.
template <typename T>
struct KeyBlock {
  static constexpr bool kConverted = false;
  const T* keys[kKeyPanels];    // [dim][key_stride]: kPanel neighbouring keys
  const T* values[kKeyPanels];  // [kPanel][value_stride]
  // Of the block that is read after this one. It is asked for while this one is read, line by line:
  // blocks lie anywhere in memory, and the processor's own prefetching begins anew in each.
  const T *next_keys[kKeyPanels], *next_values[kKeyPanels];
  int key_stride, value_stride;
  static constexpr int feature_stride = 1;
};

// All of a block's values in one place: [features / kTileFeatures][kKeyBlock][kTileFeatures].
struct ConvertedBlock {
  static constexpr bool kConverted = true;
  const float* keys[kKeyPanels];
  const float* values[1];
  static constexpr int key_stride = kPanel, value_stride = kTileFeatures, feature_stride = kKeyBlock;
};

// Into the second cache: the first one has too few requests open at once (prefetch.h).
[[gnu::always_inline]] inline void soon(const void* at) { __builtin_prefetch(at, 0, 2); }

// Two vectors of bf16 in two instructions: a load's even values and its odd ones. Sums over them come
// out in that order, and are put right once they are complete.
template <typename T, int NV>
constexpr bool kEvenOdd = std::is_same_v<T, BFloat16> && kLanes >= 8 && NV % 2 == 0;

// sums[r] += x[r * stride] * the NV vectors at `from`. A pair of vectors takes its factors anew: kept for
// all pairs they would push sums out of AVX2's registers.
template <bool kPairs, int MR, int NV, typename T, typename Sums>
[[gnu::always_inline]] inline void add_products(const float* x, int stride, const T* from, Sums& sums,
                                                int at) {
  constexpr int kStep = kPairs ? 2 : NV;
  for (int v = 0; v < NV; v += kStep) {
    vfloat value[kStep];
    if constexpr (kPairs) {
      const vint both = load_as<vint>(reinterpret_cast<const int32_t*>(from + v * kLanes));
      value[0] = as_float(both << 16);
      value[1] = as_float(both & static_cast<int32_t>(0xffff0000));
      if (kLanes == 8 && NV > 2) asm("" : "+r"(x));
    } else {
      for (int i = 0; i < kStep; ++i) value[i] = load(from + (v + i) * kLanes);
    }
    for (int r = 0; r < MR; ++r) {
      const vfloat factor = splat(x[r * stride]);
      for (int i = 0; i < kStep; ++i) {
        sums[r][at + v + i] = multiply_add(value[i], factor, sums[r][at + v + i]);
      }
    }
  }
}

// Of neighbouring keys in several panels: all of a step's keys are loaded before its factors, each of which
// is then needed once. Panel by panel, GCC keeps twelve factors for the next panel, and has no registers left
// for as many sums.
template <int MR, int NV, int kRun, typename Sums>
[[gnu::always_inline]] inline void add_panels(const float* q, const float* const* keys, Sums& sums) {
  vfloat value[NV];
  for (int v = 0; v < NV; ++v) value[v] = load(keys[v / kRun] + v % kRun * kLanes);
  for (int r = 0; r < MR; ++r) {
    const vfloat factor = splat(q[r]);
    for (int v = 0; v < NV; ++v) sums[r][v] = multiply_add(value[v], factor, sums[r][v]);
  }
}

template <bool kPairs, int NV>
[[gnu::always_inline]] inline void put_right(vfloat* sums) {
  if constexpr (kPairs) {
    vint low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i / 2 + i % 2 * kLanes;
      high[i] = low[i] + kLanes / 2;
    }
    for (int v = 0; v < NV; v += 2) {
      const vfloat even = sums[v], odd = sums[v + 1];
      sums[v] = __builtin_shuffle(even, odd, low);
      sums[v + 1] = __builtin_shuffle(even, odd, high);
    }
  }
}

// scores[r][j] = q[r] . key j for NV vectors of keys. q is [dim][MR].
template <int MR, int NV, typename Block>
inline void score_keys(const float* q, const Block& block, int first, int dim,
                       float* scores) {
  constexpr int kRuns = NV > kVectors ? NV / kVectors : 1, kRun = NV / kRuns;
  using T = std::remove_cvref_t<decltype(*block.keys[0])>;
  const T *keys[kRuns], *next[kRuns];
  for (int p = 0; p < kRuns; ++p) {
    keys[p] = block.keys[first / kPanel + p] + first % kPanel;
    if constexpr (!Block::kConverted) next[p] = block.next_keys[first / kPanel + p];
  }
  vfloat acc[MR][NV];
  clear(acc);
  for (int d = 0; d < dim; ++d, q += MR) {
    if constexpr (Block::kConverted && kRuns > 1) {
      add_panels<MR, NV, kRun>(q, keys, acc);
      for (int p = 0; p < kRuns; ++p) keys[p] += block.key_stride;
      continue;
    }
    for (int p = 0; p < kRuns; ++p) {
      if constexpr (!Block::kConverted) {
        soon(next[p]);
        next[p] += block.key_stride;
      }
      if (kLanes == 8 && kRuns > 1) asm("" : "+r"(q));
      add_products<kEvenOdd<T, kRun>, MR, kRun>(q, 1, keys[p], acc, p * kRun);
      keys[p] += block.key_stride;
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < kRuns; ++p) put_right<kEvenOdd<T, kRun>, kRun>(acc[r] + p * kRun);
    for (int v = 0; v < NV; ++v) store(scores + r * kKeyBlock + first + v * kLanes, acc[r][v]);
  }
}

template <int MR, typename Block>
inline void score_block(const float* q, const Block& block, Seen tile, int dim,
                        float* scores) {
  constexpr int kKeys = tile_vectors(MR, kKeyBlock / kLanes);
  for (int j = tile.low / (kKeys * kLanes) * (kKeys * kLanes); j < tile.high; j += kKeys * kLanes) {
    score_keys<MR, kKeys>(q, block, j, dim, scores);
  }
}

// Folds sums over the seen keys of weights[r][j] * value j into the outputs, NV vectors of features.
template <int MR, int NV, typename Block>
inline void add_values(const float* weights, const Block& block, Seen tile, int feature, int width,
                       const Factors& factors, float* out) {
  constexpr int kRun = Block::kConverted ? kKeyBlock : kPanel;
  using T = std::remove_cvref_t<decltype(*block.values[0])>;
  vfloat acc[MR][NV];
  clear(acc);
  for (int j = tile.low; j < tile.high;) {
    const auto* values = block.values[j / kRun] + j % kRun * block.value_stride +
                         feature * Block::feature_stride;
    const int end = (j / kRun + 1) * kRun < tile.high ? (j / kRun + 1) * kRun : tile.high;
    const T* next = nullptr;
    if constexpr (!Block::kConverted) {
      next = block.next_values[j / kRun] + j % kRun * block.value_stride + feature;
    }
    for (; j < end; ++j, values += block.value_stride) {
      if constexpr (!Block::kConverted) {
        for (int i = 0; i < NV * kLanes; i += kLineBytes / sizeof(T)) soon(next + i);
        next += block.value_stride;
      }
      add_products<kEvenOdd<T, NV>, MR, NV>(weights + j, kKeyBlock, values, acc, 0);
    }
  }
  for (int r = 0; r < MR; ++r) {
    put_right<kEvenOdd<T, NV>, NV>(acc[r]);
    for (int v = 0; v < NV; ++v) {
      float* y = out + r * width + feature + v * kLanes;
      store(y, folded(load(y), factors.before[r], acc[r][v], factors.block[r]));
    }
  }
}

template <int MR, typename Block>
inline void add_block(const float* weights, const Block& block, Seen tile, int width,
                      const Factors& factors, float* out) {
  constexpr int kVectorsAtOnce = tile_vectors(MR, 8), kRest = tile_vectors(kTileRows, kVectors);
  int d = 0;
  for (; d + kVectorsAtOnce * kLanes <= width; d += kVectorsAtOnce * kLanes) {
    add_values<MR, kVectorsAtOnce>(weights, block, tile, d, width, factors, out);
  }
  for (; d < width; d += kRest * kLanes) {
    add_values<MR, kRest>(weights, block, tile, d, width, factors, out);
  }
}

// The keys of a block that any of some rows sees, and whether each of them sees all.
struct SeenByAny {
  Seen keys;
  bool all;
};

inline SeenByAny seen_by_any(int rows, const Seen* seen) {
  SeenByAny any{{kKeyBlock, 0}, true};
  for (int r = 0; r < rows; ++r) {
    any.all = any.all && seen[r].low == 0 && seen[r].high == kKeyBlock;
    if (seen[r].low >= seen[r].high) continue;
    any.keys.low = seen[r].low < any.keys.low ? seen[r].low : any.keys.low;
    any.keys.high = seen[r].high > any.keys.high ? seen[r].high : any.keys.high;
  }
  return any;
}

// Folds a block into the state of MR rows, which see `seen` of it. Scratch: scores [MR][kKeyBlock]. Not inline:
// what its callers keep in registers put a sum of its inner loops on the stack.
template <int MR, typename Block>
[[gnu::noinline]] void attend_block(const float* q, const Block& block, const Weighing& weighing, const Seen* seen,
                         int dim, int width, float* scores, const State& state) {
  const auto [tile, all] = seen_by_any(MR, seen);
  if (tile.low >= tile.high) return;
  score_block<MR>(q, block, tile, dim, scores);
  BlockSums sums;
  soften(weighing, MR, tile, seen, all, scores, sums);
  Factors factors;
  fold_sums(state, MR, load(sums.maxima), sums.totals, factors);
  add_block<MR>(scores, block, tile, width, factors, state.out);
}

}  // namespace
}  // namespace precast
