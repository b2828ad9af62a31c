// Attention over a paged KV cache: decode and prefill are tiles of rows against blocks of keys.
//
// Keys are kept transposed within their block, so that a vector holds one feature of neighbouring keys:
// scores need no horizontal sums, at any number of rows. Few rows read the cache as it is; many have a
// block converted to float32 once. Both do the same arithmetic (attention_tile.h). Where there is AMX, caches
// of bf16 have another in common (attention_amx.h, attention_halves.h), and everywhere those of 8 bits theirs
// (attention_integers.h).
#pragma once

#include <utility>

#include "attention_blocks.h"
#include "attention_bytes_amx.h"
#include "attention_integer_rows.h"

namespace precast {
namespace {

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

#if defined(__AMX_BF16__)
// Queries of a register tile behind each other, in halves: those of pack_queries in another order.
inline Halves query_halves(const AttentionArgs& a, const Scratch& s, RowTiles tiles, int t) {
  const int size = tiles.rows * a.head_dim;
  Half* upper = reinterpret_cast<Half*>(s.q) + 2 * t * size;
  return {upper, upper + size};
}

inline void split_queries(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                          const Scratch& s) {
  const int group = a.group(tile.kv_head), dim = a.head_dim;
  const vfloat scale = splat(query_scale(a));
  for (int r = 0; r < tiles.count * tiles.rows; ++r) {
    const Halves all = query_halves(a, s, tiles, r / tiles.rows);
    const int at = r % tiles.rows * dim;
    for (int d = 0; d < dim; d += kMatrixDepth) {
      const float* q = r < rows ? query_at(a, tile, group, r) + d : nullptr;
      const vfloat first = q ? load(q) * scale : vfloat{};
      split(first, q ? load(q + kLanes) * scale : vfloat{}, all.upper + at + d, all.rest + at + d);
    }
  }
}

inline bool by_halves(RowTiles tiles) { return tiles.count == 1 && tiles.rows <= kHalvesRows; }
inline float* wide_queries(const Scratch& s, RowTiles tiles) {
  return s.wide + 2 * tiles.rows * kKeyBlock;
}

template <typename T>
inline void attend_by_halves(const AttentionArgs& a, const Scratch& s, const KeyBlock<T>& block,
                             const Weighing& weighing, RowTiles tiles, float* states) {
  Half* upper = reinterpret_cast<Half*>(s.weights);
  with_rows(
      tiles.rows,
      [&](auto mr) {
        attend_halves<mr>(wide_queries(s, tiles), block, weighing, s.seen, a.head_dim, s.scores,
                          {upper, upper + mr * kKeyBlock}, s.wide,
                          state_at(states, mr, state_width(a)));
      },
      std::make_integer_sequence<int, kHalvesRows>{});
}

template <typename T>
inline void attend_by_matrices(const AttentionArgs& a, const Scratch& s, const KeyBlock<T>& block,
                               int count, const Weighing& weighing, RowTiles tiles, float* states) {
  Half *keys = reinterpret_cast<Half*>(s.keys), *values = reinterpret_cast<Half*>(s.values);
  Half* upper = reinterpret_cast<Half*>(s.weights);
  const Halves weights{upper, upper + tiles.rows * kKeyBlock};
  const int width = state_width(a), shares = kAsksToConvert + kAsksToAttend * tiles.count;
  int asked = 0;
  const auto ask = [&] [[gnu::always_inline]] {
    ask_for_next(block, a.head_dim, asked, shares);
    ++asked;
  };
  bool are_values_there = false;
  const auto need_values = [&] {
    if (!are_values_there) convert_values(block, a.head_dim, count, values, ask);
    are_values_there = true;
  };
  convert_keys(block, a.head_dim, keys, ask);
  for (int t = 0; t < tiles.count; ++t) {
    attend_matrices(query_halves(a, s, tiles, t), {keys, values}, weighing, tiles.rows,
                    s.seen + t * tiles.rows, a.head_dim, s.scores, weights,
                    state_at(states + t * state_size(tiles.rows, width), tiles.rows, width), ask,
                    need_values);
  }
}
#endif

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
    const int64_t head = a.first_query[tile.kv_head] + r % group;
    finish_row(state, r % tiles.rows, width, dim, a.sinks ? a.sinks + head : nullptr,
               out + ((tile.first_token + r / group) * a.q_heads + head) * dim);
  }
}

// A block against all rows of a tile.
template <typename T>
inline void attend_rows(const AttentionArgs& a, const Scratch& s, const KeyBlock<T>& block, int count,
                        const Weighing& weighing, RowTiles tiles, int rows, float* states) {
  const bool direct = is_direct(a, rows);
  if constexpr (std::is_same_v<T, int8_t>) {
#if defined(__AMX_INT8__)
    if (by_bytes(a, rows)) return attend_by_bytes(a, s, block, count, weighing, tiles, states);
#endif
    attend_integers(a, s, block, count, weighing, tiles, direct, states);
  } else {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (by_matrices(a) && by_halves(tiles)) {
        return attend_by_halves(a, s, block, weighing, tiles, states);
      }
      if (by_matrices(a)) return attend_by_matrices(a, s, block, count, weighing, tiles, states);
    }
#endif
    if (direct) return attend_direct(a, s, block, weighing, tiles, states);
    attend_converted(a, s, block, count, weighing, tiles, states);
  }
}

// Calls body with the queries where attend_rows expects them.
template <typename F>
inline void with_queries(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                         const Scratch& s, F&& body) {
#if defined(__AMX_BF16__)
  const FlushDenormals flush(by_matrices(a));
  if (by_matrices(a)) {
    split_queries(a, tile, rows, tiles, s);
    if (by_halves(tiles)) {
      widen_queries(query_halves(a, s, tiles, 0), rows, a.head_dim, wide_queries(s, tiles));
      return body();
    }
    const Tiles registers(attention_shapes(tiles.rows));
    return body();
  }
#endif
#if defined(__AMX_INT8__)
  if (by_bytes(a, rows)) {
    split_queries_to_bytes(a, tile, rows, tiles, s);
    const Tiles registers(byte_shapes(tiles.rows));
    return body();
  }
#endif
  if (a.type == CacheType::kInt8) {
    round_queries(a, tile, rows, tiles, s);
  } else {
    pack_queries(a, tile, rows, tiles, s.q);
  }
  body();
}

template <typename T>
void attend_typed(const AttentionArgs& a, const AttentionTile& tile, float* states, float* out,
                  float* scratch) {
  const int rows = a.group(tile.kv_head) * tile.tokens, width = state_width(a);
  const RowTiles tiles = row_tiles(a, rows);
  const bool apart = states != nullptr;
  const Scratch s = scratch_at(a, rows, scratch);
  const bool scaled = kExtra<T> != 0;
  const Weighing weighing{a.softcap * 1.4426950408889634f, scaled ? s.key_scales : nullptr,
                          scaled ? s.value_scales : nullptr};
  if (!apart) {
    states = s.states;
    new_states(tiles, width, states);
  }
  with_queries(a, tile, rows, tiles, s, [&] {
    for (int64_t start = tile.begin; start < tile.end; start += kKeyBlock) {
      if (apart) new_states(tiles, width, states);
      const KeyBlock<T> block = block_at<T>(a, tile, start);
      if constexpr (kExtra<T> != 0) {
        read_scales(a, tile, start, block, s.key_scales, s.value_scales);
      }
      see(a, tile, rows, tiles.count * tiles.rows, start, s.seen);
      const int64_t count = tile.end - start < kKeyBlock ? tile.end - start : kKeyBlock;
      attend_rows(a, s, block, static_cast<int>(count), weighing, tiles, rows, states);
      if (apart) states += state_floats(a, rows);
    }
  });
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
#if defined(__AMX_BF16__)
  const FlushDenormals flush(by_matrices(a));
#endif
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
