// Schemas and CPU implementations of the small operators; fakes are in precast/ops/native.py. Graphs call
// them: what Inductor would make of their definitions rounds in another order than they do, and a token's
// logits would depend on the graph.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "kernels.h"
#include "pool.h"
#include "shims.h"

namespace precast {
namespace {

constexpr int64_t kParallelFloats = 16384;

void check_float(const at::Tensor& x, const char* what) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat, what, " must be float32 on the CPU, not ",
              x.scalar_type());
}

// Calls body(row) for every row, on all threads where there is enough to do.
template <typename F>
void for_rows(int64_t rows, int64_t floats_a_row, F&& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  };
  if (rows * floats_a_row < kParallelFloats) return run(0, rows);
  ThreadPool::instance().run([&](int part, int parts) {
    const Range r = share(rows, part, parts);
    run(r.begin, r.end);
  });
}

at::Tensor rms_norm(const at::Tensor& x_in, const at::Tensor& weight, double eps) {
  check_float(x_in, "rms_norm: x");
  check_float(weight, "rms_norm: weight");
  TORCH_CHECK(x_in.dim() >= 1 && weight.is_contiguous() && weight.dim() == 1 &&
                  weight.size(0) == x_in.size(-1),
              "rms_norm: weight must hold one contiguous value for each of x's last dimension");
  const at::Tensor x = x_in.contiguous();
  at::Tensor y = at::empty_like(x);
  const int64_t n = x.size(-1);
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for_rows(n == 0 ? 0 : x.numel() / n, n, [&](int64_t row) {
    kernels().rms_norm(from + row * n, w, static_cast<float>(eps), to + row * n, n);
  });
  return y;
}

at::Tensor rotary(const at::Tensor& x_in, const at::Tensor& cos_in, const at::Tensor& sin_in) {
  check_float(x_in, "rotary: x");
  check_float(cos_in, "rotary: cos");
  check_float(sin_in, "rotary: sin");
  TORCH_CHECK(x_in.dim() == 3 && cos_in.dim() == 2 && cos_in.sizes() == sin_in.sizes() &&
                  cos_in.size(0) == x_in.size(0) && 2 * cos_in.size(1) <= x_in.size(2),
              "rotary: expected x [T, heads, D], and cos and sin [T, at most D / 2]");
  const at::Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
  const at::Tensor x = x_in.stride(2) == 1 ? x_in : x_in.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  const int64_t heads = x.size(1), dim = x.size(2), half = cos.size(1);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for_rows(x.size(0), heads * dim, [&](int64_t token) {
    for (int64_t head = 0; head < heads; ++head) {
      kernels().rotate(from + token * x.stride(0) + head * x.stride(1),
                       cos.const_data_ptr<float>() + token * half,
                       sin.const_data_ptr<float>() + token * half,
                       to + (token * heads + head) * dim, half, dim);
    }
  });
  return y;
}

using GatedKernel = void (*)(const float* gate, const float* up, float* y, int64_t n);

at::Tensor gated(const char* name, GatedKernel kernel, const at::Tensor& x_in) {
  check_float(x_in, name);
  TORCH_CHECK(x_in.dim() == 2 && x_in.size(1) % 2 == 0, name, ": expected x [T, 2 N]");
  const at::Tensor x = x_in.contiguous();
  const int64_t n = x.size(1) / 2;
  at::Tensor y = at::empty({x.size(0), n}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for_rows(x.size(0), n, [&](int64_t row) {
    kernel(from + row * 2 * n, from + row * 2 * n + n, to + row * n, n);
  });
  return y;
}

}  // namespace

at::Tensor silu_and_mul(const at::Tensor& x) {
  return gated("silu_and_mul", kernels().silu_and_mul, x);
}

namespace {

at::Tensor gelu_tanh_and_mul(const at::Tensor& x) {
  return gated("gelu_tanh_and_mul", kernels().gelu_tanh_and_mul, x);
}

at::Tensor soft_cap(const at::Tensor& x_in, double cap) {
  check_float(x_in, "soft_cap: x");
  TORCH_CHECK(x_in.dim() == 2 && cap > 0, "soft_cap: expected x [T, N] and a cap above 0");
  const at::Tensor x = x_in.contiguous();
  at::Tensor y = at::empty_like(x);
  const int64_t n = x.size(1);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for_rows(x.size(0), n, [&](int64_t row) {
    kernels().soft_cap(from + row * n, static_cast<float>(cap), to + row * n, n);
  });
  return y;
}

// sigmoid(gate) x: a row's gate [T, 1] is the first of a softmax over it and 0.
at::Tensor sigmoid_and_mul(const at::Tensor& gate_in, const at::Tensor& x_in) {
  check_float(gate_in, "sigmoid_and_mul: gate");
  check_float(x_in, "sigmoid_and_mul: x");
  TORCH_CHECK(x_in.dim() == 2 && gate_in.dim() == 2 && gate_in.size(0) == x_in.size(0) &&
                  gate_in.size(1) == 1,
              "sigmoid_and_mul: expected gate [T, 1] and x [T, N]");
  const at::Tensor x = x_in.contiguous(), gate = gate_in.contiguous();
  at::Tensor y = at::empty_like(x);
  const int64_t n = x.size(1);
  const float *from = x.const_data_ptr<float>(), *gates = gate.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  for_rows(x.size(0), n, [&](int64_t row) {
    const float scores[2] = {gates[row], 0};
    float shares[2];
    kernels().softmax(scores, shares, 2);
    for (int64_t i = row * n; i < (row + 1) * n; ++i) to[i] = from[i] * shares[0];
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("silu_and_mul(Tensor gate_up) -> Tensor");
  m.def("gelu_tanh_and_mul(Tensor gate_up) -> Tensor");
  m.def("sigmoid_and_mul(Tensor gate, Tensor x) -> Tensor");
  m.def("soft_cap(Tensor x, float cap) -> Tensor");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rotary", rotary);
  m.impl("silu_and_mul", silu_and_mul);
  m.impl("gelu_tanh_and_mul", gelu_tanh_and_mul);
  m.impl("sigmoid_and_mul", sigmoid_and_mul);
  m.impl("soft_cap", soft_cap);
}

}  // namespace precast

using precast::tensor;

PRECAST_SHIM aoti_torch_cpu_rms_norm(AtenTensorHandle x, AtenTensorHandle weight, double eps,
                                     AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::rms_norm(tensor(x), tensor(weight), eps));
}

PRECAST_SHIM aoti_torch_cpu_rotary(AtenTensorHandle x, AtenTensorHandle cos, AtenTensorHandle sin,
                                   AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::rotary(tensor(x), tensor(cos), tensor(sin)));
}

PRECAST_SHIM aoti_torch_cpu_silu_and_mul(AtenTensorHandle gate_up, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::silu_and_mul(tensor(gate_up)));
}

PRECAST_SHIM aoti_torch_cpu_gelu_tanh_and_mul(AtenTensorHandle gate_up, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::gelu_tanh_and_mul(tensor(gate_up)));
}

PRECAST_SHIM aoti_torch_cpu_sigmoid_and_mul(AtenTensorHandle gate, AtenTensorHandle x,
                                            AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::sigmoid_and_mul(tensor(gate), tensor(x)));
}

PRECAST_SHIM aoti_torch_cpu_soft_cap(AtenTensorHandle x, double cap, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::soft_cap(tensor(x), cap));
}
