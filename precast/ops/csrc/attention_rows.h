// How the rows of a tile are cut into register tiles, and where what they need is in its scratch.
#pragma once

#include <utility>

#include "attention_halves.h"
#include "attention_tile.h"

namespace precast {
namespace {

inline int padded(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Rows up to which the cache is read in its own type, in tiles of at most kDirectTile.
constexpr int kDirectTile = kTileRows < 6 ? kTileRows : 6;
constexpr int kDirectRows = 2 * kDirectTile;

// How a tile's rows are cut into register tiles of `rows`, the last one padded.
struct RowTiles {
  int rows, count;
};

// Rows of odd features go the converted way, where features are padded.
inline bool is_direct(const AttentionArgs& a, int rows) {
  return rows <= kDirectRows && a.head_dim % kPanel == 0;
}

// Whether products are of whole matrices.
inline bool by_matrices(const AttentionArgs& a) {
#if defined(__AMX_BF16__)
  return a.type == CacheType::kBFloat16 && a.head_dim % kMatrixDepth == 0;
#else
  (void)a;
  return false;
#endif
}

// Whether products of integers are, too: their bits are those of pairs.
inline bool by_bytes(const AttentionArgs& a, int rows) {
#if defined(__AMX_INT8__)
  return a.type == CacheType::kInt8 && rows > kDirectRows && a.head_dim % kPanel == 0 && a.head_dim > kPanel;
#else
  (void)a, (void)rows;
  return false;
#endif
}

inline RowTiles row_tiles(const AttentionArgs& a, int rows) {
#if defined(__AMX_BF16__)
  if (by_matrices(a) || by_bytes(a, rows)) {
    const int count = padded(rows, kMatrixRows) / kMatrixRows;
    return {padded(rows, count) / count, count};
  }
#endif
  if (!is_direct(a, rows)) return {kTileRows, padded(rows, kTileRows) / kTileRows};
  const int count = padded(rows, kDirectTile) / kDirectTile;
  return {padded(rows, count) / count, count};
}

// Calls body with the number of rows, of which there are instances for 1 to sizeof...(Ns).
template <typename F, int... Ns>
inline void with_rows(int rows, F&& body, std::integer_sequence<int, Ns...>) {
  (void)((rows == Ns + 1 && (body(std::integral_constant<int, Ns + 1>{}), true)) || ...);
}

inline int state_width(const AttentionArgs& a) { return padded(a.head_dim, kPanel); }

int64_t state_floats(const AttentionArgs& a, int rows) {
  const RowTiles tiles = row_tiles(a, rows);
  return tiles.count * state_size(tiles.rows, state_width(a));
}

// Scratch of a tile, one part after the other; each begins on a cache line.
struct Scratch {
  float *q, *states, *scores, *key_scales, *value_scales, *keys, *values;
  float *weights, *wide;  // in halves, and those of few rows as floats: weights, then queries
  float *steps, *row;     // of queries that are integers: the size of their steps, and one of them
  Seen* seen;
  int64_t floats;
};

inline Scratch scratch_at(const AttentionArgs& a, int rows, float* at) {
  const RowTiles tiles = row_tiles(a, rows);
  const float* begin = at;
  const auto take = [&](int64_t floats) {
    float* part = at;
    at += ceil_div(floats, 16) * 16;
    return part;
  };
  const bool matrices = by_matrices(a), direct = !matrices && is_direct(a, rows);
  const bool integers = a.type == CacheType::kInt8;
  Scratch s{};
  s.q = take(static_cast<int64_t>(tiles.count) * tiles.rows * a.head_dim);
  s.states = take(state_floats(a, rows));
  s.scores = take(tiles.rows * kKeyBlock);
  s.weights = take(matrices || integers ? tiles.rows * kKeyBlock : 0);
  s.wide = take(matrices ? 2 * tiles.rows * (kKeyBlock + a.head_dim) : integers ? 4 * tiles.rows * kKeyBlock : 0);
  s.steps = take(integers ? tiles.count * tiles.rows : 0);
  s.row = take(integers ? a.head_dim : 0);
  s.key_scales = take(kKeyBlock);
  s.value_scales = take(kKeyBlock);
  s.seen = reinterpret_cast<Seen*>(take(2 * tiles.count * tiles.rows));
  s.keys = take(direct ? 0 : kKeyBlock * a.head_dim);
  s.values = take(direct ? 0 : kKeyBlock * padded(state_width(a), kTileFeatures));
  s.floats = at - begin;
  return s;
}

int64_t scratch_floats(const AttentionArgs& a, int rows) {
  return scratch_at(a, rows, nullptr).floats;
}

inline float query_scale(const AttentionArgs& a) {
  return a.softcap > 0 ? a.scale / a.softcap : a.scale * 1.4426950408889634f;
}

// The query of a tile's row.
inline const float* query_at(const AttentionArgs& a, const AttentionTile& tile, int group, int row) {
  return a.q + (tile.first_token + row / group) * a.q_stride +
         (a.first_query[tile.kv_head] + row % group) * a.head_dim;
}

// Queries as [tiles][dim][rows], so that a register tile finds its rows' at constant distances; scaled
// so that weights are powers of two, or for the cap.
inline void pack_queries(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                         float* to) {
  const int group = a.group(tile.kv_head), dim = a.head_dim;
  const float scale = query_scale(a);
  for (int r = 0; r < tiles.count * tiles.rows; ++r) {
    float* y = to + r / tiles.rows * tiles.rows * dim + r % tiles.rows;
    if (r >= rows) {
      for (int d = 0; d < dim; ++d) y[d * tiles.rows] = 0;
      continue;
    }
    const float* q = query_at(a, tile, group, r);
    for (int d = 0; d < dim; ++d) y[d * tiles.rows] = q[d] * scale;
  }
}

}  // namespace
}  // namespace precast
