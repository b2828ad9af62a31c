// Blocks of keys and values: where they lie in the paged cache, and their conversion to float32.
#pragma once

#include "attention_rows.h"

namespace precast {
namespace {

// Where the kPanel keys from token `at` on lie, and their values.
template <typename T>
struct Panel {
  const T *keys, *values;
  const char* key_scales;
};

template <typename T>
inline Panel<T> panel_at(const AttentionArgs& a, const AttentionTile& tile, int64_t at) {
  const int64_t head_size = static_cast<int64_t>(a.head_dim + kExtra<T>) * a.block_size;
  const int64_t block = tile.block_table[at / a.block_size], offset = at % a.block_size;
  const int64_t head = (block * a.kv_heads + tile.kv_head) * head_size;
  const T* keys = static_cast<const T*>(a.k_cache) + head;
  return {keys + offset, static_cast<const T*>(a.v_cache) + head + offset * (a.head_dim + kExtra<T>),
          reinterpret_cast<const char*>(keys + static_cast<int64_t>(a.head_dim) * a.block_size) +
              offset * sizeof(float)};
}

// Where the panels of the block from token `start` on lie; those behind the tile's end repeat the last.
template <typename T>
inline void find_panels(const AttentionArgs& a, const AttentionTile& tile, int64_t start, const T** keys,
                        const T** values) {
  const int64_t last = (tile.end - 1) / kPanel * kPanel;
  for (int p = 0; p < kKeyPanels; ++p) {
    const int64_t at = start + p * kPanel;
    const Panel<T> panel = panel_at<T>(a, tile, at < last ? at : last);
    keys[p] = panel.keys;
    values[p] = panel.values;
  }
}

// What is read after it is the tile's next block, or the next tile's first, or for want of one itself.
template <typename T>
inline KeyBlock<T> block_at(const AttentionArgs& a, const AttentionTile& tile, int64_t start) {
  KeyBlock<T> block{};
  block.key_stride = a.block_size;
  block.value_stride = a.head_dim + kExtra<T>;
  find_panels(a, tile, start, block.keys, block.values);
  const AttentionTile* next = &tile;
  int64_t at = start + kKeyBlock;
  if (at >= tile.end) {
    const bool more = tile.next != nullptr && tile.next->begin < tile.next->end;
    next = more ? tile.next : &tile;
    at = more ? next->begin : start;
  }
  find_panels(a, *next, at, block.next_keys, block.next_values);
  return block;
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
inline void read_scales(const AttentionArgs& a, const AttentionTile& tile, int64_t start,
                        const KeyBlock<T>& block, float* key_scales, float* value_scales) {
  for (int p = 0; p < kKeyPanels && start + p * kPanel < tile.end; ++p) {
    const Panel<T> panel = panel_at<T>(a, tile, start + p * kPanel);
    std::memcpy(key_scales + p * kPanel, panel.key_scales, sizeof(float) * kPanel);
    for (int i = 0; i < kPanel; ++i) {
      std::memcpy(value_scales + p * kPanel + i,
                  block.values[p] + i * block.value_stride + a.head_dim, sizeof(float));
    }
  }
}

// Keys as [kKeyPanels][dim][kPanel], values as ConvertedBlock has them, with features padded by zeros.
template <typename T>
inline void convert_block(const KeyBlock<T>& from, int dim, int count, float* converted_keys,
                          float* converted_values) {
  for (int p = 0; p * kPanel < count; ++p) {
    const T* keys = from.keys[p];
    float* to = converted_keys + p * dim * kPanel;
    for (int d = 0; d < dim; ++d, keys += from.key_stride, to += kPanel) {
      for (int v = 0; v < kPanel; v += kLanes) store(to + v, load(keys + v));
    }
  }
  for (int j = 0; j < count; ++j) {
    const T* value = from.values[j / kPanel] + j % kPanel * from.value_stride;
    float* to = converted_values + j * kTileFeatures;
    const auto feature = [&](int d) {
      return to + d / kTileFeatures * kTileFeatures * kKeyBlock + d % kTileFeatures;
    };
    int d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(feature(d), load(value + d));
    for (; d < padded(dim, kPanel); d += kLanes) {
      float rest[kLanes] = {};
      for (int i = 0; d + i < dim && i < kLanes; ++i) rest[i] = to_float(value[d + i]);
      store(feature(d), load(rest));
    }
  }
}

inline ConvertedBlock converted_block(int dim, const float* keys, const float* values) {
  ConvertedBlock block{};
  for (int p = 0; p < kKeyPanels; ++p) block.keys[p] = keys + p * dim * kPanel;
  block.values[0] = values;
  return block;
}

}  // namespace
}  // namespace precast
