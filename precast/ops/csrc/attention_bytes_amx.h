// The sums of attention_integers.h of up to 16 rows on AMX, to the bit: sums of integers are exact, and an
// integer of 16 bits is 256 times its upper byte and its lower one, where each has a sign.
#pragma once

#if defined(__AMX_INT8__)

#include "amx.h"
#include "attention_integer_rows.h"

namespace precast {
namespace {

// Products that one product of matrices sums over, and the bytes of a right-hand matrix.
constexpr int kByteDepth = 64, kByteMatrix = kByteDepth * kMatrixColumns;

// Queries [rows][padded dim] of a tile or weights [rows][kKeyBlock].
struct ByteHalves {
  int8_t *upper, *lower;
};

// A block as right-hand matrices: keys [depths][kKeyPanels][16][16 keys][4], values
// [dim / 16][16][16 features][4]. What isn't there is multiplied by zeros.
struct ByteBlock {
  const int8_t *keys, *values;
};

inline TileShapes byte_shapes(int rows) {
  TileShapes shapes;
  for (const int left : {0, 1, 2, 3, 4, 5}) shapes.set(left, rows, 64);
  for (const int right : {6, 7}) shapes.set(right, kByteDepth / 4, 64);
  return shapes;
}

// The two bytes of the integers that `rounded` leaves.
inline void split_bytes(vint bits, int8_t* upper, int8_t* lower) {
  narrow((bits + 128) >> 8, upper);
  narrow(bits, lower);
}

// Four of each of kPanel columns by turns.
inline void store_quads(const int8_t* from, int64_t stride, int8_t* to) {
  const auto row = [&](int i) { return load_as<__m128i>(from + i * stride); };
  const __m128i a = _mm_unpacklo_epi8(row(0), row(1)), b = _mm_unpackhi_epi8(row(0), row(1));
  const __m128i c = _mm_unpacklo_epi8(row(2), row(3)), d = _mm_unpackhi_epi8(row(2), row(3));
  const __m128i quads[4] = {_mm_unpacklo_epi16(a, c), _mm_unpackhi_epi16(a, c),
                            _mm_unpacklo_epi16(b, d), _mm_unpackhi_epi16(b, d)};
  std::memcpy(to, quads, sizeof(quads));
}

inline ByteBlock convert_bytes(const KeyBlock<int8_t>& from, int dim, int count, int8_t* keys, int8_t* values) {
  const int panels = padded(count, kPanel) / kPanel;
  for (int p = 0; p < panels; ++p) {
    for (int i = 0; i < dim / 4; ++i) {
      int8_t* to = keys + (i / 16 * kKeyPanels + p) * kByteMatrix + i % 16 * 64;
      store_quads(from.keys[p] + static_cast<int64_t>(4 * i) * from.key_stride, from.key_stride, to);
    }
  }
  for (int i = 0; i < panels * kPanel / 4; ++i) {
    const int8_t* value = from.values[4 * i / kPanel] + 4 * i % kPanel * from.value_stride;
    for (int d = 0; d < dim; d += kMatrixColumns) {
      store_quads(value + d, from.value_stride, values + d / kMatrixColumns * kByteMatrix + i * 64);
    }
  }
  return {keys, values};
}

// Sums of both bytes over `depths` right-hand matrices, `next` bytes apart. S: 0 or 1, the set of registers,
// so that two are under way.
template <int S>
inline void multiply_bytes(ByteHalves left, int stride, const int8_t* right, int64_t next, int depths) {
  constexpr int kUpper = 2 * S, kLower = 2 * S + 1, kRight = 6 + S;
  tile_zero<kUpper>();
  tile_zero<kLower>();
  for (int s = 0; s < depths; ++s, right += next) {
    tile_load<kRight>(right, 64);
    tile_load<4>(left.upper + s * kByteDepth, stride);
    tile_load<5>(left.lower + s * kByteDepth, stride);
    tile_dots<kUpper, 4, kRight>();
    tile_dots<kLower, 5, kRight>();
  }
}

inline vint joined(const int32_t* upper, const int32_t* lower) {
  return (load_as<vint>(upper) << 8) + load_as<vint>(lower);
}

// upper, lower: scratch [rows][kKeyBlock]; scores may be upper's.
inline void score_bytes(ByteHalves q, const float* steps, const ByteBlock& block, int rows, int dim,
                        int32_t* upper, int32_t* lower, float* scores) {
  constexpr int64_t kStride = kKeyBlock * sizeof(int32_t);
  const int width = padded(dim, kByteDepth), depths = width / kByteDepth;
  for (int p = 0; p < kKeyPanels; p += 2) {
    multiply_bytes<0>(q, width, block.keys + p * kByteMatrix, kKeyPanels * kByteMatrix, depths);
    multiply_bytes<1>(q, width, block.keys + (p + 1) * kByteMatrix, kKeyPanels * kByteMatrix, depths);
    tile_store<0>(upper + p * kPanel, kStride);
    tile_store<1>(lower + p * kPanel, kStride);
    tile_store<2>(upper + (p + 1) * kPanel, kStride);
    tile_store<3>(lower + (p + 1) * kPanel, kStride);
  }
  for (int r = 0; r < rows; ++r) {
    for (int j = r * kKeyBlock; j < (r + 1) * kKeyBlock; j += kLanes) {
      store(scores + j, to_float(joined(upper + j, lower + j)) * steps[r]);
    }
  }
}

inline void round_weights(const float* weights, int rows, Seen tile, ByteHalves to, Folding& folding) {
  std::memset(to.upper, 0, rows * kKeyBlock);
  std::memset(to.lower, 0, rows * kKeyBlock);
  for_rounded_weights(weights, rows, tile, folding, [&](int r, const float* from, float in_one) {
    for (int j = tile.low; j < tile.high; j += kLanes, from += kLanes) {
      const int at = r * kKeyBlock + j;
      split_bytes(rounded(load(from), in_one), to.upper + at, to.lower + at);
    }
  });
}

inline void fold_bytes(int rows, const int32_t* upper, const int32_t* lower, const Folding& folding, int width,
                       float* out) {
  for (int r = 0; r < rows; ++r) {
    fold_integers(joined(upper + r * kMatrixColumns, lower + r * kMatrixColumns), folding, r, out + r * width);
  }
}

inline void add_byte_matrices(ByteHalves weights, const ByteBlock& block, int rows, int width,
                              const Folding& folding, float* out) {
  alignas(64) int32_t sums[4][kMatrixRows * kMatrixColumns];
  for (int f = 0; f < width; f += kMatrixColumns) {
    const int8_t* values = block.values + f / kMatrixColumns * kByteMatrix;
    const bool second = f + kMatrixColumns < width;
    multiply_bytes<0>(weights, kKeyBlock, values, 0, 1);
    if (second) multiply_bytes<1>(weights, kKeyBlock, values + kByteMatrix, 0, 1);
    tile_store<0>(sums[0]);
    tile_store<1>(sums[1]);
    fold_bytes(rows, sums[0], sums[1], folding, width, out + f);
    if (!second) break;
    f += kMatrixColumns;
    tile_store<2>(sums[2]);
    tile_store<3>(sums[3]);
    fold_bytes(rows, sums[2], sums[3], folding, width, out + f);
  }
}

// A register tile's queries, behind each other, as round_queries has them in pairs.
inline ByteHalves query_bytes(const AttentionArgs& a, const Scratch& s, RowTiles tiles, int t) {
  const int size = tiles.rows * padded(a.head_dim, kByteDepth);
  int8_t* upper = reinterpret_cast<int8_t*>(s.q) + 2 * t * size;
  return {upper, upper + size};
}

inline void split_queries_to_bytes(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                                   const Scratch& s) {
  const int group = a.group(tile.kv_head), dim = a.head_dim, width = padded(dim, kByteDepth);
  for (int r = 0; r < tiles.count * tiles.rows; ++r) {
    const ByteHalves all = query_bytes(a, s, tiles, r / tiles.rows);
    int8_t *upper = all.upper + r % tiles.rows * width, *lower = all.lower + r % tiles.rows * width;
    std::memset(upper, 0, width);
    std::memset(lower, 0, width);
    s.steps[r] = 0;
    if (r >= rows) continue;
    s.steps[r] = query_scale(a) * round_query(query_at(a, tile, group, r), dim, [&](int d, vint bits) {
                   split_bytes(bits, upper + d, lower + d);
                 });
  }
}

// As attend_pairs, of up to 16 rows.
inline void attend_bytes(const AttentionArgs& a, const Scratch& s, const ByteBlock& block,
                         const Weighing& weighing, RowTiles tiles, int t, const State& state) {
  const int rows = tiles.rows, dim = a.head_dim;
  const Seen* seen = s.seen + t * rows;
  const SeenByAny any = seen_by_any(rows, seen);
  if (any.keys.low >= any.keys.high) return;
  const Seen tile = whole_panels(any.keys);
  int32_t *upper = as_integers(s.wide), *lower = upper + rows * kKeyBlock;
  int8_t* bytes = reinterpret_cast<int8_t*>(s.weights);
  const ByteHalves weights{bytes, bytes + rows * kKeyBlock};
  written();
  score_bytes(query_bytes(a, s, tiles, t), s.steps + t * rows, block, rows, dim, upper, lower, s.scores);
  BlockSums sums;
  soften(weighing, rows, tile, seen, any.all, s.scores, sums);
  Folding folding;
  fold_sums(state, rows, load(sums.maxima), sums.totals, folding.factors);
  round_weights(s.scores, rows, tile, weights, folding);
  written();
  add_byte_matrices(weights, block, rows, dim, folding, state.out);
}

inline void attend_by_bytes(const AttentionArgs& a, const Scratch& s, const KeyBlock<int8_t>& block, int count,
                            const Weighing& weighing, RowTiles tiles, float* states) {
  const int width = state_width(a);
  const ByteBlock bytes = convert_bytes(block, a.head_dim, count, reinterpret_cast<int8_t*>(s.keys),
                                        reinterpret_cast<int8_t*>(s.values));
  for (int t = 0; t < tiles.count; ++t) {
    ask_for_next(block, a.head_dim, t, tiles.count);
    attend_bytes(a, s, bytes, weighing, tiles, t,
                 state_at(states + t * state_size(tiles.rows, width), tiles.rows, width));
  }
}

}  // namespace
}  // namespace precast

#endif
