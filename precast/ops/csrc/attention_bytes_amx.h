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

// The two bytes of a row's kKeyBlock integers that `rounded` leaves, in the order in which they are made in the
// least time: four neighbours are keys k, k + 16, k + 1 and k + 17 from k = first_of_quad on.
inline void split_bytes(const vint (&bits)[4], int8_t* upper, int8_t* lower) {
  const auto pairs = [&](int i) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)bits[i], _mm512_slli_epi32((__m512i)bits[i + 1], 16));
  };
  const __m512i first = pairs(0), second = pairs(2), half = _mm512_set1_epi16(128), low = _mm512_set1_epi16(255);
  const auto rest = [&](__m512i x) { return _mm512_srai_epi16(_mm512_add_epi16(x, half), 8); };
  _mm512_storeu_si512(upper, _mm512_packs_epi16(rest(first), rest(second)));
  _mm512_storeu_si512(lower, _mm512_packus_epi16(_mm512_and_si512(first, low), _mm512_and_si512(second, low)));
}
constexpr int first_of_quad(int quad) { return quad % 4 / 2 * 32 + quad / 4 * 4 + quad % 2 * 2; }

// Four rows of kPanel columns by turns: from, then those `second`, `third` and `fourth` bytes behind it.
inline void store_quads(const int8_t* from, int64_t second, int64_t third, int64_t fourth, int8_t* to) {
  const __m128i one = load_as<__m128i>(from), two = load_as<__m128i>(from + second);
  const __m128i three = load_as<__m128i>(from + third), four = load_as<__m128i>(from + fourth);
  const __m128i a = _mm_unpacklo_epi8(one, two), b = _mm_unpackhi_epi8(one, two);
  const __m128i c = _mm_unpacklo_epi8(three, four), d = _mm_unpackhi_epi8(three, four);
  const __m128i quads[4] = {_mm_unpacklo_epi16(a, c), _mm_unpackhi_epi16(a, c),
                            _mm_unpacklo_epi16(b, d), _mm_unpackhi_epi16(b, d)};
  std::memcpy(to, quads, sizeof(quads));
}

inline ByteBlock convert_bytes(const KeyBlock<int8_t>& from, int dim, int count, int8_t* keys, int8_t* values) {
  const int panels = padded(count, kPanel) / kPanel;
  for (int p = 0; p < panels; ++p) {
    for (int i = 0; i < dim / 4; ++i) {
      int8_t* to = keys + (i / 16 * kKeyPanels + p) * kByteMatrix + i % 16 * 64;
      const int64_t stride = from.key_stride;
      store_quads(from.keys[p] + 4 * i * stride, stride, 2 * stride, 3 * stride, to);
    }
  }
  // Panels behind the last key repeat it.
  for (int i = 0; i < kKeyBlock / 4; ++i) {
    const int j = first_of_quad(i), panel = j / kPanel;
    const int8_t* value = from.values[panel] + j % kPanel * from.value_stride;
    const int8_t* other = from.values[panel + 1] + j % kPanel * from.value_stride;
    const int64_t second = other - value, next = from.value_stride;
    for (int d = 0; d < dim; d += kMatrixColumns) {
      store_quads(value + d, second, next, second + next, values + d / kMatrixColumns * kByteMatrix + i * 64);
    }
  }
  return {keys, values};
}

// Sums of both bytes over `depths` right-hand matrices, `next` bytes apart. S: 0 or 1, the set of registers,
// so that two are under way. `loaded`: left is one matrix, and in its registers already.
template <int S>
inline void multiply_bytes(ByteHalves left, int stride, const int8_t* right, int64_t next, int depths,
                           bool loaded) {
  constexpr int kUpper = 2 * S, kLower = 2 * S + 1, kRight = 6 + S;
  tile_zero<kUpper>();
  tile_zero<kLower>();
  for (int s = 0; s < depths; ++s, right += next) {
    tile_load<kRight>(right, 64);
    if (!loaded) {
      tile_load<4>(left.upper + s * kByteDepth, stride);
      tile_load<5>(left.lower + s * kByteDepth, stride);
    }
    tile_dots<kUpper, 4, kRight>();
    tile_dots<kLower, 5, kRight>();
  }
}

inline vint joined(const int32_t* upper, const int32_t* lower) {
  return (load_as<vint>(upper) << 8) + load_as<vint>(lower);
}

// Sums of both bytes [rows][kKeyBlock] of a tile's scores.
struct ByteSums {
  int32_t *upper, *lower;
};

inline void score_bytes(ByteHalves q, const ByteBlock& block, int dim, ByteSums sums) {
  constexpr int64_t kStride = kKeyBlock * sizeof(int32_t);
  const int width = padded(dim, kByteDepth), depths = width / kByteDepth;
  for (int p = 0; p < kKeyPanels; p += 2) {
    multiply_bytes<0>(q, width, block.keys + p * kByteMatrix, kKeyPanels * kByteMatrix, depths,
                      p > 0 && depths == 1);
    multiply_bytes<1>(q, width, block.keys + (p + 1) * kByteMatrix, kKeyPanels * kByteMatrix, depths, depths == 1);
    tile_store<0>(sums.upper + p * kPanel, kStride);
    tile_store<1>(sums.lower + p * kPanel, kStride);
    tile_store<2>(sums.upper + (p + 1) * kPanel, kStride);
    tile_store<3>(sums.lower + (p + 1) * kPanel, kStride);
  }
}

inline void join_scores(ByteSums sums, const float* steps, int rows, float* scores) {
  for (int r = 0; r < rows; ++r) {
    for (int j = r * kKeyBlock; j < (r + 1) * kKeyBlock; j += kLanes) {
      store(scores + j, to_float(joined(sums.upper + j, sums.lower + j)) * steps[r]);
    }
  }
}

inline void round_weights(const float* weights, int rows, Seen tile, ByteHalves to, Folding& folding) {
  for_rounded_weights(weights, rows, tile, folding, [&](int r, const float* from, float in_one) {
    vint bits[kKeyPanels] = {};
    for (int p = 0; p < kKeyPanels; ++p) {
      const int j = p * kPanel;
      if (j >= tile.low && j < tile.high) bits[p] = rounded(load(from - tile.low + j), in_one);
    }
    split_bytes(bits, to.upper + r * kKeyBlock, to.lower + r * kKeyBlock);
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
    multiply_bytes<0>(weights, kKeyBlock, values, 0, 1, f > 0);
    if (second) multiply_bytes<1>(weights, kKeyBlock, values + kByteMatrix, 0, 1, true);
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

// A tile's weights, and how their products with values are folded.
struct ByteWeights {
  ByteHalves bytes;
  Folding folding;
  bool any;  // whether its rows see any key
};

// A tile's scores become its weights.
inline void weigh_bytes(const Scratch& s, const Weighing& weighing, ByteSums scores, int rows, int t,
                        const State& state, ByteWeights& to) {
  const Seen* seen = s.seen + t * rows;
  const SeenByAny any = seen_by_any(rows, seen);
  to.any = any.keys.low < any.keys.high;
  if (!to.any) return;
  const Seen tile = whole_panels(any.keys);
  join_scores(scores, s.steps + t * rows, rows, s.scores);
  BlockSums sums;
  soften(weighing, rows, tile, seen, any.all, s.scores, sums);
  fold_sums(state, rows, load(sums.maxima), sums.totals, to.folding.factors);
  round_weights(s.scores, rows, tile, to.bytes, to.folding);
}

// A block against all rows, up to 16 at a time. A tile's matrices lie a step apart from what they are loaded from
// and what they are stored for: its scores are under way while the tile before it is weighed, its outputs are
// computed once the next one is.
inline void attend_by_bytes(const AttentionArgs& a, const Scratch& s, const KeyBlock<int8_t>& block, int count,
                            const Weighing& weighing, RowTiles tiles, float* states) {
  const int width = state_width(a), rows = tiles.rows, size = rows * kKeyBlock;
  int8_t* halves = reinterpret_cast<int8_t*>(s.weights);
  const ByteBlock bytes = convert_bytes(block, a.head_dim, count, reinterpret_cast<int8_t*>(s.keys),
                                        reinterpret_cast<int8_t*>(s.values));
  ByteWeights weights[2];
  for (int i = 0; i < 2; ++i) weights[i].bytes = {halves + 2 * i * size, halves + (2 * i + 1) * size};
  const auto sums = [&](int t) {
    int32_t* upper = as_integers(s.wide) + t % 2 * 2 * size;
    return ByteSums{upper, upper + size};
  };
  const auto state = [&](int t) { return state_at(states + t * state_size(rows, width), rows, width); };
  const auto score = [&](int t) { score_bytes(query_bytes(a, s, tiles, t), bytes, a.head_dim, sums(t)); };
  const auto add = [&](int t) {
    const ByteWeights& of = weights[t % 2];
    if (of.any) add_byte_matrices(of.bytes, bytes, rows, a.head_dim, of.folding, state(t).out);
  };
  written();
  score(0);
  for (int t = 0; t < tiles.count; ++t) {
    ask_for_next(block, a.head_dim, t, tiles.count);
    if (t + 1 < tiles.count) score(t + 1);
    weigh_bytes(s, weighing, sums(t), rows, t, state(t), weights[t % 2]);
    written();
    if (t > 0) add(t - 1);
  }
  add(tiles.count - 1);
}

}  // namespace
}  // namespace precast

#endif
