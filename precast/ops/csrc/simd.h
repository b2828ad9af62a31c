// Vectors of the width that the instruction set of this compilation unit has. Written with the
// compiler's vector extensions, so that one text serves all widths; intrinsics stand only where there
// is no portable form (half precision, the 8-bit dot product) or GCC 12 makes too much of it.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "prefetch.h"

namespace precast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = kPanel / kLanes;  // vectors to a panel row

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));
typedef int8_t vbyte __attribute__((vector_size(kLanes)));

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vfloat load(const float* p) { return load_as<vfloat>(p); }
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }
// Not `vfloat{} + x`, which is an addition: it makes 0 of -0.
inline vfloat splat(float x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_set1_ps(x);
#else
  return (vfloat)_mm_set1_ps(x);
#endif
}
inline vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }
inline vfloat as_float(vint v) { return (vfloat)v; }

// Clears arrays of vectors, one by one. Not `= {}`, for which GCC 12 calls memset in memory.
template <typename T>
inline void clear(T& x) {
  if constexpr (std::is_array_v<T>) {
    for (auto& part : x) clear(part);
  } else {
    x = T{};
  }
}

// bf16 and fp16 share their storage type, so they are told apart by tags.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Integers widened. GCC 12 does the portable form in halves and joins them: with it attention over bf16
// keys that lay in the caches took twice as long.
inline vint widen(vshort v) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (vint)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vint);
#endif
}
inline vint widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vint)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(load_as<vbyte>(p), vint);
#endif
}
inline vint widen(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return widen(reinterpret_cast<const int8_t*>(p)) & 255;
#endif
}
// The low bytes of integers.
inline void narrow(vint v, int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                          0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, lowest);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#else
  const vbyte bytes = __builtin_convertvector(v, vbyte);
  std::memcpy(to, &bytes, sizeof(bytes));
#endif
}
inline void narrow(vint v, uint16_t* to) {  // the low halves
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)v));
#else
  const vshort halves = __builtin_convertvector(v, vshort);
  std::memcpy(to, &halves, sizeof(halves));
#endif
}

inline vfloat load(const BFloat16* p) {  // the upper half of a float
  return as_float(widen(load_as<vshort>(p)) << 16);
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline float to_float(float x) { return x; }

inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00) {  // infinity or NaN
    bits = sign | 0x7f800000u | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {  // zero or subnormal: a multiple of 2^-24
    const float f = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &f, sizeof(bits));
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline vfloat load(const Float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline vfloat load(const int8_t* p) { return to_float(widen(p)); }
inline float to_float(int8_t x) { return static_cast<float>(x); }

#if defined(__AVX512F__)
inline float reduce_add(vfloat v) { return _mm512_reduce_add_ps((__m512)v); }
inline float reduce_max(vfloat v) { return _mm512_reduce_max_ps((__m512)v); }
#elif defined(__AVX2__)
// Half onto half; GCC 12 takes loops over lanes literally.
template <typename F>
inline float fold(vfloat v, F&& combine) {
  __m128 x = combine(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = combine(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(combine(x, _mm_movehdup_ps(x)));
}
inline float reduce_add(vfloat v) {
  return fold(v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float reduce_max(vfloat v) {
  return fold(v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#else
inline float reduce_add(vfloat v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
inline float reduce_max(vfloat v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}
#endif
// The nearest integer, halves to the even one, for |x| < 2^22: adding 1.5 * 2^23 leaves it in the low bits.
inline vint nearest(vfloat x) { return (vint)(x + 12582912.0f) - 0x4b400000; }
inline vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }
// The same in one instruction; b where either is no number.
inline vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#endif
}
// a * b + c, rounded once where the instruction set can: the compiler has no say in it.
inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The nearest integer of x * factor in the low 16 bits, halves to the even one, for results below 2^15.
inline vint rounded(vfloat x, float factor) {
  return (vint)multiply_add(x, splat(factor), splat(12582912.0f));
}

inline float largest_magnitude(const float* x, int64_t n) {
  vfloat largest = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat v = load(x + i);
    largest = maximum(largest, maximum(v, -v));
  }
  float result = reduce_max(largest);
  for (; i < n; ++i) result = std::fabs(x[i]) > result ? std::fabs(x[i]) : result;
  return result;
}

// e^x for x <= 0, relative error below 2e-7; 0 below -87. Range reduction by powers of two and the
// polynomial of Cephes' expf (S. L. Moshier).
inline vfloat exp_negative(vfloat x) {
  const vint alive = x > -87.0f;
  x = x > -87.0f ? x : splat(-87.0f);
  const vfloat n = x * 1.44269504088896341f;
  // Adding 1.5 * 2^23 rounds to an integer in the low bits.
  const vfloat rounded = n + 12582912.0f;
  const vfloat whole = rounded - 12582912.0f;
  vfloat r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vint exponent = (__builtin_convertvector(whole, vint) + 127) << 23;
  return as_float((vint)(p * as_float(exponent)) & alive);
}

}  // namespace
}  // namespace precast
