// Attention over a paged KV cache: decode and prefill are tiles of rows against blocks of keys.
//
// Keys are kept transposed within their block, so that a vector holds one feature of neighbouring keys:
// scores need no horizontal sums, at any number of rows. Few rows read the cache as it is; many have a
// block converted to float32 once. Both do the same arithmetic (attention_tile.h).
#pragma once

#include <utility>

#include "attention_blocks.h"

namespace precast {
namespace {

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

inline RowTiles row_tiles(const AttentionArgs& a, int rows) {
  if (!is_direct(a, rows)) return {kTileRows, padded(rows, kTileRows) / kTileRows};
  const int count = padded(rows, kDirectTile) / kDirectTile;
  return {padded(rows, count) / count, count};
}

inline int state_width(const AttentionArgs& a) { return padded(a.head_dim, kPanel); }

int64_t state_floats(const AttentionArgs& a, int rows) {
  const RowTiles tiles = row_tiles(a, rows);
  return tiles.count * state_size(tiles.rows, state_width(a));
}

// Scratch of a tile, one part after the other; each begins on a cache line.
struct Scratch {
  float *q, *states, *scores, *key_scales, *value_scales, *keys, *values;
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
  const bool direct = is_direct(a, rows);
  Scratch s{};
  s.q = take(static_cast<int64_t>(tiles.count) * tiles.rows * a.head_dim);
  s.states = take(state_floats(a, rows));
  s.scores = take(tiles.rows * kKeyBlock);
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

// Queries as [tiles][dim][rows], so that a register tile finds its rows' at constant distances; scaled
// so that weights are powers of two, or for the cap.
inline void pack_queries(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                         float* to) {
  const int group = a.group(tile.kv_head), dim = a.head_dim;
  const float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale * 1.4426950408889634f;
  for (int r = 0; r < tiles.count * tiles.rows; ++r) {
    float* y = to + r / tiles.rows * tiles.rows * dim + r % tiles.rows;
    if (r >= rows) {
      for (int d = 0; d < dim; ++d) y[d * tiles.rows] = 0;
      continue;
    }
    const float* q = a.q + (tile.first_token + r / group) * a.q_stride +
                     (a.first_query[tile.kv_head] + r % group) * dim;
    for (int d = 0; d < dim; ++d) y[d * tiles.rows] = q[d] * scale;
  }
}

// Which keys of the block from `start` on each row sees; rows that pad see none.
inline void see(const AttentionArgs& a, const AttentionTile& tile, int rows, int padded_rows,
                int64_t start, Seen* seen) {
  const int group = a.group(tile.kv_head);
  const auto within = [&](int64_t key) {
    return static_cast<int>(key < 0 ? 0 : key > kKeyBlock ? kKeyBlock : key);
  };
  for (int r = 0; r < rows; r += group) {
    const int64_t position = tile.first_position + r / group;
    const int64_t end = position + 1 < tile.end ? position + 1 : tile.end;
    const int64_t first = a.window > 0 ? position + 1 - a.window - start : 0;
    for (int i = 0; i < group; ++i) seen[r + i] = {within(first), within(end - start)};
  }
  for (int r = rows; r < padded_rows; ++r) seen[r] = {0, 0};
}

template <typename F, int... Ns>
inline void with_rows(int rows, F&& body, std::integer_sequence<int, Ns...>) {
  (void)((rows == Ns + 1 && (body(std::integral_constant<int, Ns + 1>{}), true)) || ...);
}

template <int MR, typename Block>
inline void attend_tile(const AttentionArgs& a, const Scratch& s, const Block& block,
                        const Weighing& weighing, int t, float* states) {
  const int width = state_width(a);
  attend_block<MR>(s.q + t * MR * a.head_dim, block, weighing, s.seen + t * MR, a.head_dim, width,
                   s.scores, state_at(states + t * state_size(MR, width), MR, width));
}

template <typename T>
inline void attend_direct(const AttentionArgs& a, const Scratch& s, const KeyBlock<T>& block,
                          const Weighing& weighing, RowTiles tiles, float* states) {
  for (int t = 0; t < tiles.count; ++t) {
    with_rows(
        tiles.rows, [&](auto mr) { attend_tile<mr>(a, s, block, weighing, t, states); },
        std::make_integer_sequence<int, kDirectTile>{});
  }
}

// Asks for a tile's share of the next block. Always inline, as all that only prefetches (prefetch.h).
template <typename T>
[[gnu::always_inline]] inline void ask_for_next(const KeyBlock<T>& block, int dim, int t, int tiles) {
  for (int d = t * dim / tiles; d < (t + 1) * dim / tiles; ++d) {
    for (const T* keys : block.next_keys) soon(keys + d * block.key_stride);
  }
  for (int j = t * kKeyBlock / tiles; j < (t + 1) * kKeyBlock / tiles; ++j) {
    const T* value = block.next_values[j / kPanel] + j % kPanel * block.value_stride;
    for (int d = 0; d < dim; d += kLineBytes / sizeof(T)) soon(value + d);
  }
}

template <typename T>
inline void attend_converted(const AttentionArgs& a, const Scratch& s, const KeyBlock<T>& block,
                             int count, const Weighing& weighing, RowTiles tiles, float* states) {
  convert_block(block, a.head_dim, count, s.keys, s.values);
  const ConvertedBlock converted = converted_block(a.head_dim, s.keys, s.values);
  for (int t = 0; t < tiles.count; ++t) {
    ask_for_next(block, a.head_dim, t, tiles.count);
    attend_tile<kTileRows>(a, s, converted, weighing, t, states);
  }
}

inline void new_states(RowTiles tiles, int width, float* states) {
  for (int t = 0; t < tiles.count; ++t) {
    new_state(states + t * state_size(tiles.rows, width), tiles.rows, width);
  }
}

void write_output(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                  float* states, float* out) {
  const int group = a.group(tile.kv_head), dim = a.head_dim, width = state_width(a);
  for (int r = 0; r < rows; ++r) {
    float* at = states + r / tiles.rows * state_size(tiles.rows, width);
    const State state = state_at(at, tiles.rows, width);
    finish_row(state, r % tiles.rows, width, dim,
               out + ((tile.first_token + r / group) * a.q_heads + a.first_query[tile.kv_head] +
                      r % group) * dim);
  }
}

template <typename T>
void attend_typed(const AttentionArgs& a, const AttentionTile& tile, float* states, float* out,
                  float* scratch) {
  const int rows = a.group(tile.kv_head) * tile.tokens, width = state_width(a);
  const RowTiles tiles = row_tiles(a, rows);
  const bool direct = is_direct(a, rows), apart = states != nullptr;
  const Scratch s = scratch_at(a, rows, scratch);
  const bool scaled = kExtra<T> != 0;
  const Weighing weighing{a.softcap * 1.4426950408889634f, scaled ? s.key_scales : nullptr,
                          scaled ? s.value_scales : nullptr};
  pack_queries(a, tile, rows, tiles, s.q);
  if (!apart) {
    states = s.states;
    new_states(tiles, width, states);
  }
  for (int64_t start = tile.begin; start < tile.end; start += kKeyBlock) {
    if (apart) new_states(tiles, width, states);
    const KeyBlock<T> block = block_at<T>(a, tile, start);
    if constexpr (kExtra<T> != 0) {
      read_scales(a, tile, start, block, s.key_scales, s.value_scales);
    }
    see(a, tile, rows, tiles.count * tiles.rows, start, s.seen);
    if (direct) {
      attend_direct(a, s, block, weighing, tiles, states);
    } else {
      const int64_t count = tile.end - start < kKeyBlock ? tile.end - start : kKeyBlock;
      attend_converted(a, s, block, static_cast<int>(count), weighing, tiles, states);
    }
    if (apart) states += state_floats(a, rows);
  }
  if (!apart) write_output(a, tile, rows, tiles, states, out);
}

void attend(const AttentionArgs& a, const AttentionTile& tile, float* states, float* out,
            float* scratch) {
  switch (a.type) {
    case CacheType::kFloat32:
      return attend_typed<float>(a, tile, states, out, scratch);
    case CacheType::kBFloat16:
      return attend_typed<BFloat16>(a, tile, states, out, scratch);
    case CacheType::kInt8:
      return attend_typed<int8_t>(a, tile, states, out, scratch);
  }
}

void merge_states(const AttentionArgs& a, const AttentionTile& tile, const float* states, float* out,
                  float* scratch) {
  const int rows = a.group(tile.kv_head) * tile.tokens, width = state_width(a);
  const RowTiles tiles = row_tiles(a, rows);
  const int64_t size = state_size(tiles.rows, width), all = state_floats(a, rows);
  float* whole = scratch_at(a, rows, scratch).states;
  new_states(tiles, width, whole);
  for (int64_t start = tile.begin; start < tile.end; start += kKeyBlock, states += all) {
    for (int t = 0; t < tiles.count; ++t) {
      float* block = const_cast<float*>(states) + t * size;
      fold_state(state_at(whole + t * size, tiles.rows, width), state_at(block, tiles.rows, width),
                 tiles.rows, width);
    }
  }
  write_output(a, tile, rows, tiles, whole, out);
}

}  // namespace
}  // namespace precast
