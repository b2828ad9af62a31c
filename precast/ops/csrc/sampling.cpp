// One row's draw, behind the passes over its logits.
//
// Tokens are ordered by logit, equals by id, and what top_k, top_p and min_p keep is a beginning of that
// order each. So a draw needs the shortest of the three, not the order itself:
//
// 1. Block maxima and the row's sum give a logit that none of the kept ones can be below; those above it
//    are gathered, in order of ids ("candidates").
// 2. A histogram of the candidates finds the bucket in which top_k or top_p is reached; only that bucket
//    is sorted.
// 3. The draw inverts the cumulative distribution of the kept tokens in order of ids.
#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

namespace precast {
namespace {

constexpr int kBuckets = 2048;
constexpr double kDeepest = 51.0;  // of a histogram: e^-51 of the largest weight is nothing to a sum
constexpr int64_t kSortable = 96;  // candidates that are sorted without a histogram
constexpr double kMargin = 1e-3;   // of thresholds that are taken from logarithms, in units of e's exponent

// A logit and its id as one number: larger is earlier in the order.
uint64_t key_of(float value, int32_t id) {
  const float v = value + 0.0f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
float value_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
int32_t id_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

struct Entry {
  uint64_t key;
  float weight;
};
bool earlier(const Entry& a, const Entry& b) { return a.key > b.key; }

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
int64_t cut_of(const DrawParams& p, int64_t n) { return p.top_k > 0 && p.top_k < n ? p.top_k : 0; }

double total_of(const float* sums, int64_t blocks) {
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += sums[b];
  return total;
}

// A logit that at least k of the row's reach: k blocks have one. -FLT_MAX where blocks are too few.
float reached_by(const DrawRow& row, int64_t k, Scratch& s) {
  const int64_t blocks = sample_blocks(row.n);
  if (k > blocks) return -FLT_MAX;
  s.maxima.assign(row.maxima, row.maxima + blocks);
  std::nth_element(s.maxima.begin(), s.maxima.begin() + (k - 1), s.maxima.end(), std::greater<float>());
  return std::max(s.maxima[k - 1], -FLT_MAX);
}

// The logit whose weight is `weight` (at most 1), a little less.
float logit_of(const DrawRow& row, double weight, float inverse) {
  if (!(weight > 0)) return -FLT_MAX;
  const double depth = std::min(std::log(weight), 0.0) - kMargin;
  const double logit = row.maximum + depth / inverse;
  if (logit <= -FLT_MAX) return -FLT_MAX;
  return std::nextafterf(static_cast<float>(logit), -INFINITY);
}

void gather(const DrawRow& row, float threshold, Scratch& s) {
  s.threshold = threshold;
  s.size = sampling_kernels().gather(row.x, row.n, row.maxima, threshold, s.values.data(), s.ids.data());
}

// Sorts candidates into buckets, largest logits first.
void fill_histogram(const DrawRow& row, float inverse, Scratch& s) {
  const double depth = (static_cast<double>(row.maximum) - s.threshold) * inverse;
  const double scale = (kBuckets - 1) / std::clamp(depth, 1e-30, kDeepest) * inverse;
  sampling_kernels().rank(s.values.data(), s.size, row.maximum,
                          static_cast<float>(std::min(scale, 1e38)), kBuckets - 1, s.places.data());
  s.buckets.assign(kBuckets, {0, 0});
  for (int64_t i = 0; i < s.size; ++i) {
    Bucket& bucket = s.buckets[s.places[i]];
    bucket.mass += s.weights[i];
    ++bucket.count;
  }
}

// The entries of a bucket, or of all candidates for -1.
void take_entries(Scratch& s, int bucket) {
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

// The last key of the shortest beginning that reaches the bound; 0 where roundings have left the
// candidates short of it.
uint64_t last_kept(const DrawRow& row, float inverse, const Bound& bound, Scratch& s) {
  Bucket before{0, 0};
  int bucket = -1;
  if (s.size > kSortable) {
    fill_histogram(row, inverse, s);
    for (bucket = 0; bucket < kBuckets - 1; ++bucket) {
      const Bucket& next = s.buckets[bucket];
      if (bound.reached(before.count + next.count, before.mass + next.mass)) break;
      before.count += next.count;
      before.mass += next.mass;
    }
  }
  take_entries(s, bucket);
  // Where only the number counts, the order before it is of no interest.
  if (bound.mass == INFINITY) {
    const auto last = s.entries.begin() + (bound.count - before.count - 1);
    std::nth_element(s.entries.begin(), last, s.entries.end(), earlier);
    return last->key;
  }
  std::sort(s.entries.begin(), s.entries.end(), earlier);
  for (const Entry& entry : s.entries) {
    before.mass += entry.weight;
    if (bound.reached(++before.count, before.mass)) return entry.key;
  }
  return 0;
}

// Takes the weight of candidates behind the key.
void cut_behind(uint64_t last, Scratch& s) {
  if (last == 0) return;
  sampling_kernels().cut(s.values.data(), s.ids.data(), s.size, value_of(last), id_of(last),
                         s.weights.data());
}

void weigh(const DrawRow& row, float inverse, Scratch& s) {
  sampling_kernels().weights(s.values.data(), s.size, row.maximum, inverse, s.weights.data());
}

double total_weight(Scratch& s) {
  sampling_kernels().fold(s.weights.data(), s.size, s.sums.data());
  return total_of(s.sums.data(), sample_blocks(s.size));
}

// The candidates that top_k, top_p and min_p leave, with their weights.
void keep_candidates(const DrawRow& row, const DrawParams& p, float inverse, Scratch& s) {
  const int64_t k = cut_of(p, row.n);
  const double whole = k == 0 ? total_of(row.masses, sample_blocks(row.n)) : 0;
  float threshold = -FLT_MAX;
  if (k > 0) threshold = reached_by(row, k, s);
  // Of n tokens that weigh less than (1 - top_p) / n of the whole, none is needed to reach top_p.
  if (k == 0 && p.top_p < 1) threshold = logit_of(row, (1 - p.top_p) * whole / row.n, inverse);
  if (k == 0) threshold = std::max(threshold, logit_of(row, p.min_p, inverse));
  gather(row, threshold, s);
  weigh(row, inverse, s);
  if (k > 0 && k < s.size) cut_behind(last_kept(row, inverse, {k, INFINITY}, s), s);
  if (p.top_p < 1) {
    const double mass = p.top_p * (k > 0 ? total_weight(s) : whole);
    cut_behind(last_kept(row, inverse, {INT64_MAX, mass}, s), s);
  }
  if (p.min_p > 0) {
    const float least = static_cast<float>(std::min(p.min_p, 1.0));
    for (int64_t i = 0; i < s.size; ++i) s.weights[i] = s.weights[i] >= least ? s.weights[i] : 0.0f;
  }
}

// The block in which the cumulative sum passes `target`, and the sum before it.
int64_t block_of(const float* sums, int64_t blocks, double target, double& before) {
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
int64_t place_of(const float* weights, int64_t n, double sum, double target) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] <= 0) continue;
    last = i;
    sum += weights[i];
    if (sum > target) break;
  }
  return last;
}

int64_t draw_candidate(double uniform, Scratch& s) {
  const double target = uniform * total_weight(s);
  double before;
  const int64_t block = block_of(s.sums.data(), sample_blocks(s.size), target, before);
  const int64_t first = block * kSampleBlock, count = std::min(kSampleBlock, s.size - first);
  return s.ids[first + place_of(s.weights.data() + first, count, before, target)];
}

// From all tokens.
int64_t draw_any(const DrawRow& row, double uniform, float inverse) {
  const int64_t blocks = sample_blocks(row.n);
  const double target = uniform * total_of(row.masses, blocks);
  double before;
  const int64_t first = block_of(row.masses, blocks, target, before) * kSampleBlock;
  const int64_t count = std::min(kSampleBlock, row.n - first);
  float x[2 * kSampleBlock] = {}, weights[2 * kSampleBlock];
  std::memcpy(x, row.x + first, count * sizeof(float));
  sampling_kernels().weights(x, count, row.maximum, inverse, weights);
  return first + place_of(weights, count, before, target);
}

int64_t draw(const DrawRow& row, const DrawParams& p, Scratch& s) {
  if (p.given >= 0) return p.given;
  if (p.temperature == 0) return likeliest(row);
  const double uniform = philox_uniform(p.seed, p.step);
  const float inverse = inverse_of(p.temperature);
  if (cut_of(p, row.n) == 0 && p.top_p >= 1 && p.min_p <= 0) return draw_any(row, uniform, inverse);
  keep_candidates(row, p, inverse, s);
  return draw_candidate(uniform, s);
}

void report(const DrawRow& row, const DrawParams& p, Drawn& out, Scratch& s) {
  const double log_sum = row.maximum + std::log(total_of(row.plain, sample_blocks(row.n)));
  out.logprob = static_cast<float>(row.x[out.token] - log_sum);
  if (p.top <= 0) return;
  gather(row, reached_by(row, std::min(p.top, row.n), s), s);
  std::fill(s.weights.begin(), s.weights.begin() + s.size, 0.0f);
  take_entries(s, -1);
  const int64_t count = std::min<int64_t>(p.top, s.size);
  std::partial_sort(s.entries.begin(), s.entries.begin() + count, s.entries.end(), earlier);
  for (int64_t i = 0; i < count; ++i) {
    out.top_ids[i] = id_of(s.entries[i].key);
    out.top_logprobs[i] = static_cast<float>(row.x[out.top_ids[i]] - log_sum);
  }
}

bool inside(int64_t id, int64_t n) { return id >= 0 && id < n; }

float penalised(float x, int32_t count, const DrawParams& p) {
  double y = x;
  if (p.repetition != 1) y = y > 0 ? y / p.repetition : y * p.repetition;
  if (count > 0) y -= p.presence + p.frequency * count;
  return static_cast<float>(y);
}

}  // namespace

double philox_uniform(uint64_t seed, uint64_t step) {
  uint64_t counter[4] = {step + 1, step == UINT64_MAX, 0, 0}, key[2] = {seed, 0};
  for (int round = 0; round < 10; ++round) {
    const auto a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * counter[0];
    const auto b = static_cast<unsigned __int128>(0xCA5A826395121157u) * counter[2];
    const uint64_t next[4] = {static_cast<uint64_t>(b >> 64) ^ counter[1] ^ key[0],
                              static_cast<uint64_t>(b),
                              static_cast<uint64_t>(a >> 64) ^ counter[3] ^ key[1],
                              static_cast<uint64_t>(a)};
    std::memcpy(counter, next, sizeof(counter));
    key[0] += 0x9E3779B97F4A7C15u;
    key[1] += 0xBB67AE8584CAA73Bu;
  }
  return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

float inverse_of(double temperature) {
  return static_cast<float>(std::clamp(1.0 / temperature, 1e-37, 1e37));
}

bool needs_masses(const DrawParams& p, int64_t n) {
  return p.given < 0 && p.temperature > 0 && cut_of(p, n) == 0;
}

void adjust_row(DrawRow& row, const DrawParams& p, const TokenCounts& seen, const TokenBiases& bias) {
  row.status = inside(p.given, row.n) || p.given == -1 ? DrawStatus::kDrawn : DrawStatus::kBadToken;
  for (int64_t i = 0; i < seen.size; ++i) {
    if (!inside(seen.ids[i], row.n)) {
      row.status = DrawStatus::kBadToken;
      continue;
    }
    row.x[seen.ids[i]] = penalised(row.x[seen.ids[i]], seen.counts[i], p);
  }
  for (int64_t i = 0; i < bias.size; ++i) {
    if (inside(bias.ids[i], row.n)) {
      row.x[bias.ids[i]] += bias.values[i];
    } else {
      row.status = DrawStatus::kBadToken;
    }
  }
}

void finish_scan(DrawRow& row, bool not_finite) {
  const int64_t blocks = sample_blocks(row.n);
  row.maximum = *std::max_element(row.maxima, row.maxima + blocks);
  if (row.status != DrawStatus::kDrawn) return;
  if (not_finite) {
    row.status = DrawStatus::kNotFinite;
  } else if (row.maximum == -INFINITY) {
    row.status = DrawStatus::kNothingLeft;
  }
}

int64_t likeliest(const DrawRow& row) {
  int64_t block = 0;
  while (row.maxima[block] != row.maximum) ++block;
  int64_t at = block * kSampleBlock;
  while (row.x[at] != row.maximum) ++at;
  return at;
}

void draw_row(const DrawRow& row, const DrawParams& p, Drawn& out) {
  if (row.status != DrawStatus::kDrawn) return;
  thread_local Scratch scratch;
  scratch.reserve(row.n);
  out.token = draw(row, p, scratch);
  if (p.top >= 0) report(row, p, out, scratch);
}

}  // namespace precast
