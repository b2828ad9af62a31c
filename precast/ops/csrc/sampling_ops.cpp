// Schemas and CPU implementations of sampling where a rank has all logits. Fakes are in
// precast/ops/native.py; precast/ops/sampling.py says what the columns mean. Where ranks have a part each:
// sampling_split.cpp.
#include <torch/library.h>

#include "sampling_batch.h"

namespace precast {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample(
    const at::Tensor& logits, const at::Tensor& reals, const at::Tensor& ints,
    const std::optional<at::Tensor>& seen_starts, const std::optional<at::Tensor>& seen_ids,
    const std::optional<at::Tensor>& seen_counts, const std::optional<at::Tensor>& bias_starts,
    const std::optional<at::Tensor>& bias_ids, const std::optional<at::Tensor>& bias_values,
    const std::optional<at::Tensor>& masks, const std::optional<at::Tensor>& mask_rows, int64_t top) {
  check_logits(logits, "sample");
  TORCH_CHECK(top >= 0, "sample: top must be at least 0");
  const int64_t count = logits.size(0), n = logits.size(1);
  const std::vector<DrawParams> params = params_of(reals, ints, count, top);
  const ByRows<int32_t> seen(seen_starts, seen_ids, seen_counts, count, "seen");
  const ByRows<float> bias(bias_starts, bias_ids, bias_values, count, "bias");
  Batch batch(logits, masks_of(masks, mask_rows, count, n), 0, n);
  Drawings found(count, top, ints, logits);
  if (count == 0) return found.tensors();
  batch.adjust(params, seen, bias);
  batch.scan();
  batch.sum(params);
  batch.each_row([&](int64_t i) {
    Drawn drawn = found.of(i);
    draw_row(batch.rows[i], params[i], drawn);
    found.set(i, drawn, batch.rows[i].status);
  });
  return found.tensors();
}

// Each row's largest logit and the first place that has it; NaN where a logit is NaN or +inf.
std::tuple<at::Tensor, at::Tensor> largest(const at::Tensor& x_in) {
  const at::Tensor x = x_in.contiguous();
  check_logits(x, "largest");
  at::Tensor values = at::empty({x.size(0)}, x.options());
  at::Tensor places = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  Batch batch(x, std::vector<const uint32_t*>(x.size(0), nullptr), 0, x.size(1));
  batch.scan();
  for (int64_t i = 0; i < x.size(0); ++i) {
    const DrawRow& row = batch.rows[i];
    const bool finite = row.status != DrawStatus::kNotFinite;
    values.mutable_data_ptr<float>()[i] = finite ? row.maximum : NAN;
    places.mutable_data_ptr<int64_t>()[i] = finite ? likeliest(row) : 0;
  }
  return {values, places};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def(
      "sample(Tensor(a!) logits, Tensor reals, Tensor ints, Tensor? seen_starts, Tensor? seen_ids, "
      "Tensor? seen_counts, Tensor? bias_starts, Tensor? bias_ids, Tensor? bias_values, Tensor? masks, "
      "Tensor? mask_rows, int top) -> (Tensor tokens, Tensor status, Tensor logprobs, Tensor top_ids, "
      "Tensor top_logprobs)");
  m.def("largest(Tensor x) -> (Tensor values, Tensor places)");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) {
  m.impl("sample", sample);
  m.impl("largest", largest);
}

}  // namespace precast
