// Attention of up to 16 rows to one block of kKeyBlock keys on AMX, for caches of bf16.
//
// Queries and weights are not bf16: they are taken as the sum of two numbers, the upper half of the float and
// what is left of it, which keeps 16 bits of precision. A row's sums don't depend on the other rows of its
// matrix: decode and prefill have the same bits here.
#pragma once

#if defined(__AMX_BF16__)

#include "amx.h"
#include "attention_tile.h"

namespace precast {
namespace {

// Keys, or features, that one product of matrices sums over; outputs of one.
constexpr int kMatrixDepth = 32, kMatrixColumns = 16;
constexpr int kMatrixRows = 16;
using Half = uint16_t;  // bf16
constexpr int kPairRow = 2 * kMatrixColumns;  // values of a row of a right-hand matrix

// Queries [rows][dim] of a tile and weights [rows][kKeyBlock], each as its upper halves and the rest.
struct Halves {
  Half *upper, *rest;
};

// A block as right-hand matrices: keys [kKeyPanels][dim / 2][16 keys][2], values
// [dim / 16][kKeyBlock / 2][16 features][2].
struct MatrixBlock {
  const Half *keys, *values;
};

inline TileShapes attention_shapes(int rows) {
  TileShapes shapes;
  for (const int sum : {0, 1}) shapes.set(sum, rows, 64);
  for (const int left : {2, 3, 5, 6}) shapes.set(left, rows, 64);
  for (const int right : {4, 7}) shapes.set(right, kMatrixDepth / 2, 64);
  return shapes;
}

// Two vectors of 16 values as bf16, by turns: what the cache holds, which is exact in bf16.
inline void store_pairs(Half* to, vfloat first, vfloat second) {
  const vint pairs = (vint)((vuint)first >> 16) | ((vint)second & static_cast<int32_t>(0xffff0000));
  std::memcpy(to, &pairs, sizeof(pairs));
}
inline void store_pairs(Half* to, const BFloat16* first, const BFloat16* second) {
  alignas(64) static constexpr Half kByTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i one = _mm512_castsi256_si512(load_as<__m256i>(first));
  const __m512i both = _mm512_inserti64x4(one, load_as<__m256i>(second), 1);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kByTurns), both));
}

// 32 floats as their upper halves and the rest.
inline void split(vfloat first, vfloat second, Half* upper, Half* rest) {
  const vfloat a = as_float((vint)first & static_cast<int32_t>(0xffff0000));
  const vfloat b = as_float((vint)second & static_cast<int32_t>(0xffff0000));
  const __m512bh uppers = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  const __m512bh rests = _mm512_cvtne2ps_pbh((__m512)(second - b), (__m512)(first - a));
  std::memcpy(upper, &uppers, sizeof(uppers));
  std::memcpy(rest, &rests, sizeof(rests));
}

// What is read next is asked for a share at a time: all at once is more than a core keeps open. ask() is
// called kAsksToConvert times while a block is converted, kAsksToAttend times by each tile of its rows.
constexpr int kAsksToConvert = 4, kAsksToAttend = 4;

template <typename T, typename Ask>
inline void convert_keys(const KeyBlock<T>& from, int dim, Half* to, Ask& ask) {
  for (int p = 0; p < kKeyPanels; ++p) {
    if (p % 2 == 0) ask();
    const T* keys = from.keys[p];
    for (int d = 0; d < dim; d += 2, keys += 2 * from.key_stride, to += kPairRow) {
      store_pairs(to, keys, keys + from.key_stride);
    }
  }
}

// Values of keys from `count` on are zeros: their weights are, but zero times what may lie there need not be.
template <typename T, typename Ask>
inline void convert_values(const KeyBlock<T>& from, int dim, int count, Half* to, Ask& ask) {
  constexpr int kPanelValues = kKeyBlock / 2 * kPairRow;
  for (int j = 0; j < kKeyBlock; j += 2, to += kPairRow) {
    if (j % (kKeyBlock / 2) == 0) ask();
    const T* value = from.values[j / kPanel] + j % kPanel * from.value_stride;
    const T* end = value + dim;
    for (Half* pairs = to; value < end; value += kMatrixColumns, pairs += kPanelValues) {
      if (j + 1 < count) {
        store_pairs(pairs, value, value + from.value_stride);
      } else {
        store_pairs(pairs, j < count ? load(value) : vfloat{}, vfloat{});
      }
    }
  }
}

// Sum = left * right over `steps` times kMatrixDepth; left's rows are `stride` values apart. S: 0 or 1, the
// set of registers, so that two sums are under way.
template <int S>
inline void multiply_halves(Halves left, int stride, const Half* right, int steps) {
  constexpr int kUpper = 2 + 3 * S, kRest = 3 + 3 * S, kRight = 4 + 3 * S;
  tile_zero<S>();
  for (int s = 0; s < steps; ++s, right += kMatrixDepth / 2 * kPairRow) {
    tile_load<kRight>(right, kPairRow * sizeof(Half));
    tile_load<kUpper>(left.upper + s * kMatrixDepth, stride * sizeof(Half));
    tile_load<kRest>(left.rest + s * kMatrixDepth, stride * sizeof(Half));
    tile_dots_bf16<S, kUpper, kRight>();
    tile_dots_bf16<S, kRest, kRight>();
  }
}

inline void score_matrices(Halves q, const MatrixBlock& block, int dim, float* scores) {
  constexpr int64_t kStride = kKeyBlock * sizeof(float);
  const int steps = dim / kMatrixDepth, panel = dim / 2 * kPairRow;
  for (int p = 0; p < kKeyPanels; p += 2) {
    multiply_halves<0>(q, dim, block.keys + p * panel, steps);
    multiply_halves<1>(q, dim, block.keys + (p + 1) * panel, steps);
    tile_store<0>(scores + p * kPanel, kStride);
    tile_store<1>(scores + (p + 1) * kPanel, kStride);
  }
}

// Weights that are there in vectors within [tile.low, tile.high); the others are zeros.
inline void split_weights(int rows, Seen tile, const float* weights, Halves to) {
  const auto weight = [&](int r, int j) {
    const bool outside = j + kLanes <= tile.low || j >= tile.high;
    return outside ? vfloat{} : load(weights + r * kKeyBlock + j);
  };
  for (int r = 0; r < rows; ++r) {
    for (int j = 0; j < kKeyBlock; j += kMatrixDepth) {
      const int at = r * kKeyBlock + j;
      split(weight(r, j), weight(r, j + kLanes), to.upper + at, to.rest + at);
    }
  }
}

inline void fold_columns(int rows, const float* sums, const Factors& factors, int width, float* out) {
  for (int r = 0; r < rows; ++r) {
    float* y = out + r * width;
    store(y, folded(load(y), factors.before[r], load(sums + r * kMatrixColumns), factors.block[r]));
  }
}

inline void add_matrices(Halves weights, const MatrixBlock& block, int rows, int width,
                         const Factors& factors, float* out) {
  constexpr int kPanelValues = kKeyBlock / 2 * kPairRow, kSteps = kKeyBlock / kMatrixDepth;
  alignas(64) float sums[2][kMatrixRows * kMatrixColumns];
  for (int f = 0; f < width; f += 2 * kMatrixColumns) {
    const Half* values = block.values + f / kMatrixColumns * kPanelValues;
    multiply_halves<0>(weights, kKeyBlock, values, kSteps);
    multiply_halves<1>(weights, kKeyBlock, values + kPanelValues, kSteps);
    tile_store<0>(sums[0]);
    tile_store<1>(sums[1]);
    fold_columns(rows, sums[0], factors, width, out + f);
    fold_columns(rows, sums[1], factors, width, out + f + kMatrixColumns);
  }
}

// Folds a block into the state of the rows, which see `seen` of it. Scratch: scores [16][kKeyBlock].
// meanwhile() is what can be done while scores are under way: few rows wait for them.
template <typename Ask, typename Meanwhile>
inline void attend_matrices(Halves q, const MatrixBlock& block, const Weighing& weighing, int rows,
                            const Seen* seen, int dim, float* scores, Halves weights,
                            const State& state, Ask& ask, Meanwhile& meanwhile) {
  const SeenByAny any = seen_by_any(rows, seen);
  if (any.keys.low >= any.keys.high) return;
  written();
  ask();
  score_matrices(q, block, dim, scores);
  ask();
  meanwhile();
  BlockSums sums;
  soften(weighing, rows, any.keys, seen, any.all, scores, sums);
  ask();
  Factors factors;
  fold_sums(state, rows, load(sums.maxima), sums.totals, factors);
  split_weights(rows, any.keys, scores, weights);
  written();
  ask();
  add_matrices(weights, block, rows, dim, factors, state.out);
}

}  // namespace
}  // namespace precast

#endif
