// A batch of rows on the pool, and its columns as operators get them: precast/ops/sampling.py says what
// they mean.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "pool.h"
#include "sampling.h"

namespace precast {

inline constexpr int64_t kReals = 6, kInts = 5;
inline constexpr int64_t kChunk = 128;           // blocks that a thread takes at a time: a row is shared by several
inline constexpr int64_t kParallelLogits = 8192;  // fewer are not worth a second thread
inline constexpr int64_t kMostIds = std::numeric_limits<int32_t>::max() - 2 * kSampleBlock;

inline at::Tensor column(const std::optional<at::Tensor>& given, at::ScalarType type, const char* what) {
  if (!given.has_value()) return {};
  TORCH_CHECK(given->is_contiguous() && given->scalar_type() == type, "sample: ", what,
              " must be contiguous ", type);
  return *given;
}

// A list by rows: `starts` [S + 1], then ids and values of all rows.
template <typename T>
struct ByRows {
  at::Tensor starts, ids, values;

  ByRows(const std::optional<at::Tensor>& starts_in, const std::optional<at::Tensor>& ids_in,
         const std::optional<at::Tensor>& values_in, int64_t rows, const char* what)
      : starts(column(starts_in, at::kLong, what)),
        ids(column(ids_in, at::kInt, what)),
        values(column(values_in, c10::CppTypeToScalarType<T>::value, what)) {
    TORCH_CHECK(starts.defined() == ids.defined() && ids.defined() == values.defined(), "sample: ",
                what, ": starts, ids and values go together");
    if (!starts.defined()) return;
    const int64_t* at = starts.const_data_ptr<int64_t>();
    TORCH_CHECK(starts.numel() == rows + 1 && ids.numel() == values.numel() && at[0] >= 0 &&
                    std::is_sorted(at, at + rows + 1) && at[rows] <= ids.numel(),
                "sample: ", what, ": starts must be S + 1 rising places in ids and values");
  }

  template <typename List>
  List of(int64_t row) const {
    if (!starts.defined()) return {nullptr, nullptr, 0};
    const int64_t* at = starts.const_data_ptr<int64_t>() + row;
    return {ids.const_data_ptr<int32_t>() + at[0], values.template const_data_ptr<T>() + at[0],
            at[1] - at[0]};
  }
};

inline std::vector<DrawParams> params_of(const at::Tensor& reals, const at::Tensor& ints, int64_t rows,
                                  int64_t top) {
  TORCH_CHECK(reals.scalar_type() == at::kDouble && reals.is_contiguous() && reals.dim() == 2 &&
                  reals.size(0) == rows && reals.size(1) == kReals,
              "sample: reals must be float64 [S, ", kReals, "]");
  TORCH_CHECK(ints.scalar_type() == at::kLong && ints.is_contiguous() && ints.dim() == 2 &&
                  ints.size(0) == rows && ints.size(1) == kInts,
              "sample: ints must be int64 [S, ", kInts, "]");
  std::vector<DrawParams> params(rows);
  for (int64_t row = 0; row < rows; ++row) {
    const double* r = reals.const_data_ptr<double>() + row * kReals;
    const int64_t* i = ints.const_data_ptr<int64_t>() + row * kInts;
    params[row] = {r[0], r[1], r[2], r[3], r[4], r[5], i[0], static_cast<uint64_t>(i[1]),
                   static_cast<uint64_t>(i[2]), std::min(i[3], top), i[4]};
    TORCH_CHECK(std::isfinite(r[0]) && r[0] >= 0, "sample: temperature must be at least 0");
    TORCH_CHECK(r[1] >= 0 && r[2] >= 0, "sample: top_p and min_p must be at least 0");
    TORCH_CHECK(r[3] > 0 && std::isfinite(r[3]) && std::isfinite(r[4]) && std::isfinite(r[5]),
                "sample: penalties must be finite, repetition above 0");
  }
  return params;
}

// A batch between its passes. Buffers live as long as the thread that calls operators.
struct Batch {
  int64_t blocks;
  std::vector<DrawRow> rows;
  std::vector<std::atomic<bool>> not_finite;

  // `first` and `whole`: where the logits are in the vocabulary, and how many it has.
  Batch(const at::Tensor& logits, const std::vector<const uint32_t*>& masks, int64_t first, int64_t whole)
      : blocks(sample_blocks(logits.size(1))), rows(logits.size(0)), not_finite(logits.size(0)) {
    thread_local std::vector<float> buffer;
    const int64_t floats = blocks * static_cast<int64_t>(rows.size());
    if (static_cast<int64_t>(buffer.size()) < 3 * floats) buffer.resize(3 * floats);
    float* x = logits.mutable_data_ptr<float>();
    for (size_t row = 0; row < rows.size(); ++row) {
      float* mine = buffer.data() + 3 * blocks * row;
      rows[row] = {x + logits.stride(0) * row, logits.size(1), masks[row], mine, mine + blocks,
                   mine + 2 * blocks, 0, DrawStatus::kDrawn, first, whole};
    }
  }

  bool small() const { return static_cast<int64_t>(rows.size()) * blocks * kSampleBlock < kParallelLogits; }

  template <typename F>
  void share_out(int64_t count, F&& body) {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    };
    if (small()) return run(0, count);
    ThreadPool::instance().run([&](int part, int parts) {
      const Range r = share(count, part, parts);
      run(r.begin, r.end);
    });
  }

  template <typename F>
  void each_row(F&& body) {
    share_out(rows.size(), body);
  }

  // Calls body(row, first block, last block) for pieces of rows.
  template <typename F>
  void each_chunk(F&& body) {
    const int64_t chunks = (blocks + kChunk - 1) / kChunk;
    share_out(chunks * rows.size(), [&](int64_t i) {
      const int64_t begin = i % chunks * kChunk;
      body(i / chunks, begin, std::min(begin + kChunk, blocks));
    });
  }

  void adjust(const std::vector<DrawParams>& params, const ByRows<int32_t>& seen, const ByRows<float>& bias) {
    const auto one = [&](int64_t i) {
      adjust_row(rows[i], params[i], seen.of<TokenCounts>(i), bias.of<TokenBiases>(i));
    };
    if (seen.starts.defined() || bias.starts.defined()) return each_row(one);
    for (size_t i = 0; i < rows.size(); ++i) one(i);
  }

  void scan() {
    each_chunk([&](int64_t i, int64_t begin, int64_t end) {
      const DrawRow& row = rows[i];
      if (sampling_kernels().scan(row.x, row.n, row.mask, begin, end, row.maxima)) {
        not_finite[i].store(true, std::memory_order_relaxed);
      }
    });
    for (size_t i = 0; i < rows.size(); ++i) finish_scan(rows[i], not_finite[i].load());
  }

  void sum(const std::vector<DrawParams>& params) {
    const auto needed = [&](const DrawParams& p) { return p.top >= 0 || needs_masses(p, rows[0].n); };
    if (std::none_of(params.begin(), params.end(), needed)) return;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (params[i].temperature == 1) rows[i].masses = rows[i].plain;
    }
    each_chunk([&](int64_t i, int64_t begin, int64_t end) {
      const DrawRow& row = rows[i];
      const DrawParams& p = params[i];
      if (row.status != DrawStatus::kDrawn) return;
      const bool draws = needs_masses(p, row.n), shared = row.masses == row.plain;
      const auto add = [&](float inverse, float* sums) {
        sampling_kernels().masses(row.x, row.n, row.maximum, inverse, begin, end, sums);
      };
      if (p.top >= 0 || (draws && shared)) add(1.0f, row.plain);
      if (draws && !shared) add(inverse_of(p.temperature), row.masses);
    });
  }
};

inline void check_logits(const at::Tensor& logits, const char* what) {
  TORCH_CHECK(logits.is_cpu() && logits.scalar_type() == at::kFloat && logits.dim() == 2 &&
                  logits.size(1) > 0 && logits.size(1) <= kMostIds &&
                  (logits.size(0) == 0 || logits.stride(1) == 1 || logits.size(1) == 1),
              what, ": logits must be float32 [S, at least 1], rows contiguous");
}

inline std::vector<const uint32_t*> masks_of(const std::optional<at::Tensor>& masks_in,
                                      const std::optional<at::Tensor>& rows_in, int64_t rows, int64_t n) {
  const at::Tensor masks = column(masks_in, at::kInt, "masks"), of = column(rows_in, at::kInt, "mask_rows");
  std::vector<const uint32_t*> found(rows, nullptr);
  TORCH_CHECK(masks.defined() == of.defined(), "sample: masks and mask_rows go together");
  if (!masks.defined()) return found;
  TORCH_CHECK(masks.dim() == 2 && masks.size(1) == (n + 31) / 32 && of.numel() == rows,
              "sample: masks must be int32 [M, ", (n + 31) / 32, "], mask_rows int32 [S]");
  const int32_t* which = of.const_data_ptr<int32_t>();
  const auto* words = reinterpret_cast<const uint32_t*>(masks.const_data_ptr<int32_t>());
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK(which[row] >= -1 && which[row] < masks.size(0), "sample: no mask ", which[row]);
    if (which[row] >= 0) found[row] = words + which[row] * masks.size(1);
  }
  return found;
}

// What rows gave, as operators return it.
struct Drawings {
  at::Tensor tokens, status, logprobs, top_ids, top_logprobs;
  int64_t top;

  Drawings(int64_t count, int64_t top_in, const at::Tensor& ints, const at::Tensor& logits)
      : tokens(at::full({count}, -1, ints.options())),
        status(at::zeros({count}, ints.options().dtype(at::kInt))),
        logprobs(at::zeros({count}, logits.options())),
        top_ids(at::full({count, top_in}, -1, status.options())),
        top_logprobs(at::zeros({count, top_in}, logits.options())),
        top(top_in) {}

  Drawn of(int64_t row) {
    return {-1, 0, top_ids.mutable_data_ptr<int32_t>() + row * top,
            top_logprobs.mutable_data_ptr<float>() + row * top};
  }
  void set(int64_t row, const Drawn& drawn, DrawStatus state) {
    tokens.mutable_data_ptr<int64_t>()[row] = drawn.token;
    logprobs.mutable_data_ptr<float>()[row] = drawn.logprob;
    status.mutable_data_ptr<int32_t>()[row] = static_cast<int32_t>(state);
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> tensors() const {
    return {tokens, status, logprobs, top_ids, top_logprobs};
  }
};

}  // namespace precast
