// Schemas and CPU implementations of torch.ops.precast.*; fakes are in precast/ops/native.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "kernels.h"
#include "pool.h"
#include "shims.h"

namespace precast {
namespace {

at::Tensor rows_of(const at::Tensor& x, const char* what) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat, what, ": expected a 2-D float32 tensor");
  return x.stride(1) == 1 ? x : x.contiguous();
}

const float* bias_of(const std::optional<at::Tensor>& bias, int64_t n) {
  if (!bias.has_value()) return nullptr;
  TORCH_CHECK(bias->is_contiguous() && bias->scalar_type() == at::kFloat && bias->numel() == n,
              "bias: expected ", n, " contiguous float32 values");
  return bias->const_data_ptr<float>();
}

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

at::Tensor linear(const at::Tensor& x_in, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, int64_t n) {
  const at::Tensor x = rows_of(x_in, "linear: x");
  const int64_t m = x.size(0), k = x.size(1);
  const bool is_float = weight.scalar_type() == at::kFloat;
  TORCH_CHECK(is_float || weight.scalar_type() == at::kBFloat16,
              "linear: weight must be float32 or bfloat16");
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 3 && weight.size(0) == panels_of(n) &&
                  weight.size(1) == k && weight.size(2) == kPanel,
              "linear: weight must be packed as [ceil(N / 16), K, 16]");
  at::Tensor y = at::empty({m, n}, x.options());
  const float* b = bias_of(bias, n);
  ThreadPool::instance().run([&](int part, int parts) {
    const Range r = share(weight.size(0), part, parts);
    kernels().gemm_float(is_float ? WeightType::kFloat32 : WeightType::kBFloat16,
                         x.const_data_ptr<float>(), x.stride(0), weight.const_data_ptr(), b,
                         y.mutable_data_ptr<float>(), m, n, k, r.begin, r.end);
  });
  return y;
}

at::Tensor linear_w8a8(const at::Tensor& x_in, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& sums, const std::optional<at::Tensor>& bias, int64_t n) {
  const at::Tensor x = rows_of(x_in, "linear_w8a8: x");
  const int64_t m = x.size(0), k = x.size(1), k_padded = (k + 3) / 4 * 4, panels = panels_of(n);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kChar && weight.dim() == 4 &&
                  weight.size(0) == panels && weight.size(1) == k_padded / 4 &&
                  weight.size(2) == kPanel && weight.size(3) == 4,
              "linear_w8a8: weight must be int8, packed as [ceil(N / 16), ceil(K / 4), 16, 4]");
  TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == at::kFloat && scales.numel() == n,
              "linear_w8a8: scales must be N float32 values");
  TORCH_CHECK(sums.is_contiguous() && sums.scalar_type() == at::kInt &&
                  sums.numel() == panels * kPanel,
              "linear_w8a8: sums must be ceil(N / 16) * 16 int32 values");
  at::Tensor y = at::empty({m, n}, x.options());
  const float* b = bias_of(bias, n);
  thread_local std::vector<int8_t> quantized;
  thread_local std::vector<float> x_scales;
  quantized.resize(m * k_padded);
  x_scales.resize(m);
  int8_t* xq = quantized.data();
  float* xs = x_scales.data();
  const float* source = x.const_data_ptr<float>();
  const auto quantize = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      xs[r] = kernels().quantize_row(source + r * x.stride(0), xq + r * k_padded, k, k_padded);
    }
  };
  auto& pool = ThreadPool::instance();
  if (m < 4) {
    quantize(0, m);
  } else {
    pool.run([&](int part, int parts) {
      const Range r = share(m, part, parts);
      quantize(r.begin, r.end);
    });
  }
  pool.run([&](int part, int parts) {
    const Range r = share(panels, part, parts);
    kernels().gemm_int8(xq, xs, weight.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(),
                        sums.const_data_ptr<int32_t>(), b, y.mutable_data_ptr<float>(), m, n,
                        k_padded, r.begin, r.end);
  });
  return y;
}

void check_ints(const at::Tensor& t, int64_t dim, const char* what) {
  TORCH_CHECK(t.is_contiguous() && t.scalar_type() == at::kInt && t.dim() == dim,
              "paged_attention: ", what, " must be a contiguous int32 tensor of ", dim, " dimensions");
}

void check_heads(const at::Tensor& t, const char* what) {
  TORCH_CHECK(t.dim() == 3 && t.scalar_type() == at::kFloat && t.stride(2) == 1 &&
                  t.stride(1) == t.size(2),
              "paged_attention: ", what, " must be float32 [T, heads, head_dim], packed within a token");
}

void store_cache(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache,
                 const at::Tensor& v_cache, const int32_t* slots) {
  const int64_t heads = k.size(1), dim = k.size(2), block_size = k_cache.size(2);
  const int64_t limit = k_cache.size(0) * block_size;
  for (int64_t t = 0; t < k.size(0); ++t) {
    const int64_t slot = slots[t];
    if (slot < 0) continue;  // a row that only pads the batch
    TORCH_CHECK(slot < limit, "paged_attention: slot ", slot, " is outside of the cache");
    const int64_t block = slot / block_size, offset = slot % block_size;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t to = ((block * heads + h) * block_size + offset) * dim;
      std::memcpy(k_cache.mutable_data_ptr<float>() + to,
                  k.const_data_ptr<float>() + t * k.stride(0) + h * dim, dim * sizeof(float));
      std::memcpy(v_cache.mutable_data_ptr<float>() + to,
                  v.const_data_ptr<float>() + t * v.stride(0) + h * dim, dim * sizeof(float));
    }
  }
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& slots, const at::Tensor& query_starts,
                           const at::Tensor& context_lens, const at::Tensor& block_tables,
                           double scale) {
  check_heads(q, "q");
  check_heads(k, "k");
  check_heads(v, "v");
  check_ints(slots, 1, "slots");
  check_ints(query_starts, 1, "query_starts");
  check_ints(context_lens, 1, "context_lens");
  check_ints(block_tables, 2, "block_tables");
  const int64_t tokens = q.size(0), kv_heads = k.size(1), sequences = context_lens.size(0);
  TORCH_CHECK(k_cache.is_contiguous() && k_cache.dim() == 4 && k_cache.size(1) == kv_heads &&
                  k_cache.size(3) == q.size(2) && k_cache.scalar_type() == at::kFloat &&
                  v_cache.is_contiguous() && v_cache.sizes() == k_cache.sizes() &&
                  v_cache.scalar_type() == at::kFloat,
              "paged_attention: caches must be float32 [blocks, kv_heads, block_size, head_dim]");
  TORCH_CHECK(q.size(1) % kv_heads == 0 && k.size(0) == tokens && v.sizes() == k.sizes() &&
                  slots.size(0) == tokens && query_starts.size(0) == sequences + 1 &&
                  block_tables.size(0) == sequences,
              "paged_attention: shapes do not agree");
  store_cache(k, v, k_cache, v_cache, slots.const_data_ptr<int32_t>());

  at::Tensor out = at::empty({tokens, q.size(1), q.size(2)}, q.options());
  const int32_t* starts = query_starts.const_data_ptr<int32_t>();
  const int32_t* lengths = context_lens.const_data_ptr<int32_t>();
  const int64_t capacity = block_tables.size(1) * k_cache.size(2);
  for (int64_t s = 0; s < sequences; ++s) {
    TORCH_CHECK(lengths[s] >= 0 && lengths[s] <= capacity && starts[s] <= starts[s + 1],
                "paged_attention: context of ", lengths[s], " does not fit the block table");
    const int32_t* table = block_tables.const_data_ptr<int32_t>() + s * block_tables.size(1);
    for (int64_t b = 0; b * k_cache.size(2) < lengths[s]; ++b) {
      TORCH_CHECK(table[b] >= 0 && table[b] < k_cache.size(0), "paged_attention: block ", table[b],
                  " is outside of the cache");
    }
  }
  TORCH_CHECK(starts[0] == 0 && starts[sequences] <= tokens, "paged_attention: query_starts");
  AttentionArgs args{};
  args.q = q.const_data_ptr<float>();
  args.k_cache = k_cache.const_data_ptr<float>();
  args.v_cache = v_cache.const_data_ptr<float>();
  args.out = out.mutable_data_ptr<float>();
  args.q_stride = q.stride(0);
  args.q_heads = static_cast<int>(q.size(1));
  args.kv_heads = static_cast<int>(kv_heads);
  args.head_dim = static_cast<int>(q.size(2));
  args.block_size = static_cast<int>(k_cache.size(2));
  args.scale = static_cast<float>(scale);
  ThreadPool::instance().run([&](int part, int parts) {
    thread_local std::vector<float> scratch;
    scratch.resize(attend_scratch_floats(args));
    AttentionArgs mine = args;
    // Dealt out one by one: causal rows cost more the later they come.
    int64_t item = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      mine.block_table = block_tables.const_data_ptr<int32_t>() + s * block_tables.size(1);
      for (int64_t t = starts[s]; t < starts[s + 1]; ++t) {
        const int64_t context = lengths[s] - (starts[s + 1] - 1 - t);
        for (int h = 0; h < kv_heads; ++h, ++item) {
          if (item % parts == part) {
            kernels().attend(mine, t, h, context > 0 ? context : 0, scratch.data());
          }
        }
      }
    }
  });
  return out;
}

void start_threads(at::IntArrayRef cores) { ThreadPool::instance().start(cores.vec()); }

std::string native_isa() { return kernels().isa; }

}  // namespace

TORCH_LIBRARY(precast, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  m.def(
      "linear_w8a8(Tensor x, Tensor weight, Tensor scales, Tensor column_sums, Tensor? bias, "
      "int out_features) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slots, Tensor query_starts, Tensor context_lens, Tensor block_tables, float scale) "
      "-> Tensor");
  m.def("start_threads(int[] cores) -> ()", start_threads);
  m.def("native_isa() -> str", native_isa);
}

TORCH_LIBRARY_IMPL(precast, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_w8a8", linear_w8a8);
  m.impl("paged_attention", paged_attention);
}

}  // namespace precast

using precast::optional_tensor;
using precast::tensor;

PRECAST_SHIM aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight,
                                   AtenTensorHandle* bias, int64_t out_features,
                                   AtenTensorHandle* ret) {
  PRECAST_RETURN(
      precast::linear(tensor(x), tensor(weight), optional_tensor(bias), out_features));
}

PRECAST_SHIM aoti_torch_cpu_linear_w8a8(AtenTensorHandle x, AtenTensorHandle weight,
                                        AtenTensorHandle scales, AtenTensorHandle sums,
                                        AtenTensorHandle* bias, int64_t out_features,
                                        AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::linear_w8a8(tensor(x), tensor(weight), tensor(scales), tensor(sums),
                                      optional_tensor(bias), out_features));
}

PRECAST_SHIM aoti_torch_cpu_paged_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache,
    AtenTensorHandle v_cache, AtenTensorHandle slots, AtenTensorHandle query_starts,
    AtenTensorHandle context_lens, AtenTensorHandle block_tables, double scale,
    AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::paged_attention(tensor(q), tensor(k), tensor(v), tensor(k_cache),
                                          tensor(v_cache), tensor(slots), tensor(query_starts),
                                          tensor(context_lens), tensor(block_tables), scale));
}
