// Attention over a paged KV cache: decode and prefill are the same tile of rows against blocks of keys.
//
// Keys are kept transposed within their block, so that a vector holds one feature of neighbouring keys:
// scores need no horizontal sums, at any number of rows.
#pragma once

#include <cmath>
#include <utility>

#include "quantize.h"

namespace precast {
namespace {

// Rows of a register tile, and its vectors along the keys or the features.
constexpr int kTileRows = kVectors == 1 ? 6 : 3;
constexpr int kTileVectors = kVectors == 1 ? 4 : 2;

template <typename T>
constexpr int kExtra = sizeof(T) == 1 ? kScaleBytes : 0;  // rows of K, columns of V that hold scales

template <typename F, int... Ns>
inline void with_rows(int rows, F&& body, std::integer_sequence<int, Ns...>) {
  (void)((rows == Ns + 1 && (body(std::integral_constant<int, Ns + 1>{}), true)) || ...);
}

// Calls body(first, integral_constant<count>) for runs of at most kTileRows rows.
template <typename F>
inline void for_row_tiles(int rows, F&& body) {
  for (int r = 0; r < rows; r += kTileRows) {
    const int count = rows - r < kTileRows ? rows - r : kTileRows;
    with_rows(
        count, [&](auto n) { body(r, n); }, std::make_integer_sequence<int, kTileRows>{});
  }
}

// A block of the cache for one KV head, and how many of its tokens are wanted.
template <typename T>
struct Block {
  const T *k, *v;
  int count;
};

// What is asked for meanwhile for each step of NV vectors: as much as the step itself reads. Blocks lie
// anywhere in memory, and the processor's own prefetching begins anew in each.
template <typename T, int NV>
constexpr int kLinesAhead = NV * kLanes * sizeof(T) > kLineBytes ? NV * kLanes * sizeof(T) / kLineBytes : 1;

// scores[r][j] = q[r] . key j
template <typename T, int MR, int NV>
inline void score_keys(const float* const* q, const T* k, int dim, int block_size, Prefetch& ahead,
                       float* scores) {
  vfloat acc[MR][NV] = {};
  for (int d = 0; d < dim; ++d) {
    ahead.ask(kLinesAhead<T, NV>);
    for (int v = 0; v < NV; ++v) {
      const vfloat keys = load(k + d * block_size + v * kLanes);
      for (int r = 0; r < MR; ++r) acc[r][v] += keys * q[r][d];
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int v = 0; v < NV; ++v) store(scores + r * block_size + v * kLanes, acc[r][v]);
  }
}

template <typename T>
inline void score_block(const float* const* q, const T* k, int rows, int dim, int block_size,
                        Prefetch& ahead, float* scores) {
  for_row_tiles(rows, [&](int r, auto mr) {
    float* s = scores + r * block_size;
    int j = 0;
    for (; j + 2 * kLanes <= block_size; j += 2 * kLanes) {
      score_keys<T, mr, 2>(q + r, k + j, dim, block_size, ahead, s + j);
    }
    for (; j < block_size; j += kLanes) {
      score_keys<T, mr, 1>(q + r, k + j, dim, block_size, ahead, s + j);
    }
  });
}

// out[r] = out[r] * shrink[r] + sum over keys of weights[r][j] * value j, for NV vectors of features
template <typename T, int MR, int NV>
inline void add_values(const float* weights, const float* shrink, const T* v, int begin, int end,
                       int dim, int block_size, Prefetch& ahead, float* out) {
  vfloat acc[MR][NV];
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) acc[r][n] = load(out + r * dim + n * kLanes) * shrink[r];
  }
  for (int j = begin; j < end; ++j) {
    ahead.ask(kLinesAhead<T, NV>);
    for (int n = 0; n < NV; ++n) {
      const vfloat values = load(v + j * (dim + kExtra<T>) + n * kLanes);
      for (int r = 0; r < MR; ++r) acc[r][n] += values * weights[r * block_size + j];
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int n = 0; n < NV; ++n) store(out + r * dim + n * kLanes, acc[r][n]);
  }
}

template <typename T>
inline void add_block(const float* weights, const float* shrink, const T* v, int rows, int begin,
                      int end, int dim, int block_size, Prefetch& ahead, float* out) {
  for_row_tiles(rows, [&](int r, auto mr) {
    const float* w = weights + r * block_size;
    float* y = out + r * dim;
    int d = 0;
    for (; d + kTileVectors * kLanes <= dim; d += kTileVectors * kLanes) {
      add_values<T, mr, kTileVectors>(w, shrink + r, v + d, begin, end, dim, block_size, ahead,
                                      y + d);
    }
    for (; d + kLanes <= dim; d += kLanes) {
      add_values<T, mr, 1>(w, shrink + r, v + d, begin, end, dim, block_size, ahead, y + d);
    }
    for (; d < dim; ++d) {
      for (int i = 0; i < mr; ++i) {
        float total = y[i * dim + d] * shrink[r + i];
        for (int j = begin; j < end; ++j) {
          total += w[i * block_size + j] * to_float(v[j * (dim + kExtra<T>) + d]);
        }
        y[i * dim + d] = total;
      }
    }
  });
}

// Softmax weights of one row's scores in a block, of which [low, high) are seen, kept stable across
// blocks by a running maximum (Milakov and Gimelshein, "Online normalizer calculation for softmax",
// 2018). Returns by how much what was summed before shrinks. Whole vectors, the unseen ones' weights 0:
// one by one, scaling and the maximum took about a sixth of prefill's attention.
inline float soften(const AttentionArgs& a, float* scores, const float* key_scales, int low,
                    int high, float* maximum, float* denominator) {
  if (low >= high) {
    std::memset(scores, 0, sizeof(float) * a.block_size);
    return 1;
  }
  for (int j = 0; j < a.block_size; j += kLanes) {
    const vfloat score = load(scores + j) * a.scale;
    store(scores + j, key_scales ? score * load(key_scales + j) : score);
  }
  if (a.softcap > 0) {
    for (int j = low; j < high; ++j) scores[j] = a.softcap * std::tanh(scores[j] / a.softcap);
  }
  for (int j = 0; j < low; ++j) scores[j] = -INFINITY;
  for (int j = high; j < a.block_size; ++j) scores[j] = -INFINITY;
  vfloat most = splat(*maximum);
  for (int j = 0; j < a.block_size; j += kLanes) most = precast::maximum(load(scores + j), most);
  const float largest = reduce_max(most);
  vfloat total = {};
  for (int j = 0; j < a.block_size; j += kLanes) {
    const vfloat weight = exp_negative(load(scores + j) - largest);
    store(scores + j, weight);
    total += weight;
  }
  const float shrink = *maximum == largest ? 1.0f : std::exp(*maximum - largest);
  *denominator = *denominator * shrink + reduce_add(total);
  *maximum = largest;
  return shrink;
}

// Softmax weights of the keys that are seen, times the scales behind their int8 values.
inline void scale_weights(const int8_t* v, int rows, int low, int high, int dim, int block_size,
                          float* weights) {
  for (int j = low / kLanes * kLanes; j < high; j += kLanes) {
    float scales[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      scales[i] = load_as<float>(v + static_cast<int64_t>(j + i) * (dim + kScaleBytes) + dim);
    }
    for (int r = 0; r < rows; ++r) {
      float* w = weights + r * block_size + j;
      store(w, load(w) * load(scales));
    }
  }
}

// The block of a tile's context that begins with token `start`.
template <typename T>
inline Block<T> block_at(const AttentionArgs& a, const AttentionTile& tile, int64_t start) {
  const int64_t head_size = static_cast<int64_t>(a.head_dim + kExtra<T>) * a.block_size;
  const int64_t block = tile.block_table[start / a.block_size], left = tile.end - start;
  const int64_t at = (block * a.kv_heads + tile.kv_head) * head_size;
  return {static_cast<const T*>(a.k_cache) + at, static_cast<const T*>(a.v_cache) + at,
          left < a.block_size ? static_cast<int>(left) : a.block_size};
}

// What is read after the block at `start`: the tile's next one, or the next tile's first.
template <typename T>
inline Block<T> block_after(const AttentionArgs& a, const AttentionTile& tile, int64_t start) {
  if (start + a.block_size < tile.end) return block_at<T>(a, tile, start + a.block_size);
  const AttentionTile* next = tile.next;
  return next && next->begin < next->end ? block_at<T>(a, *next, next->begin) : Block<T>{};
}

template <typename T>
void attend_typed(const AttentionArgs& a, const AttentionTile& tile, float* out, float* maximum,
                  float* denominator, float* scores) {
  const int group = a.group(tile.kv_head), rows = group * tile.tokens;
  const int dim = a.head_dim, size = a.block_size;
  const float* q[kMaxTileRows];
  float shrink[kMaxTileRows];
  for (int r = 0; r < rows; ++r) {
    q[r] = a.q + (tile.first_token + r / group) * a.q_stride +
           (a.first_query[tile.kv_head] + r % group) * dim;
    maximum[r] = -INFINITY;
    denominator[r] = 0;
  }
  std::memset(out, 0, sizeof(float) * rows * dim);
  for (int64_t start = tile.begin; start < tile.end; start += size) {
    const auto [k, v, count] = block_at<T>(a, tile, start);
    const Block<T> next = block_after<T>(a, tile, start);
    const int64_t value_bytes = (dim + kExtra<T>) * sizeof(T);
    Prefetch keys_ahead(next.k, next.count > 0 ? size * value_bytes : 0);
    Prefetch values_ahead(next.v, next.count * value_bytes);
    const float* key_scales =
        kExtra<T> ? reinterpret_cast<const float*>(k + static_cast<int64_t>(dim) * size) : nullptr;
    score_block(q, k, rows, dim, size, keys_ahead, scores);
    int seen_low = size, seen_high = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t position = tile.first_position + r / group;
      const int64_t first = a.window > 0 ? position - a.window + 1 - start : 0;
      const int64_t past = position + 1 - start;
      const int low = first > 0 ? static_cast<int>(first < count ? first : count) : 0;
      const int high = past < count ? static_cast<int>(past > 0 ? past : 0) : count;
      shrink[r] =
          soften(a, scores + r * size, key_scales, low, high, maximum + r, denominator + r);
      seen_low = low < seen_low ? low : seen_low;
      seen_high = high > seen_high ? high : seen_high;
    }
    if constexpr (kExtra<T> != 0) scale_weights(v, rows, seen_low, seen_high, dim, size, scores);
    add_block(scores, shrink, v, rows, seen_low, seen_high, dim, size, values_ahead, out);
    values_ahead.ask(values_ahead.lines);
  }
}

void attend(const AttentionArgs& a, const AttentionTile& tile, float* out, float* maximum,
            float* denominator, float* scratch) {
  switch (a.type) {
    case CacheType::kFloat32:
      return attend_typed<float>(a, tile, out, maximum, denominator, scratch);
    case CacheType::kBFloat16:
      return attend_typed<BFloat16>(a, tile, out, maximum, denominator, scratch);
    case CacheType::kInt8:
      return attend_typed<int8_t>(a, tile, out, maximum, denominator, scratch);
  }
}

void merge_parts(const AttentionArgs& a, const AttentionTile& tile, const float* parts, int count,
                 float* out) {
  const int group = a.group(tile.kv_head), dim = a.head_dim, rows = group * tile.tokens;
  const int64_t part_floats = static_cast<int64_t>(rows) * (dim + 2);
  for (int r = 0; r < rows; ++r) {
    const float* maxima = parts + static_cast<int64_t>(rows) * dim + r;
    const float* x = parts + static_cast<int64_t>(r) * dim;
    float* y = out + ((tile.first_token + r / group) * a.q_heads + a.first_query[tile.kv_head] +
                      r % group) * dim;
    float largest = -INFINITY, denominator = 0;
    for (int p = 0; p < count; ++p) {
      const float m = maxima[p * part_floats];
      largest = m > largest ? m : largest;
    }
    if (largest == -INFINITY) {  // nothing was seen: a row that only pads
      std::memset(y, 0, sizeof(float) * dim);
      continue;
    }
    const auto weight_of = [&](int p) {
      return count == 1 ? 1.0f : std::exp(maxima[p * part_floats] - largest);
    };
    for (int p = 0; p < count; ++p) denominator += weight_of(p) * maxima[p * part_floats + rows];
    for (int p = 0; p < count; ++p, x += part_floats) {
      const float weight = weight_of(p) / denominator;
      int d = 0;
      for (; d + kLanes <= dim; d += kLanes) {
        const vfloat part = load(x + d) * weight;
        store(y + d, p == 0 ? part : load(y + d) + part);
      }
      for (; d < dim; ++d) y[d] = weight * x[d] + (p == 0 ? 0.0f : y[d]);
    }
  }
}

// ---- writing the cache -----------------------------------------------------------------------

inline void convert(vfloat x, float, float* to) { store(to, x); }
inline void convert(vfloat x, float, BFloat16* to) {  // rounds to nearest, ties to even
  const vuint bits = (vuint)x;
  const vuint rounded = bits + 0x7fff + (bits >> 16 & 1);
  const vuint quiet = bits | 0x400000;  // NaN stays one
  narrow((vint)(((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded) >> 16), &to->bits);
}
inline void convert(vfloat x, float inverse, int8_t* to) { narrow(nearest(x * inverse), to); }

// Writes x[0..dim) to `to` with the given stride, and for int8 its scale to `scale`.
template <typename T>
inline void put(const float* x, int dim, T* to, int64_t stride, void* scale) {
  float inverse = 0;
  if constexpr (kExtra<T> != 0) {
    const float largest = largest_magnitude(x, dim), value = largest / 127.0f;
    inverse = largest > 0 ? 127.0f / largest : 0.0f;
    std::memcpy(scale, &value, sizeof(value));
  }
  for (int d = 0; d < dim; d += kLanes) {
    const int count = dim - d < kLanes ? dim - d : kLanes;
    float values[kLanes] = {};
    T converted[kLanes];
    std::memcpy(values, x + d, sizeof(float) * count);
    convert(load(values), inverse, converted);
    if (stride == 1) {
      std::memcpy(to + d, converted, sizeof(T) * count);
    } else {
      for (int i = 0; i < count; ++i) to[(d + i) * stride] = converted[i];
    }
  }
}

template <typename T>
void store_typed(const AttentionArgs& a, const float* k, int64_t k_stride, const float* v,
                 int64_t v_stride, const int32_t* slots, int64_t begin, int64_t end) {
  const int dim = a.head_dim, size = a.block_size;
  const int64_t head_size = static_cast<int64_t>(dim + kExtra<T>) * size;
  T* keys = const_cast<T*>(static_cast<const T*>(a.k_cache));
  T* values = const_cast<T*>(static_cast<const T*>(a.v_cache));
  for (int64_t t = begin; t < end; ++t) {
    if (slots[t] < 0) continue;  // a row that only pads the batch
    const int64_t block = slots[t] / size, offset = slots[t] % size;
    for (int h = 0; h < a.kv_heads; ++h) {
      const int64_t at = (block * a.kv_heads + h) * head_size;
      T* key = keys + at;
      T* value = values + at + offset * (dim + kExtra<T>);
      put(k + t * k_stride + h * dim, dim, key + offset, size,
          reinterpret_cast<float*>(key + static_cast<int64_t>(dim) * size) + offset);
      put(v + t * v_stride + h * dim, dim, value, 1, value + dim);
    }
  }
}

void store_cache(const AttentionArgs& a, const float* k, int64_t k_stride, const float* v,
                 int64_t v_stride, const int32_t* slots, int64_t begin, int64_t end) {
  switch (a.type) {
    case CacheType::kFloat32:
      return store_typed<float>(a, k, k_stride, v, v_stride, slots, begin, end);
    case CacheType::kBFloat16:
      return store_typed<BFloat16>(a, k, k_stride, v, v_stride, slots, begin, end);
    case CacheType::kInt8:
      return store_typed<int8_t>(a, k, k_stride, v, v_stride, slots, begin, end);
  }
}

}  // namespace
}  // namespace precast
