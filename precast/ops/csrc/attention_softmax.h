// Softmax of attention, a block of kKeyBlock keys at a time.
//
// A row's output has the same bits whatever it is computed with: keys are cut into blocks by their
// position alone, a block is weighed against its own largest score, and blocks are folded into what
// came before one after the other (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018). Tiles, chunks and threads only decide who does which of these steps.
#pragma once

#include <cmath>

#include "attention_kernels.h"
#include "simd.h"

namespace precast {
namespace {

// Rows that are computed together: their accumulators and a vector of factors fit the registers.
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 3;
static_assert(kTileRows <= kLanes, "a vector holds a factor for each row");

// The keys [low, high) of a block: those that a row sees.
struct Seen {
  int low, high;
};

// 2^x for x <= 0, relative error below 2e-7; 2^-100 below -100: as good as nothing beside the largest
// weight, which is 1, and no subnormal number comes of it. The polynomial is minimax with p(0) = 1.
inline vfloat exp2_negative(vfloat x) {
  x = larger(splat(-100.0f), x);
  const vfloat shifted = x + 12582912.0f;  // rounds to an integer in the low bits
  const vfloat r = x - (shifted - 12582912.0f);
  vfloat p = multiply_add(r, splat(1.3264727e-3f), splat(9.6715130e-3f));
  p = multiply_add(p, r, splat(5.5507336e-2f));
  p = multiply_add(p, r, splat(2.4022242e-1f));
  p = multiply_add(p, r, splat(6.9314700e-1f));
  p = multiply_add(p, r, splat(1.0f));
  return as_float((vint)p + ((vint)shifted << 23));
}

inline vfloat tanh(vfloat x) {  // absolute error below 2e-7
  const vfloat magnitude = larger(x, -x);
  const vfloat e = exp2_negative(magnitude * -2.8853900817779268f);
  const vfloat positive = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -positive : positive;
}

// How scores become weights.
struct Weighing {
  float softcap;              // in powers of two; 0: none
  const float* key_scales;    // [kKeyBlock] or null
  const float* value_scales;  // likewise
};

// What folding a block needs to know of its rows.
struct BlockSums {
  vfloat totals[kLanes];  // of a row's weights, by lane
  alignas(64) float maxima[kLanes];
};

inline vint is_seen(int first, Seen seen) {
  vint key;
  for (int i = 0; i < kLanes; ++i) key[i] = first + i;
  return (key >= seen.low) & (key < seen.high);
}

// The largest of a row's scores, which are scaled, capped and, where unseen, made infinitely low.
inline float largest_score(const Weighing& w, Seen tile, Seen seen, float* scores) {
  vfloat most = splat(-INFINITY);
  for (int j = tile.low / kLanes * kLanes; j < tile.high; j += kLanes) {
    vfloat score = load(scores + j);
    const bool all = j >= seen.low && j + kLanes <= seen.high;
    if (w.key_scales) score *= load(w.key_scales + j);
    if (w.softcap > 0) score = tanh(score) * w.softcap;
    if (!all) score = is_seen(j, seen) ? score : splat(-INFINITY);
    if (w.key_scales || w.softcap > 0 || !all) store(scores + j, score);
    most = larger(score, most);
  }
  return reduce_max(most);
}

// Scores become weights; returns their sums by lane.
inline vfloat weigh(const Weighing& w, Seen tile, Seen seen, float largest, float* scores) {
  vfloat total = {};
  for (int j = tile.low / kLanes * kLanes; j < tile.high; j += kLanes) {
    vfloat weight = exp2_negative(load(scores + j) - largest);
    vfloat scaled = w.value_scales ? weight * load(w.value_scales + j) : weight;
    if (j < seen.low || j + kLanes > seen.high) {  // where no token is, scales need not be numbers
      weight = is_seen(j, seen) ? weight : vfloat{};
      scaled = is_seen(j, seen) ? scaled : vfloat{};
    }
    total += weight;
    store(scores + j, scaled);
  }
  return total;
}

// The same for a row that sees the whole block, which nearly all do, uncapped: no vector asks for more.
template <bool kScaled>
inline float largest_of_all(const Weighing& w, float* scores) {
  vfloat most = splat(-INFINITY);
  for (int j = 0; j < kKeyBlock; j += kLanes) {
    vfloat score = load(scores + j);
    if constexpr (kScaled) store(scores + j, score *= load(w.key_scales + j));
    most = larger(score, most);
  }
  return reduce_max(most);
}

template <bool kScaled>
inline vfloat weigh_all(const Weighing& w, float largest, float* scores) {
  const vfloat most = splat(largest);
  vfloat total = {};
  for (int j = 0; j < kKeyBlock; j += kLanes) {
    const vfloat weight = exp2_negative(load(scores + j) - most);
    total += weight;
    if constexpr (kScaled) {
      store(scores + j, weight * load(w.value_scales + j));
    } else {
      store(scores + j, weight);
    }
  }
  return total;
}

template <bool kScaled>
inline void soften_all(const Weighing& w, int rows, float* scores, BlockSums& sums) {
  for (int r = 0; r < rows; ++r) {
    sums.maxima[r] = largest_of_all<kScaled>(w, scores + r * kKeyBlock);
  }
  for (int r = 0; r < rows; ++r) {
    sums.totals[r] = weigh_all<kScaled>(w, sums.maxima[r], scores + r * kKeyBlock);
  }
}

inline void soften_some(const Weighing& w, int rows, Seen tile, const Seen* seen, float* scores,
                        BlockSums& sums) {
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kKeyBlock;
    sums.totals[r] = vfloat{};
    if (seen[r].low < seen[r].high) {
      sums.maxima[r] = largest_score(w, tile, seen[r], row);
      sums.totals[r] = weigh(w, tile, seen[r], sums.maxima[r], row);
    } else {
      std::memset(row, 0, sizeof(float) * kKeyBlock);
    }
  }
}

// Scores [rows][kKeyBlock] of a block become weights. `tile`: the keys that any of the rows sees, `all`:
// whether each sees the whole block.
[[gnu::noinline]] void soften(const Weighing& w, int rows, Seen tile, const Seen* seen, bool all,
                              float* scores, BlockSums& sums) {
  store(sums.maxima, splat(-INFINITY));
  if (!all || w.softcap > 0) return soften_some(w, rows, tile, seen, scores, sums);
  if (w.key_scales) return soften_all<true>(w, rows, scores, sums);
  soften_all<false>(w, rows, scores, sums);
}

// What is known of some rows after some of their keys: unnormalised outputs [rows][width], sums of
// weights by lane [rows][kLanes], and largest scores [kLanes], which both are relative to.
struct State {
  float *out, *totals, *maxima;
};

inline int64_t state_size(int rows, int width) {
  return ceil_div(rows * (width + kLanes) + kLanes, 16) * 16;
}

inline State state_at(float* at, int rows, int width) {
  return {at, at + rows * width, at + rows * (width + kLanes)};
}

inline State new_state(float* at, int rows, int width) {
  const State state = state_at(at, rows, width);
  std::memset(at, 0, sizeof(float) * rows * (width + kLanes));
  store(state.maxima, splat(-INFINITY));
  return state;
}

// What rows were, and what is folded into them, are multiplied by these.
struct Factors {
  alignas(64) float before[kLanes], block[kLanes];
};

inline vfloat folded(vfloat before, float before_factor, vfloat block, float block_factor) {
  return multiply_add(before, splat(before_factor), block * block_factor);
}

// Folds a block's largest scores and sums of weights into a state; its outputs are left to the caller.
inline void fold_sums(const State& state, int rows, vfloat block_maxima, const vfloat* totals,
                      Factors& factors) {
  const vfloat before = load(state.maxima), most = larger(before, block_maxima);
  const vfloat base = most == -INFINITY ? vfloat{} : most;  // rows that see nothing yet
  store(factors.before, exp2_negative(before - base));
  store(factors.block, exp2_negative(block_maxima - base));
  store(state.maxima, most);
  for (int r = 0; r < rows; ++r) {
    float* total = state.totals + r * kLanes;
    store(total, folded(load(total), factors.before[r], totals[r], factors.block[r]));
  }
}

// Folds the state of one block, which was kept apart, into that of those before.
inline void fold_state(const State& state, const State& block, int rows, int width) {
  vfloat totals[kLanes];
  for (int r = 0; r < rows; ++r) totals[r] = load(block.totals + r * kLanes);
  Factors factors;
  fold_sums(state, rows, load(block.maxima), totals, factors);
  for (int r = 0; r < rows; ++r) {
    for (int d = r * width; d < (r + 1) * width; d += kLanes) {
      store(state.out + d, folded(load(state.out + d), factors.before[r], load(block.out + d),
                                  factors.block[r]));
    }
  }
}

// What a sink adds to a row's weights, which are relative to its largest score. A sink that is far above
// that leaves nothing of the row.
inline float sink_weight(float sink, float largest) {
  const float above = sink - largest;
  return above <= 0 ? exp2_negative(splat(above))[0] : 1.0f / exp2_negative(splat(-above))[0];
}

// A row's output; zeros if it saw nothing. `sink`: null or its head's.
inline void finish_row(const State& state, int row, int width, int dim, const float* sink, float* y) {
  float total = reduce_add(load(state.totals + row * kLanes));
  if (sink && total > 0) total += sink_weight(*sink, state.maxima[row]);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  const float* x = state.out + row * width;
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(y + d, load(x + d) * inverse);
  for (; d < dim; ++d) y[d] = x[d] * inverse;
}

}  // namespace
}  // namespace precast
