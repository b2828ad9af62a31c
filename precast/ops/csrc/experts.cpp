// The experts of a mixture: each token goes through the few that were chosen for it.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "shims.h"

namespace precast {
namespace {

// For each expert, the entries of `chosen` [T, k] that name it, in order.
std::vector<std::vector<int64_t>> entries_of(const at::Tensor& chosen, int64_t experts) {
  std::vector<std::vector<int64_t>> entries(experts);
  const int64_t* ids = chosen.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < chosen.numel(); ++i) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < experts, "fused_experts: no expert ", ids[i], " among ", experts);
    entries[ids[i]].push_back(i);
  }
  return entries;
}

// The first `k` of an expert's `likes` in falling order, the lower number first among equals. NaN is never
// chosen over another: ids are in range and differ whatever the likes are.
void choose(const float* likes, int64_t experts, int64_t k, int64_t* chosen) {
  for (int64_t i = 0; i < k; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (std::find(chosen, chosen + i, e) != chosen + i) continue;
      if (best < 0 || likes[e] > likes[best]) best = e;
    }
    chosen[i] = best;
  }
}

// scores [T, experts] to the k likeliest experts of each token, int64 [T, k], and their probabilities,
// float32 [T, k]; `normalize`: those sum to one.
std::tuple<at::Tensor, at::Tensor> route(const at::Tensor& scores_in, int64_t k, bool normalize) {
  TORCH_CHECK(scores_in.dim() == 2 && scores_in.scalar_type() == at::kFloat && k > 0 &&
                  k <= scores_in.size(1),
              "route: scores must be float32 [T, experts], of which there are ", k, " or more");
  const at::Tensor scores = scores_in.contiguous();
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  at::Tensor chosen = at::empty({tokens, k}, scores.options().dtype(at::kLong));
  at::Tensor weights = at::empty({tokens, k}, scores.options());
  std::vector<float> likes(experts);
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t* ids = chosen.mutable_data_ptr<int64_t>() + t * k;
    float* weight = weights.mutable_data_ptr<float>() + t * k;
    kernels().softmax(scores.const_data_ptr<float>() + t * experts, likes.data(), experts);
    choose(likes.data(), experts, k, ids);
    float total = 0;
    for (int64_t i = 0; i < k; ++i) total += weight[i] = likes[ids[i]];
    for (int64_t i = 0; normalize && i < k; ++i) weight[i] /= total;
  }
  return {chosen, weights};
}

// What an expert makes of gate and up side by side: silu(gate) up, or with a limit gate sigmoid(1.702 gate)
// (up + 1) of values within it.
at::Tensor activated(const at::Tensor& both, float limit) {
  if (limit <= 0) return silu_and_mul(both);
  constexpr float kSteepness = 1.702f;
  at::Tensor x = at::empty_like(both);
  const int64_t size = both.size(1) / 2;
  const float* from = both.const_data_ptr<float>();
  float* to = x.mutable_data_ptr<float>();
  for (int64_t row = 0; row < both.size(0); ++row, from += 2 * size, to += 2 * size) {
    for (int64_t i = 0; i < size; ++i) {
      const float gate = from[i] > limit ? limit : from[i], up = from[size + i];
      to[i] = kSteepness * gate;
      to[size + i] = ((up > limit ? limit : up < -limit ? -limit : up) + 1) / kSteepness;
    }
  }
  return silu_and_mul(x);
}

void check_biases(const std::optional<at::Tensor>& biases, int64_t experts, int64_t outputs) {
  TORCH_CHECK(!biases || (biases->dim() == 2 && biases->size(0) == experts &&
                          biases->size(1) == outputs && biases->is_contiguous()),
              "fused_experts: biases must be contiguous [", experts, ", ", outputs, "]");
}

std::optional<at::Tensor> bias_of(const std::optional<at::Tensor>& biases, int64_t expert) {
  return biases ? std::optional<at::Tensor>(biases->select(0, expert)) : std::nullopt;
}

// Sums a token's experts in their order, so that what else is in the batch makes no difference.
at::Tensor fused_experts(const at::Tensor& x_in, const at::Tensor& chosen_in,
                         const at::Tensor& weights_in, const at::Tensor& gate_up,
                         const at::Tensor& down, int64_t expert_size, int64_t format,
                         const std::optional<at::Tensor>& gate_up_bias,
                         const std::optional<at::Tensor>& down_bias, double limit) {
  TORCH_CHECK(x_in.dim() == 2 && x_in.scalar_type() == at::kFloat,
              "fused_experts: x must be float32 [T, H]");
  TORCH_CHECK(chosen_in.dim() == 2 && chosen_in.scalar_type() == at::kLong &&
                  weights_in.scalar_type() == at::kFloat &&
                  chosen_in.sizes() == weights_in.sizes() && chosen_in.size(0) == x_in.size(0),
              "fused_experts: experts must be int64 and weights float32, [T, k] both");
  TORCH_CHECK(gate_up.dim() == 3 && down.dim() == 3 && gate_up.size(0) == down.size(0),
              "fused_experts: packed weights must be [experts, panels, bytes]");
  check_biases(gate_up_bias, gate_up.size(0), 2 * expert_size);
  check_biases(down_bias, down.size(0), x_in.size(1));
  const at::Tensor x = x_in.contiguous(), chosen = chosen_in.contiguous();
  const at::Tensor weights = weights_in.contiguous();
  const int64_t hidden = x.size(1), per_token = chosen.size(1);
  const float* source = x.const_data_ptr<float>();
  const float* scale = weights.const_data_ptr<float>();
  at::Tensor out = at::zeros({x.size(0), hidden}, x.options());
  float* sums = out.mutable_data_ptr<float>();
  const auto entries = entries_of(chosen, gate_up.size(0));
  for (int64_t e = 0; e < gate_up.size(0); ++e) {
    const int64_t rows = static_cast<int64_t>(entries[e].size());
    if (rows == 0) continue;
    at::Tensor gathered = at::empty({rows, hidden}, x.options());
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = source + entries[e][r] / per_token * hidden;
      std::copy(row, row + hidden, gathered.mutable_data_ptr<float>() + r * hidden);
    }
    const at::Tensor both =
        linear(gathered, gate_up.select(0, e), bias_of(gate_up_bias, e), 2 * expert_size, format);
    const at::Tensor y = linear(activated(both, static_cast<float>(limit)), down.select(0, e),
                                bias_of(down_bias, e), hidden, format);
    const float* values = y.const_data_ptr<float>();
    for (int64_t r = 0; r < rows; ++r) {
      float* sum = sums + entries[e][r] / per_token * hidden;
      for (int64_t h = 0; h < hidden; ++h) sum[h] += scale[entries[e][r]] * values[r * hidden + h];
    }
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def("route(Tensor scores, int per_token, bool normalize) -> (Tensor, Tensor)");
  m.def(
      "fused_experts(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, "
      "int expert_size, int format, Tensor? gate_up_bias=None, Tensor? down_bias=None, "
      "float limit=0.0) -> Tensor");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) {
  m.impl("route", route);
  m.impl("fused_experts", fused_experts);
}

}  // namespace precast

PRECAST_SHIM aoti_torch_cpu_route(AtenTensorHandle scores, int64_t per_token, int32_t normalize,
                                  AtenTensorHandle* chosen, AtenTensorHandle* weights) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    c10::InferenceMode guard;
    auto [ids, likes] = precast::route(precast::tensor(scores), per_token, normalize != 0);
    *chosen = torch::aot_inductor::new_tensor_handle(std::move(ids));
    *weights = torch::aot_inductor::new_tensor_handle(std::move(likes));
  })
}

PRECAST_SHIM aoti_torch_cpu_fused_experts(AtenTensorHandle x, AtenTensorHandle experts,
                                          AtenTensorHandle weights, AtenTensorHandle gate_up,
                                          AtenTensorHandle down, int64_t expert_size, int64_t format,
                                          AtenTensorHandle* gate_up_bias, AtenTensorHandle* down_bias,
                                          double limit, AtenTensorHandle* ret) {
  using precast::optional_tensor;
  using precast::tensor;
  PRECAST_RETURN(precast::fused_experts(tensor(x), tensor(experts), tensor(weights),
                                        tensor(gate_up), tensor(down), expert_size, format,
                                        optional_tensor(gate_up_bias), optional_tensor(down_bias),
                                        limit));
}
