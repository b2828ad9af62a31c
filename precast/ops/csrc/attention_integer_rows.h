// Rows of a tile against blocks of 8 bits: their queries as integers, the blocks as pairs or as they are.
#pragma once

#include "attention_integers.h"

namespace precast {
namespace {

// The first `count` keys of a block, and what else is in their panels, as pairs.
inline PairBlock convert_pairs(const KeyBlock<int8_t>& from, int dim, int count, int32_t* keys, int32_t* values) {
  const int width = padded(dim, kPanel), panels = padded(count, kPanel) / kPanel;
  const auto put = [](const int8_t* first, const int8_t* second, int32_t* to) {
    vint pairs[kVectors];
    load_pairs(first, second, pairs);
    std::memcpy(to, pairs, sizeof(pairs));
  };
  for (int p = 0; p < panels; ++p) {
    // The second of an odd last feature is what lies behind it; queries have 0 there.
    const int8_t* key = from.keys[p];
    for (int i = 0; i < feature_pairs(dim); ++i, key += 2 * from.key_stride) {
      put(key, key + from.key_stride, keys + i * kKeyBlock + p * kPanel);
    }
  }
  for (int i = 0; i < panels * kPanel / 2; ++i) {
    const int j = first_of_pair(i);
    const int8_t* first = from.values[j / kPanel] + j % kPanel * from.value_stride;
    const int8_t* second = first + kApart * from.value_stride;
    int32_t* to = values + i * width;
    int d = 0;
    for (; d + kPanel <= dim; d += kPanel) put(first + d, second + d, to + d);
    if (d == dim) continue;
    int8_t rest[2][kPanel] = {};
    std::memcpy(rest[0], first + d, dim - d);
    std::memcpy(rest[1], second + d, dim - d);
    put(rest[0], rest[1], to + d);
  }
  return {keys, values};
}

// Rounds a query, padded by zeros to whole vectors; returns the size of its steps. put(d, bits) gets the
// integers of features from d on.
template <typename F>
inline float round_query(const float* q, int dim, F&& put) {
  const auto features = [&](int d) {
    if (d + kLanes <= dim) return load(q + d);
    float rest[kLanes] = {};
    std::memcpy(rest, q + d, sizeof(float) * (dim - d));
    return load(rest);
  };
  vuint most = {};
  for (int d = 0; d < dim; d += kLanes) most = larger_bits(most, (vuint)features(d) & 0x7fffffff);
  const Steps steps = steps_of(largest_of_bits(most), most_steps(dim));
  for (int d = 0; d < dim; d += kLanes) put(d, rounded(features(d), steps.in_one));
  return steps.size;
}

// Queries of all rows as IntegerQueries of each register tile has them.
inline void round_queries(const AttentionArgs& a, const AttentionTile& tile, int rows, RowTiles tiles,
                          const Scratch& s) {
  const int group = a.group(tile.kv_head), pairs = feature_pairs(a.head_dim);
  int32_t* row = as_integers(s.row);
  const auto put = [&](int d, vint bits) { narrow(bits, reinterpret_cast<uint16_t*>(row) + d); };
  for (int r = 0; r < tiles.count * tiles.rows; ++r) {
    int32_t* y = as_integers(s.q) + r / tiles.rows * tiles.rows * pairs + r % tiles.rows;
    s.steps[r] = 0;
    if (r >= rows) {
      for (int i = 0; i < pairs; ++i) y[i * tiles.rows] = 0;
      continue;
    }
    s.steps[r] = query_scale(a) * round_query(query_at(a, tile, group, r), a.head_dim, put);
    for (int i = 0; i < pairs; ++i) y[i * tiles.rows] = row[i];
  }
}

// A block against all rows of a tile.
inline void attend_integers(const AttentionArgs& a, const Scratch& s, const KeyBlock<int8_t>& block, int count,
                            const Weighing& weighing, RowTiles tiles, bool direct, float* states) {
  const int dim = a.head_dim, width = state_width(a);
  const auto attend = [&](auto mr, int t, const auto& from) {
    const IntegerQueries q{as_integers(s.q) + t * mr * feature_pairs(dim), s.steps + t * mr};
    attend_pairs<mr>(q, from, weighing, s.seen + t * mr, dim, width, s.scores, as_integers(s.weights),
                     state_at(states + t * state_size(mr, width), mr, width));
  };
  if (direct) {
    for (int t = 0; t < tiles.count; ++t) {
      with_rows(
          tiles.rows, [&](auto mr) { attend(mr, t, block); }, std::make_integer_sequence<int, kDirectTile>{});
    }
    return;
  }
  const PairBlock pairs = convert_pairs(block, dim, count, as_integers(s.keys), as_integers(s.values));
  for (int t = 0; t < tiles.count; ++t) {
    ask_for_next(block, dim, t, tiles.count);
    attend(std::integral_constant<int, kTileRows>{}, t, pairs);
  }
}

}  // namespace
}  // namespace precast
