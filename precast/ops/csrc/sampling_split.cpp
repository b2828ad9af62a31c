// Sampling where each rank has the logits of a part of the vocabulary: no rank ever has all of them.
//
// It is sampling.cpp's way to draw, with what ranks have to know of each other's rows gathered in between:
// maxima; sums and thresholds; for each cut a histogram of the candidates, and the entries of the one bucket
// in which top_k or top_p is reached; sums of what is kept; and the token, from the rank that has it. Every
// rank decides by the same numbers, added up in the same order, and so ends with the same tokens.
#include <torch/library.h>

#include <numeric>

#include "comm.h"
#include "sampling_batch.h"
#include "sampling_candidates.h"

namespace precast {
namespace {

constexpr int kSplitBuckets = 256;  // 3 KB of a row to exchange

// What a rank tells the others, and what they tell it: floats in an agreed order.
class Message {
 public:
  explicit Message(std::vector<float>& buffer, size_t at = 0) : buffer_(buffer), at_(at) {}
  template <typename T>
  void put(T value) {
    static_assert(sizeof(T) % sizeof(float) == 0);
    const size_t end = buffer_.size();
    buffer_.resize(end + sizeof(T) / sizeof(float));
    std::memcpy(buffer_.data() + end, &value, sizeof(T));
  }
  template <typename T>
  T take() {
    T value;
    std::memcpy(&value, buffer_.data() + at_, sizeof(T));
    at_ += sizeof(T) / sizeof(float);
    return value;
  }

 private:
  std::vector<float>& buffer_;
  size_t at_;
};

// One row on this rank.
struct Part {
  DrawRow* row;
  const DrawParams* p;
  Scratch* s;
  float inverse;
  float reached = -FLT_MAX, reported = -FLT_MAX;  // that top_k tokens, and those to report, reach
  double whole = 0, plain = 0;                    // sums of all ranks
  double kept = 0;                                // weight of what this rank keeps
  int64_t token = -1;                             // likeliest or drawn; the whole vocabulary's id
  bool drawn = false;                             // whether this rank has the token

  bool is_alive() const { return row->status == DrawStatus::kDrawn; }
  bool is_drawn() const { return is_alive() && p->given < 0 && p->temperature > 0; }
  bool is_cut() const { return is_drawn() && cuts(*p, row->whole); }
  int64_t top_k() const { return cut_of(*p, row->whole); }
};

class Split {
 public:
  Split(Batch& batch, const std::vector<DrawParams>& params)
      : batch_(batch), comm_(*communicator()), ranks_(comm_.size()) {
    thread_local std::vector<Scratch> scratches;
    if (scratches.size() < params.size()) scratches.resize(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      scratches[i].reserve(batch.rows[i].n);
      parts_.push_back({&batch.rows[i], &params[i], &scratches[i], inverse_of(params[i].temperature)});
    }
  }

  void draw(const std::vector<DrawParams>& params, Drawings& found) {
    agree_on_maxima();
    batch_.sum(params);
    agree_on_sums();
    batch_.each_row([&](int64_t i) { gather_candidates(parts_[i]); });
    cut([](const Part& part) { return part.is_cut() && part.top_k() > 0; },
        [](const Part& part, double) { return Bound{part.top_k(), INFINITY}; });
    cut([](const Part& part) { return part.is_cut() && part.p->top_p < 1; },
        [](const Part& part, double mass) {
          return Bound{INT64_MAX, part.p->top_p * (part.top_k() > 0 ? mass : part.whole)};
        });
    draw_tokens();
    tell_tokens(found);
  }

 private:
  // Every rank's floats, one rank's behind the other's, and where each begins. `sizes` are known to all.
  std::vector<float> exchange(const std::vector<float>& mine, const std::vector<int64_t>& sizes) {
    std::vector<float> all(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
    comm_.all_gather(mine.data(), all.data(), 1, sizes.data());
    return all;
  }
  // The same where all have as many.
  std::vector<float> exchange(const std::vector<float>& mine) {
    return exchange(mine, std::vector<int64_t>(ranks_, static_cast<int64_t>(mine.size())));
  }

  void agree_on_maxima() {
    std::vector<float> mine;
    Message ours(mine);
    for (Part& part : parts_) {
      DrawRow& row = *part.row;
      const bool ready = part.is_alive() && part.p->temperature == 0;
      ours.put(row.maximum);
      ours.put(static_cast<int32_t>(row.status));
      ours.put(static_cast<int32_t>(ready ? row.first + likeliest(row) : -1));
    }
    std::vector<float> all = exchange(mine);
    std::vector<DrawStatus> states(parts_.size(), DrawStatus::kDrawn);
    std::vector<float> maxima(parts_.size(), -INFINITY);
    Message theirs(all);
    for (int rank = 0; rank < ranks_; ++rank) {
      for (size_t i = 0; i < parts_.size(); ++i) {
        const float maximum = theirs.take<float>();
        const auto state = static_cast<DrawStatus>(theirs.take<int32_t>());
        const int32_t token = theirs.take<int32_t>();
        if (maximum > maxima[i]) {
          maxima[i] = maximum;
          parts_[i].token = token;
          parts_[i].drawn = rank == comm_.rank();
        }
        const bool worse = state == DrawStatus::kBadToken ||
                           (state == DrawStatus::kNotFinite && states[i] != DrawStatus::kBadToken);
        if (worse) states[i] = state;
      }
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      const bool nothing = states[i] == DrawStatus::kDrawn && maxima[i] == -INFINITY;
      parts_[i].row->maximum = maxima[i];
      parts_[i].row->status = nothing ? DrawStatus::kNothingLeft : states[i];
    }
  }

  void agree_on_sums() {
    std::vector<float> mine;
    Message ours(mine);
    for (Part& part : parts_) {
      const DrawRow& row = *part.row;
      const int64_t blocks = sample_blocks(row.n), k = part.top_k();
      const bool alive = part.is_alive(), reports = alive && part.p->top >= 0;
      part.kept = part.is_drawn() && k == 0 ? total_of(row.masses, blocks) : 0;
      ours.put(part.kept);
      ours.put(reports ? total_of(row.plain, blocks) : 0.0);
      ours.put(part.is_drawn() && k > 0 ? reached_by(row, k, *part.s) : -FLT_MAX);
      ours.put(reports && part.p->top > 0 ? reached_by(row, part.p->top, *part.s) : -FLT_MAX);
    }
    std::vector<float> all = exchange(mine);
    Message theirs(all);
    for (int rank = 0; rank < ranks_; ++rank) {
      for (Part& part : parts_) {
        part.whole += theirs.take<double>();
        part.plain += theirs.take<double>();
        part.reached = std::max(part.reached, theirs.take<float>());
        part.reported = std::max(part.reported, theirs.take<float>());
      }
    }
  }

  void gather_candidates(Part& part) {
    if (!part.is_cut()) return;
    const DrawRow& row = *part.row;
    const DrawParams& p = *part.p;
    float threshold = part.reached;
    if (part.top_k() == 0) {
      if (p.top_p < 1) {
        threshold = logit_of(row, (1 - p.top_p) * part.whole / static_cast<double>(row.whole), part.inverse);
      }
      threshold = std::max(threshold, logit_of(row, p.min_p, part.inverse));
    }
    gather(row, threshold, *part.s);
    weigh(row, part.inverse, *part.s);
  }

  // What is behind the bound, in all ranks' order, is cut off in the rows that are wanted.
  template <typename Wanted, typename BoundOf>
  void cut(Wanted&& wanted, BoundOf&& bound_of) {
    std::vector<Part*> parts;
    for (Part& part : parts_) {
      if (wanted(part)) parts.push_back(&part);
    }
    if (parts.empty()) return;
    batch_.share_out(parts.size(), [&](int64_t i) {
      fill_histogram(*parts[i]->row, parts[i]->inverse, *parts[i]->s, kSplitBuckets);
    });
    std::vector<float> mine;
    Message ours(mine);
    for (const Part* part : parts) {
      for (const Bucket& bucket : part->s->buckets) {
        ours.put(bucket.mass);
        ours.put(static_cast<int32_t>(bucket.count));
      }
    }
    std::vector<float> all = exchange(mine);
    std::vector<Reached> reached;
    for (size_t i = 0; i < parts.size(); ++i) reached.push_back(reach(all, parts.size(), i, *parts[i], bound_of));
    cut_bucket(parts, reached);
  }

  // Where a row's bound is reached.
  struct Reached {
    Bound bound;
    int bucket;                   // -1: nowhere
    Bucket before{0, 0};          // what buckets before it have
    std::vector<int64_t> counts;  // each rank's entries in it
  };

  template <typename BoundOf>
  Reached reach(std::vector<float>& all, size_t rows, size_t row, const Part& part, BoundOf&& bound_of) {
    constexpr size_t kRow = 3 * kSplitBuckets;
    std::vector<Bucket> sums(kSplitBuckets, Bucket{0, 0});
    std::vector<std::vector<int64_t>> counts(kSplitBuckets);
    Bucket whole{0, 0};
    for (int rank = 0; rank < ranks_; ++rank) {
      Message theirs(all, (rank * rows + row) * kRow);
      for (int b = 0; b < kSplitBuckets; ++b) {
        sums[b].mass += theirs.take<double>();
        counts[b].push_back(theirs.take<int32_t>());
        sums[b].count += counts[b].back();
      }
    }
    for (const Bucket& bucket : sums) {
      whole.mass += bucket.mass;
      whole.count += bucket.count;
    }
    Reached found{bound_of(part, whole.mass), -1, {0, 0}, {}};
    if (found.bound.mass == INFINITY && whole.count <= found.bound.count) return found;
    for (found.bucket = 0; found.bucket < kSplitBuckets - 1; ++found.bucket) {
      const Bucket& next = sums[found.bucket];
      if (found.bound.reached(found.before.count + next.count, found.before.mass + next.mass)) break;
      found.before.count += next.count;
      found.before.mass += next.mass;
    }
    found.counts = counts[found.bucket];
    return found;
  }

  void cut_bucket(const std::vector<Part*>& parts, std::vector<Reached>& reached) {
    std::vector<float> mine;
    Message ours(mine);
    std::vector<int64_t> sizes(ranks_, 0);
    for (size_t i = 0; i < parts.size(); ++i) {
      if (reached[i].bucket < 0) continue;
      Scratch& s = *parts[i]->s;
      take_entries(s, reached[i].bucket);
      for (const Entry& entry : s.entries) {
        ours.put(key_of(value_of(entry.key), static_cast<int32_t>(parts[i]->row->first + id_of(entry.key))));
        ours.put(entry.weight);
      }
      for (int rank = 0; rank < ranks_; ++rank) sizes[rank] += 3 * reached[i].counts[rank];
    }
    if (std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == 0) return;
    std::vector<float> all = exchange(mine, sizes);
    std::vector<std::vector<Entry>> entries(parts.size());
    Message theirs(all);
    for (int rank = 0; rank < ranks_; ++rank) {
      for (size_t i = 0; i < parts.size(); ++i) {
        for (int64_t left = reached[i].bucket < 0 ? 0 : reached[i].counts[rank]; left > 0; --left) {
          const uint64_t key = theirs.take<uint64_t>();
          entries[i].push_back({key, theirs.take<float>()});
        }
      }
    }
    batch_.share_out(parts.size(), [&](int64_t i) {
      if (reached[i].bucket >= 0) cut_row(*parts[i], reached[i], entries[i]);
    });
  }

  static void cut_row(Part& part, const Reached& reached, std::vector<Entry>& entries) {
    std::sort(entries.begin(), entries.end(), earlier);
    Bucket before = reached.before;
    for (const Entry& entry : entries) {
      before.mass += entry.weight;
      if (!reached.bound.reached(++before.count, before.mass)) continue;
      const int64_t mine = id_of(entry.key) - part.row->first;  // others' may be before or behind all ids here
      sampling_kernels().cut(part.s->values.data(), part.s->ids.data(), part.s->size, value_of(entry.key),
                             static_cast<int32_t>(mine), part.s->weights.data());
      return;
    }
  }

  void draw_tokens() {
    std::vector<float> mine;
    Message ours(mine);
    batch_.each_row([&](int64_t i) {
      Part& part = parts_[i];
      if (!part.is_cut()) return;
      cut_below(part.p->min_p, *part.s);
      part.kept = total_weight(*part.s);
    });
    for (const Part& part : parts_) ours.put(part.kept);
    std::vector<float> all = exchange(mine);
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (parts_[i].is_drawn()) draw_token(parts_[i], all, i);
    }
  }

  // The cumulative distribution is inverted in order of ids: one rank's tokens, then the next one's.
  void draw_token(Part& part, std::vector<float>& all, size_t row) {
    std::vector<double> kept;
    double whole = 0;
    for (int rank = 0; rank < ranks_; ++rank) {
      kept.push_back(Message(all, 2 * (rank * parts_.size() + row)).take<double>());
      whole += kept.back();
    }
    const double target = philox_uniform(part.p->seed, part.p->step) * whole;
    double before;
    part.drawn = block_of(kept.data(), ranks_, target, before) == comm_.rank();
    if (!part.drawn) return;
    const double left = std::max(0.0, target - before);
    const int64_t at = part.is_cut() ? draw_candidate(left, *part.s) : draw_any(*part.row, left, part.inverse);
    part.token = part.row->first + at;
  }

  void tell_tokens(Drawings& found) {
    std::vector<float> mine;
    Message ours(mine);
    for (Part& part : parts_) {
      const DrawRow& row = *part.row;
      if (part.p->given >= 0) {
        part.token = part.p->given;
        part.drawn = part.token >= row.first && part.token < row.first + row.n;
      }
      const bool tells = part.is_alive() && part.drawn;
      ours.put(static_cast<int32_t>(tells ? part.token : -1));
      ours.put(tells ? row.x[part.token - row.first] : 0.0f);
      if (part.p->top > 0) put_likeliest(part, ours);
    }
    std::vector<float> all = exchange(mine);
    std::vector<Drawn> drawn;
    for (size_t i = 0; i < parts_.size(); ++i) drawn.push_back(found.of(static_cast<int64_t>(i)));
    std::vector<std::vector<Entry>> likeliest(parts_.size());
    Message theirs(all);
    for (int rank = 0; rank < ranks_; ++rank) {
      for (size_t i = 0; i < parts_.size(); ++i) {
        const int32_t token = theirs.take<int32_t>();
        const float logit = theirs.take<float>();
        if (token >= 0) {
          drawn[i].token = token;
          drawn[i].logprob = logit;
        }
        for (int64_t left = parts_[i].p->top; left > 0; --left) {
          const uint64_t key = theirs.take<uint64_t>();
          if (key != 0) likeliest[i].push_back({key, 0});
        }
      }
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      finish(parts_[i], drawn[i], likeliest[i]);
      found.set(static_cast<int64_t>(i), drawn[i], parts_[i].row->status);
    }
  }

  // As many keys as are to be reported, 0 behind the last.
  static void put_likeliest(Part& part, Message& ours) {
    int64_t count = 0;
    if (part.is_alive()) count = take_likeliest(*part.row, part.reported, part.p->top, *part.s);
    for (int64_t i = 0; i < part.p->top; ++i) {
      const uint64_t key = i < count ? part.s->entries[i].key : 0;
      ours.put(key == 0 ? key : key_of(value_of(key), static_cast<int32_t>(part.row->first + id_of(key))));
    }
  }

  static void finish(const Part& part, Drawn& drawn, std::vector<Entry>& entries) {
    if (!part.is_alive() || part.p->top < 0) {
      drawn.logprob = 0;
      return;
    }
    const double log_sum = part.row->maximum + std::log(part.plain);
    drawn.logprob = static_cast<float>(drawn.logprob - log_sum);
    std::sort(entries.begin(), entries.end(), earlier);
    const int64_t count = std::min<int64_t>(part.p->top, static_cast<int64_t>(entries.size()));
    for (int64_t i = 0; i < count; ++i) {
      drawn.top_ids[i] = id_of(entries[i].key);
      drawn.top_logprobs[i] = static_cast<float>(value_of(entries[i].key) - log_sum);
    }
  }

  Batch& batch_;
  Communicator& comm_;
  int ranks_;
  std::vector<Part> parts_;
};

// The bits of each row's mask from `first` on, as words of a row that begins there.
struct PartMasks {
  std::vector<std::vector<uint32_t>> words;
  std::vector<const uint32_t*> rows;

  PartMasks(const std::vector<const uint32_t*>& whole, int64_t first, int64_t n, int64_t vocabulary)
      : rows(whole.size(), nullptr) {
    const int64_t begin = first / 32, shift = first % 32, end = (vocabulary + 31) / 32;
    for (size_t row = 0; row < whole.size(); ++row) {
      if (whole[row] == nullptr) continue;
      std::vector<uint32_t> mine((n + 31) / 32);
      for (size_t i = 0; i < mine.size(); ++i) {
        const int64_t at = begin + static_cast<int64_t>(i);
        mine[i] = whole[row][at] >> shift;
        if (shift > 0 && at + 1 < end) mine[i] |= whole[row][at + 1] << (32 - shift);
      }
      words.push_back(std::move(mine));
      rows[row] = words.back().data();
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample_split(
    const at::Tensor& logits, const at::Tensor& reals, const at::Tensor& ints,
    const std::optional<at::Tensor>& seen_starts, const std::optional<at::Tensor>& seen_ids,
    const std::optional<at::Tensor>& seen_counts, const std::optional<at::Tensor>& bias_starts,
    const std::optional<at::Tensor>& bias_ids, const std::optional<at::Tensor>& bias_values,
    const std::optional<at::Tensor>& masks, const std::optional<at::Tensor>& mask_rows, int64_t top,
    at::IntArrayRef widths) {
  check_logits(logits, "sample_split");
  const Communicator* comm = communicator();
  TORCH_CHECK(comm != nullptr, "sample_split: this process has joined no tensor-parallel group");
  TORCH_CHECK(top >= 0, "sample_split: top must be at least 0");
  TORCH_CHECK(static_cast<int>(widths.size()) == comm->size() && widths[comm->rank()] == logits.size(1),
              "sample_split: widths ", widths, " do not agree with ", logits.size(1), " logits on rank ",
              comm->rank(), " of ", comm->size());
  const int64_t first = std::accumulate(widths.begin(), widths.begin() + comm->rank(), int64_t{0});
  const int64_t vocabulary = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  const int64_t count = logits.size(0), n = logits.size(1);
  const std::vector<DrawParams> params = params_of(reals, ints, count, top);
  const ByRows<int32_t> seen(seen_starts, seen_ids, seen_counts, count, "seen");
  const ByRows<float> bias(bias_starts, bias_ids, bias_values, count, "bias");
  const PartMasks allowed(masks_of(masks, mask_rows, count, vocabulary), first, n, vocabulary);
  Batch batch(logits, allowed.rows, first, vocabulary);
  Drawings found(count, top, ints, logits);
  if (count == 0) return found.tensors();
  batch.adjust(params, seen, bias);
  batch.scan();
  Split(batch, params).draw(params, found);
  return found.tensors();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def(
      "sample_split(Tensor(a!) logits, Tensor reals, Tensor ints, Tensor? seen_starts, Tensor? seen_ids, "
      "Tensor? seen_counts, Tensor? bias_starts, Tensor? bias_ids, Tensor? bias_values, Tensor? masks, "
      "Tensor? mask_rows, int top, int[] widths) -> (Tensor tokens, Tensor status, Tensor logprobs, "
      "Tensor top_ids, Tensor top_logprobs)");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) { m.impl("sample_split", sample_split); }

}  // namespace precast
