// A row's candidates: the tokens that a draw is made from, behind the passes over its logits (sampling.cpp).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "sampling.h"

namespace precast {

inline constexpr int kBuckets = 2048;
inline constexpr double kDeepest = 51.0;  // of a histogram: e^-51 of the largest weight is nothing to a sum
inline constexpr int64_t kSortable = 96;  // candidates that are sorted without a histogram
inline constexpr double kMargin = 1e-3;   // of thresholds that are taken from logarithms, in units of e's exponent

// A logit and its id as one number: larger is earlier in the order.
inline uint64_t key_of(float value, int32_t id) {
  const float v = value + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
inline float value_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int32_t id_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

struct Entry {
  uint64_t key;
  float weight;
};
inline bool earlier(const Entry& a, const Entry& b) { return a.key > b.key; }

struct Bucket {
  double mass;
  int64_t count;
};

// A thread's buffers; they grow to the largest vocabulary it has seen.
struct Scratch {
  std::vector<float> values, weights, sums, maxima;
  std::vector<int32_t> ids, places, indices;
  std::vector<Entry> entries;
  std::vector<Bucket> buckets;
  float threshold = 0;  // that candidates reach
  int64_t size = 0;     // candidates

  void reserve(int64_t n) {
    const size_t room = static_cast<size_t>(n + 2 * kSampleBlock);
    if (values.size() >= room) return;
    for (auto* floats : {&values, &weights, &sums}) floats->resize(room);
    for (auto* numbers : {&ids, &places, &indices}) numbers->resize(room);
  }
};

// How many tokens top_k leaves; 0: all.
inline int64_t cut_of(const DrawParams& p, int64_t n) { return p.top_k > 0 && p.top_k < n ? p.top_k : 0; }

// Whether anything is cut off, of n tokens.
inline bool cuts(const DrawParams& p, int64_t n) { return cut_of(p, n) > 0 || p.top_p < 1 || p.min_p > 0; }

inline double total_of(const float* sums, int64_t blocks) {
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += sums[b];
  return total;
}

// A logit that at least k of the row's reach: k blocks have one. -FLT_MAX where blocks are too few.
inline float reached_by(const DrawRow& row, int64_t k, Scratch& s) {
  const int64_t blocks = sample_blocks(row.n);
  if (k > blocks) return -FLT_MAX;
  s.maxima.assign(row.maxima, row.maxima + blocks);
  std::nth_element(s.maxima.begin(), s.maxima.begin() + (k - 1), s.maxima.end(), std::greater<float>());
  return std::max(s.maxima[k - 1], -FLT_MAX);
}

// The logit whose weight is `weight` (at most 1), a little less.
inline float logit_of(const DrawRow& row, double weight, float inverse) {
  if (!(weight > 0)) return -FLT_MAX;
  const double depth = std::min(std::log(weight), 0.0) - kMargin;
  const double logit = row.maximum + depth / inverse;
  if (logit <= -FLT_MAX) return -FLT_MAX;
  return std::nextafterf(static_cast<float>(logit), -INFINITY);
}

inline void gather(const DrawRow& row, float threshold, Scratch& s) {
  s.threshold = threshold;
  s.size = sampling_kernels().gather(row.x, row.n, row.maxima, threshold, s.values.data(), s.ids.data());
}

// Sorts candidates into buckets, largest logits first.
inline void fill_histogram(const DrawRow& row, float inverse, Scratch& s, int buckets = kBuckets) {
  const double depth = (static_cast<double>(row.maximum) - s.threshold) * inverse;
  const double scale = (buckets - 1) / std::clamp(depth, 1e-30, kDeepest) * inverse;
  sampling_kernels().rank(s.values.data(), s.size, row.maximum,
                          static_cast<float>(std::min(scale, 1e38)), buckets - 1, s.places.data());
  s.buckets.assign(buckets, {0, 0});
  for (int64_t i = 0; i < s.size; ++i) {
    Bucket& bucket = s.buckets[s.places[i]];
    bucket.mass += s.weights[i];
    ++bucket.count;
  }
}

// The entries of a bucket, or of all candidates for -1.
inline void take_entries(Scratch& s, int bucket) {
  s.entries.clear();
  const auto take = [&](int64_t i) {
    s.entries.push_back({key_of(s.values[i], s.ids[i]), s.weights[i]});
  };
  if (bucket < 0) {
    for (int64_t i = 0; i < s.size; ++i) take(i);
    return;
  }
  const int64_t found = sampling_kernels().find(s.places.data(), s.size, bucket, s.indices.data());
  for (int64_t i = 0; i < found; ++i) take(s.indices[i]);
}

// How much of the order is kept: so many candidates, or until their mass is reached.
struct Bound {
  int64_t count;
  double mass;
  bool reached(int64_t counted, double massed) const { return counted >= count || massed >= mass; }
};

// Takes the weight of candidates behind the key.
inline void cut_behind(uint64_t last, Scratch& s) {
  if (last == 0) return;
  sampling_kernels().cut(s.values.data(), s.ids.data(), s.size, value_of(last), id_of(last),
                         s.weights.data());
}

inline void weigh(const DrawRow& row, float inverse, Scratch& s) {
  sampling_kernels().weights(s.values.data(), s.size, row.maximum, inverse, s.weights.data());
}

// Takes the weight of candidates that have less than this share of the likeliest one's.
inline void cut_below(double share, Scratch& s) {
  if (share <= 0) return;
  const float least = static_cast<float>(std::min(share, 1.0));
  for (int64_t i = 0; i < s.size; ++i) s.weights[i] = s.weights[i] >= least ? s.weights[i] : 0.0f;
}

inline double total_weight(Scratch& s) {
  sampling_kernels().fold(s.weights.data(), s.size, s.sums.data());
  return total_of(s.sums.data(), sample_blocks(s.size));
}

// The likeliest `top` of the tokens that reach the threshold, in order: the first entries.
inline int64_t take_likeliest(const DrawRow& row, float threshold, int64_t top, Scratch& s) {
  gather(row, threshold, s);
  std::fill(s.weights.begin(), s.weights.begin() + s.size, 0.0f);
  take_entries(s, -1);
  const int64_t count = std::min<int64_t>(top, s.size);
  std::partial_sort(s.entries.begin(), s.entries.begin() + count, s.entries.end(), earlier);
  return count;
}

// The block, or the rank, in which the cumulative sum passes `target`, and the sum before it.
template <typename Sum>
inline int64_t block_of(const Sum* sums, int64_t blocks, double target, double& before) {
  int64_t last = 0;
  before = 0;
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (sums[b] <= 0) continue;
    last = b;
    before = sum;
    sum += sums[b];
    if (sum > target) break;
  }
  return last;
}

// The weight at which the cumulative sum passes `target`; the last that is not 0 where roundings have
// left it short.
inline int64_t place_of(const float* weights, int64_t n, double sum, double target) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] <= 0) continue;
    last = i;
    sum += weights[i];
    if (sum > target) break;
  }
  return last;
}

// The candidate at which the cumulative sum of weights, folded before, passes `target`.
inline int64_t draw_candidate(double target, const Scratch& s) {
  double before;
  const int64_t block = block_of(s.sums.data(), sample_blocks(s.size), target, before);
  const int64_t first = block * kSampleBlock, count = std::min(kSampleBlock, s.size - first);
  return s.ids[first + place_of(s.weights.data() + first, count, before, target)];
}

// The same of all tokens.
inline int64_t draw_any(const DrawRow& row, double target, float inverse) {
  const int64_t blocks = sample_blocks(row.n);
  double before;
  const int64_t first = block_of(row.masses, blocks, target, before) * kSampleBlock;
  const int64_t count = std::min(kSampleBlock, row.n - first);
  float x[2 * kSampleBlock] = {}, weights[2 * kSampleBlock];
  std::memcpy(x, row.x + first, count * sizeof(float));
  sampling_kernels().weights(x, count, row.maximum, inverse, weights);
  return first + place_of(weights, count, before, target);
}

}  // namespace precast
