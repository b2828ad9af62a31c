// Compiled once for each instruction set, without contraction to fused multiply-adds, so that all give
// the same bits (see precast/ops/build.py).
#include <algorithm>

#include "sampling.h"
#include "simd.h"

#define PRECAST_CAT_(a, b) a##b
#define PRECAST_CAT(a, b) PRECAST_CAT_(a, b)

namespace precast {
namespace {

constexpr int64_t kGroups = kSampleBlock / kPanel;  // of 16 logits in a block

// A block's logits: where they lie, or in `padded` with -inf behind the row's end.
const float* block_at(const float* x, int64_t n, int64_t block, float* padded) {
  const int64_t first = block * kSampleBlock, count = n - first;
  if (count >= kSampleBlock) return x + first;
  std::fill(padded, padded + kSampleBlock, -INFINITY);
  std::memcpy(padded, x + first, count * sizeof(float));
  return padded;
}

bool any(vint v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)v, (__m256i)v) == 0;
#else
  return (v[0] | v[1] | v[2] | v[3]) != 0;
#endif
}

// The 16 columns of a block added up: halves onto each other, whatever the vectors' width.
float fold_panel(const float* columns) {
  typedef float quad __attribute__((vector_size(16)));
  const quad a = load_as<quad>(columns) + load_as<quad>(columns + 8);
  const quad b = load_as<quad>(columns + 4) + load_as<quad>(columns + 12);
  const quad c = a + b;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

// `value(i)` of the vector at i in a block, summed.
template <typename F>
float sum_block(F&& value) {
  static_assert(kGroups == 4);
  alignas(64) float columns[kPanel];
  for (int v = 0; v < kPanel; v += kLanes) {
    store(columns + v, (value(v) + value(kPanel + v)) + (value(2 * kPanel + v) + value(3 * kPanel + v)));
  }
  return fold_panel(columns);
}

// Clears tokens of a block that its two words of the mask don't allow.
void apply_mask(float* x, const uint32_t* words) {
  vuint bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = 1u << i;
  for (int i = 0; i < kSampleBlock; i += kLanes) {
    const vuint word = vuint{} + (words[i / 32] >> (i % 32));
    store(x + i, (word & bits) != 0 ? load(x + i) : splat(-INFINITY));
  }
}

void mask_block(float* x, int64_t n, int64_t block, const uint32_t* mask) {
  const int64_t first = block * kSampleBlock, count = std::min(kSampleBlock, n - first);
  const uint32_t words[2] = {mask[2 * block], count > 32 ? mask[2 * block + 1] : 0};
  if (count == kSampleBlock) return apply_mask(x + first, words);
  float padded[kSampleBlock] = {};
  std::memcpy(padded, x + first, count * sizeof(float));
  apply_mask(padded, words);
  std::memcpy(x + first, padded, count * sizeof(float));
}

bool scan(float* x, int64_t n, const uint32_t* mask, int64_t begin, int64_t end, float* maxima) {
  float padded[kSampleBlock];
  vint bad{};
  for (int64_t b = begin; b < end; ++b) {
    const float* from = block_at(x, n, b, padded);
    for (int i = 0; i < kSampleBlock; i += kLanes) bad |= ~(load(from + i) < INFINITY);
    if (mask != nullptr) {
      mask_block(x, n, b, mask);
      from = block_at(x, n, b, padded);
    }
    vfloat most = splat(-INFINITY);
    for (int i = 0; i < kSampleBlock; i += kLanes) most = maximum(load(from + i), most);
    maxima[b] = reduce_max(most);
  }
  return any(bad);
}

void masses(const float* x, int64_t n, float maximum, float inverse, int64_t begin, int64_t end,
            float* sums) {
  float padded[kSampleBlock];
  for (int64_t b = begin; b < end; ++b) {
    const float* from = block_at(x, n, b, padded);
    sums[b] = sum_block([&](int i) { return exp_negative((load(from + i) - maximum) * inverse); });
  }
}

void weights(const float* x, int64_t n, float maximum, float inverse, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    store(to + i, exp_negative((load(x + i) - maximum) * inverse));
  }
}

void fold(float* weights, int64_t n, float* sums) {
  const int64_t blocks = sample_blocks(n);
  std::fill(weights + n, weights + blocks * kSampleBlock, 0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    const float* from = weights + b * kSampleBlock;
    sums[b] = sum_block([&](int i) { return load(from + i); });
  }
}

#if defined(__AVX512F__)

// The lanes that `kept` is true in, one after the other at `to`; returns how many. Writes a whole vector.
// Compressed in registers: compressing into memory is slow on some processors.
int64_t compress(vint v, vint kept, int32_t* to) {
  const __mmask16 lanes = _mm512_movepi32_mask((__m512i)kept);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(lanes, (__m512i)v));
  return __builtin_popcount(lanes);
}

#elif defined(__AVX2__)

// For each set of lanes, their numbers one after the other.
struct Orders {
  uint8_t lanes[256][8] = {};
  constexpr Orders() {
    for (int set = 0; set < 256; ++set) {
      for (int lane = 0, at = 0; lane < 8; ++lane) {
        if (set >> lane & 1) lanes[set][at++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
constexpr Orders kOrders;

int64_t compress(vint v, vint kept, int32_t* to) {
  const int lanes = _mm256_movemask_ps((__m256)kept);
  const __m256i order =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kOrders.lanes[lanes])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32((__m256i)v, order));
  return __builtin_popcount(lanes);
}

#else

int64_t compress(vint v, vint kept, int32_t* to) {
  int64_t count = 0;
  for (int i = 0; i < kLanes; ++i) {
    to[count] = v[i];
    count += kept[i] != 0;
  }
  return count;
}

#endif

vint lane_numbers() {
  vint v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

int64_t gather(const float* x, int64_t n, const float* maxima, float threshold, float* values,
               int32_t* ids) {
  float padded[kSampleBlock];
  const vint lanes = lane_numbers();
  int64_t size = 0;
  for (int64_t b = 0; b < sample_blocks(n); ++b) {
    if (!(maxima[b] >= threshold)) continue;
    const float* from = block_at(x, n, b, padded);
    for (int i = 0; i < kSampleBlock; i += kLanes) {
      const vfloat v = load(from + i);
      const vint kept = v >= threshold;
      compress((vint)v, kept, reinterpret_cast<int32_t*>(values + size));
      size += compress(lanes + static_cast<int32_t>(b * kSampleBlock + i), kept, ids + size);
    }
  }
  return size;
}

void rank(const float* x, int64_t n, float maximum, float scale, int32_t last, int32_t* places) {
  const vfloat bound = splat(static_cast<float>(last));
  for (int64_t i = 0; i < n; i += kLanes) {
    const vfloat at = (maximum - load(x + i)) * scale;
    const vint place = __builtin_convertvector(at < bound ? at : bound, vint);
    std::memcpy(places + i, &place, sizeof(place));
  }
}

int64_t find(const int32_t* places, int64_t n, int32_t place, int32_t* indices) {
  const vint lanes = lane_numbers();
  int64_t size = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const vint at = lanes + static_cast<int32_t>(i);
    const vint found = (load_as<vint>(places + i) == place) & (at < static_cast<int32_t>(n));
    if (any(found)) size += compress(at, found, indices + size);
  }
  return size;
}

void cut(const float* values, const int32_t* ids, int64_t n, float value, int32_t id, float* weights) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const vfloat v = load(values + i);
    const vint kept = (v > value) | ((v == value) & (load_as<vint>(ids + i) <= id));
    store(weights + i, as_float((vint)load(weights + i) & kept));
  }
}

}  // namespace

const SamplingKernels& PRECAST_CAT(sampling_, PRECAST_ISA)() {
  static const SamplingKernels table = {scan, masses, gather, weights, rank, find, cut, fold};
  return table;
}

}  // namespace precast
