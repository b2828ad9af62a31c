// Replays a captured decode step: the package's embed model once, its layer model once for each layer
// with that layer's weights, its head model once. The loop is here and not in Python, where it costs
// 6-8 % of a step at batch 1.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <memory>
#include <string>
#include <vector>

namespace precast {
namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;
using Tensors = std::vector<at::Tensor>;

void append(Tensors& to, const Tensors& from) { to.insert(to.end(), from.begin(), from.end()); }

class StepRunner : public torch::CustomClassHolder {
 public:
  // `path`: a verified package. Nothing is compiled; dlopen runs the package's native code.
  explicit StepRunner(const std::string& path)
      : embed_(path, "embed", true), layer_(path, "layer", true), head_(path, "head", true) {}

  // Weights are inputs of the graphs, not constants in them, so all captured sizes share one copy.
  void bind(Tensors embed, std::vector<Tensors> layers, Tensors head) {
    embed_weights_ = std::move(embed);
    layer_weights_ = std::move(layers);
    head_weights_ = std::move(head);
  }

  // token_ids, positions: int64 [B]. paging: slots, query_starts, context_lens, block_tables as
  // paged_attention takes them. Returns logits [B, vocabulary].
  at::Tensor run(const at::Tensor& token_ids, const at::Tensor& positions, Tensors paging) {
    Tensors inputs{token_ids, positions};
    append(inputs, embed_weights_);
    Tensors state = embed_.boxed_run(std::move(inputs));  // hidden states, cos, sin
    TORCH_CHECK(state.size() == 3, "embed model: expected 3 outputs, got ", state.size());
    at::Tensor hidden = std::move(state[0]);
    for (const Tensors& weights : layer_weights_) {
      inputs = {std::move(hidden), state[1], state[2]};
      inputs.reserve(3 + paging.size() + weights.size());
      append(inputs, paging);
      append(inputs, weights);
      hidden = std::move(layer_.boxed_run(std::move(inputs))[0]);
    }
    inputs = {std::move(hidden)};
    append(inputs, head_weights_);
    return head_.boxed_run(std::move(inputs))[0];
  }

 private:
  Loader embed_, layer_, head_;
  Tensors embed_weights_, head_weights_;
  std::vector<Tensors> layer_weights_;
};

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.class_<StepRunner>("StepRunner")
      .def(torch::init<std::string>())
      .def("bind", &StepRunner::bind)
      .def("run", &StepRunner::run);
}

}  // namespace
}  // namespace precast
