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
#include "sampling_candidates.h"

namespace precast {
namespace {

constexpr double kEarlyWeight = 1e-3;  // of the likeliest token's
constexpr double kEarlyMargin = 1e-5;  // sums of float weights differ by less

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

void gather_weighed(const DrawRow& row, float threshold, float inverse, Scratch& s) {
  gather(row, threshold, s);
  weigh(row, inverse, s);
}

// Whether the likeliest few tokens, which become the candidates, have the mass: in most texts they have,
// and are a small part of what can't be ruled out beforehand.
bool reaches_early(const DrawRow& row, double mass, float least, float inverse, Scratch& s) {
  const float threshold = logit_of(row, kEarlyWeight, inverse);
  if (threshold <= least) return false;  // min_p leaves fewer
  gather_weighed(row, threshold, inverse, s);
  return total_weight(s) >= mass * (1 + kEarlyMargin);
}

// The candidates that top_k, top_p and min_p leave, with their weights.
void keep_candidates(const DrawRow& row, const DrawParams& p, float inverse, Scratch& s) {
  const int64_t k = cut_of(p, row.n);
  const double whole = k == 0 ? total_of(row.masses, sample_blocks(row.n)) : 0;
  const float least = logit_of(row, p.min_p, inverse);
  if (k > 0) {
    gather_weighed(row, reached_by(row, k, s), inverse, s);
  } else if (p.top_p >= 1) {
    gather_weighed(row, least, inverse, s);
  } else if (!reaches_early(row, p.top_p * whole, least, inverse, s)) {
    // Of n tokens that weigh less than (1 - top_p) / n of the whole, none is needed to reach top_p.
    const float enough = logit_of(row, (1 - p.top_p) * whole / static_cast<double>(row.n), inverse);
    gather_weighed(row, std::max(enough, least), inverse, s);
  }
  if (k > 0 && k < s.size) cut_behind(last_kept(row, inverse, {k, INFINITY}, s), s);
  if (p.top_p < 1) {
    const double mass = p.top_p * (k > 0 ? total_weight(s) : whole);
    cut_behind(last_kept(row, inverse, {INT64_MAX, mass}, s), s);
  }
  cut_below(p.min_p, s);
}

int64_t draw(const DrawRow& row, const DrawParams& p, Scratch& s) {
  if (p.given >= 0) return p.given;
  if (p.temperature == 0) return likeliest(row);
  const double uniform = philox_uniform(p.seed, p.step);
  const float inverse = inverse_of(p.temperature);
  if (!cuts(p, row.n)) {
    return draw_any(row, uniform * total_of(row.masses, sample_blocks(row.n)), inverse);
  }
  keep_candidates(row, p, inverse, s);
  return draw_candidate(uniform * total_weight(s), s);
}

void report(const DrawRow& row, const DrawParams& p, Drawn& out, Scratch& s) {
  const double log_sum = row.maximum + std::log(total_of(row.plain, sample_blocks(row.n)));
  out.logprob = static_cast<float>(row.x[out.token] - log_sum);
  if (p.top <= 0) return;
  const int64_t count = take_likeliest(row, reached_by(row, std::min(p.top, row.n), s), p.top, s);
  for (int64_t i = 0; i < count; ++i) {
    out.top_ids[i] = id_of(s.entries[i].key);
    out.top_logprobs[i] = static_cast<float>(row.x[out.top_ids[i]] - log_sum);
  }
}

// Whether there is such a token; `mine` becomes its place in the row, if this rank has it.
bool is_token(const DrawRow& row, int64_t id, int64_t& mine) {
  mine = id - row.first;
  return id >= 0 && id < row.whole;
}
bool has(const DrawRow& row, int64_t mine) { return mine >= 0 && mine < row.n; }

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
  int64_t mine;
  row.status = p.given == -1 || is_token(row, p.given, mine) ? DrawStatus::kDrawn : DrawStatus::kBadToken;
  for (int64_t i = 0; i < seen.size; ++i) {
    if (!is_token(row, seen.ids[i], mine)) row.status = DrawStatus::kBadToken;
    if (has(row, mine)) row.x[mine] = penalised(row.x[mine], seen.counts[i], p);
  }
  for (int64_t i = 0; i < bias.size; ++i) {
    if (!is_token(row, bias.ids[i], mine)) row.status = DrawStatus::kBadToken;
    if (has(row, mine)) row.x[mine] += bias.values[i];
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
