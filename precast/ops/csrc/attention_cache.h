// Writing keys and values into a paged cache, in its type.
#pragma once

#include "attention_tile.h"

namespace precast {
namespace {

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
