// Replays a captured step: the package's embed model once, for each layer the model of its kind with
// that layer's weights, its head model once. The loop is here and not in Python, where it costs 6-8 %
// of a step at batch 1.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace precast {
namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;
using Tensors = std::vector<at::Tensor>;

void append(Tensors& to, const Tensors& from) { to.insert(to.end(), from.begin(), from.end()); }

// A 1-D tensor with `value` added up to `size` elements.
at::Tensor padded(const at::Tensor& x, int64_t size, int64_t value) {
  if (x.size(0) == size) return x;
  at::Tensor longer = at::full({size}, value, x.options());
  longer.narrow(0, 0, x.size(0)).copy_(x);
  return longer;
}

class StepRunner : public torch::CustomClassHolder {
 public:
  // `path`: a verified package; `layers`: the names of its layer models, one for each kind of layer;
  // `tokens`: how many they were captured for. Nothing is compiled; dlopen runs the package's native
  // code.
  StepRunner(const std::string& path, const std::vector<std::string>& layers, int64_t tokens)
      : embed_(path, "embed", true), head_(path, "head", true), tokens_(tokens) {
    for (const std::string& name : layers) {
      layers_.push_back(std::make_unique<Loader>(path, name, true));
    }
  }

  // Weights are inputs of the graphs, not constants in them, so all captured sizes share one copy.
  // For each layer of the model: its weights, its layer model's index, its rope's index, and 1 if it
  // attends to a window, else 0.
  void bind(Tensors embed, std::vector<Tensors> layers, Tensors head, std::vector<int64_t> kinds,
            std::vector<int64_t> ropes, std::vector<int64_t> windows) {
    TORCH_CHECK(kinds.size() == layers.size() && ropes.size() == layers.size() &&
                    windows.size() == layers.size(),
                "every layer needs a kind, a rope and whether it has a window");
    for (const int64_t kind : kinds) {
      TORCH_CHECK(kind >= 0 && kind < static_cast<int64_t>(layers_.size()), "no layer kind ", kind);
    }
    for (const int64_t rope : ropes) TORCH_CHECK(rope >= 0, "no rope ", rope);
    embed_weights_ = std::move(embed);
    layer_weights_ = std::move(layers);
    head_weights_ = std::move(head);
    kinds_ = std::move(kinds);
    ropes_ = std::move(ropes);
    windows_ = std::move(windows);
  }

  // token_ids, positions: int64 [T], T up to the captured number of tokens. paging: slots,
  // query_starts, context_lens, block_tables as paged_attention takes them; window_paging: of layers with
  // a window, or empty for the same. Tokens are added that write nothing and that no sequence has. Returns
  // this rank's logits [R, V] of the tokens that `rows`, int64 [R], names, of all T without it; the head
  // runs on no others, and not at all for R = 0.
  at::Tensor run(const at::Tensor& token_ids, const at::Tensor& positions, Tensors paging,
                 Tensors window_paging, const std::optional<at::Tensor>& rows) {
    const int64_t live = token_ids.size(0);
    TORCH_CHECK(live <= tokens_ && positions.size(0) == live && paging.at(0).size(0) == live,
                "a graph of ", tokens_, " tokens can't run ", live);
    paging[0] = padded(paging[0], tokens_, -1);
    if (!window_paging.empty()) window_paging[0] = padded(window_paging[0], tokens_, -1);
    Tensors inputs{padded(token_ids, tokens_, 0), padded(positions, tokens_, 0)};
    append(inputs, embed_weights_);
    Tensors state = embed_.boxed_run(std::move(inputs));  // hidden states, each rope's cos and sin
    at::Tensor hidden = std::move(state.at(0));
    for (size_t i = 0; i < layer_weights_.size(); ++i) {
      const size_t cos = 1 + 2 * ropes_[i];
      inputs = {std::move(hidden), state.at(cos), state.at(cos + 1)};
      inputs.reserve(3 + paging.size() + layer_weights_[i].size());
      append(inputs, windows_[i] != 0 && !window_paging.empty() ? window_paging : paging);
      append(inputs, layer_weights_[i]);
      hidden = std::move(layers_[kinds_[i]]->boxed_run(std::move(inputs))[0]);
    }
    if (rows.has_value() && rows->size(0) == 0) return at::empty({0, 0}, hidden.options());
    inputs = {rows.has_value() ? hidden.index_select(0, *rows) : hidden.narrow(0, 0, live)};
    append(inputs, head_weights_);
    return head_.boxed_run(std::move(inputs))[0];
  }

 private:
  Loader embed_, head_;
  const int64_t tokens_;
  std::vector<std::unique_ptr<Loader>> layers_;
  Tensors embed_weights_, head_weights_;
  std::vector<Tensors> layer_weights_;
  std::vector<int64_t> kinds_, ropes_, windows_;
};

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.class_<StepRunner>("StepRunner")
      .def(torch::init<std::string, std::vector<std::string>, int64_t>())
      .def("bind", &StepRunner::bind)
      .def("run", &StepRunner::run);
}

}  // namespace
}  // namespace precast
