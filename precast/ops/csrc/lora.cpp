// Adds what low-rank adapters say to a linear's result: each row by its own adapter, or by none.
//
// A row's work is done by one thread in one order, so its bits depend on no other row; a row without an
// adapter keeps the bits that it had.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "shims.h"

namespace precast {
namespace {

constexpr int64_t kParallelFloats = 16384;
constexpr int64_t kColumns = 512;  // of a result, that stay in the first cache meanwhile

// y [n] += factors [count] times x [count, stride], whose rows come in order. Four at a time: y is read
// and written once for them.
inline __attribute__((always_inline)) void add_rows(const float* factors, const float* x,
                                                    float* __restrict y, int64_t count,
                                                    int64_t stride, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float f0 = factors[i], f1 = factors[i + 1], f2 = factors[i + 2], f3 = factors[i + 3];
    const float *x0 = x + i * stride, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
    for (int64_t j = 0; j < n; ++j) {
      y[j] = (((y[j] + f0 * x0[j]) + f1 * x1[j]) + f2 * x2[j]) + f3 * x3[j];
    }
  }
  for (; i < count; ++i) {
    for (int64_t j = 0; j < n; ++j) y[j] += factors[i] * x[i * stride + j];
  }
}

using AddRows = void (*)(const float* factors, const float* x, float* y, int64_t count,
                         int64_t stride, int64_t n);

void add_rows_scalar(const float* f, const float* x, float* y, int64_t count, int64_t stride,
                     int64_t n) {
  add_rows(f, x, y, count, stride, n);
}

__attribute__((target("avx2,fma"))) void add_rows_avx2(const float* f, const float* x, float* y,
                                                           int64_t count, int64_t stride,
                                                           int64_t n) {
  add_rows(f, x, y, count, stride, n);
}

__attribute__((target("avx512f,fma"))) void add_rows_avx512(const float* f, const float* x,
                                                                    float* y, int64_t count,
                                                                    int64_t stride, int64_t n) {
  add_rows(f, x, y, count, stride, n);
}

// For the instruction set that the other kernels have.
AddRows chosen() {
  const std::string_view isa = kernels().isa;
  if (isa == "scalar") return add_rows_scalar;
  return isa == "avx2" ? add_rows_avx2 : add_rows_avx512;
}

struct Adapters {
  const float *a, *b;
  int64_t slots, k, rank, n;
  std::vector<int64_t> ends;  // of each part's columns
};

void add_to_row(const Adapters& all, int64_t slot, const float* x, float* y) {
  const int64_t parts = static_cast<int64_t>(all.ends.size()), inner = parts * all.rank;
  thread_local std::vector<float> hidden;
  hidden.assign(inner, 0.0f);
  static const AddRows add = chosen();
  add(x, all.a + slot * all.k * inner, hidden.data(), all.k, inner, inner);
  const float *b = all.b + slot * all.rank * all.n, *h = hidden.data();
  for (int64_t part = 0, first = 0; part < parts; ++part, h += all.rank) {
    for (; first < all.ends[part]; first += kColumns) {
      const int64_t count = std::min(kColumns, all.ends[part] - first);
      add(h, b + first, y + first, all.rank, all.n, count);
    }
    first = all.ends[part];
  }
}

void check(const at::Tensor& x, int64_t dim, const char* what) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == dim && x.is_contiguous(),
              "lora: ", what, " must be contiguous float32 of ", dim, " dimensions on the CPU");
}

Adapters adapters_of(const at::Tensor& a, const at::Tensor& b, at::IntArrayRef widths) {
  check(a, 3, "a");
  check(b, 3, "b");
  Adapters all{a.const_data_ptr<float>(), b.const_data_ptr<float>(), a.size(0), a.size(1), b.size(1),
               b.size(2), {}};
  int64_t end = 0;
  for (const int64_t width : widths) all.ends.push_back(end += width);
  TORCH_CHECK(b.size(0) == all.slots && end == all.n &&
                  a.size(2) == all.rank * static_cast<int64_t>(widths.size()),
              "lora: a [slots, K, parts * rank], b [slots, rank, N] and widths, which sum to N, don't "
              "go together");
  return all;
}

}  // namespace

// x [T, K], y [T, N], slots int32 [T or more]: 0 for no adapter. The columns of y are in parts of these
// widths, each of which has `rank` columns of an adapter's a [K, parts * rank].
at::Tensor lora(const at::Tensor& x_in, const at::Tensor& y_in, const at::Tensor& slots,
                const at::Tensor& a, const at::Tensor& b, at::IntArrayRef widths) {
  const at::Tensor x = x_in.contiguous();
  check(x, 2, "x");
  at::Tensor y = y_in.clone(at::MemoryFormat::Contiguous);
  check(y, 2, "y");
  const Adapters all = adapters_of(a, b, widths);
  const int64_t rows = x.size(0);
  TORCH_CHECK(slots.is_cpu() && slots.scalar_type() == at::kInt && slots.is_contiguous() &&
                  slots.dim() == 1 && slots.size(0) >= rows,
              "lora: slots must be int32, one for each row");
  TORCH_CHECK(x.size(1) == all.k && y.size(0) == rows && y.size(1) == all.n,
              "lora: x, y and the adapters differ in their sizes");
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  std::vector<int64_t> adapted;
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK(slot[row] >= 0 && slot[row] < all.slots, "lora: there is no slot ", slot[row]);
    if (slot[row] != 0) adapted.push_back(row);
  }
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = adapted[i];
      add_to_row(all, slot[row], from + row * all.k, to + row * all.n);
    }
  };
  const int64_t count = static_cast<int64_t>(adapted.size());
  if (count < 2 || count * (all.k + all.n) * all.rank < kParallelFloats) {
    run(0, count);
    return y;
  }
  ThreadPool::instance().run([&](int part, int parts) {
    const Range r = share(count, part, parts);
    run(r.begin, r.end);
  });
  return y;
}

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def("lora(Tensor x, Tensor y, Tensor slots, Tensor a, Tensor b, int[] widths) -> Tensor");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) { m.impl("lora", lora); }

}  // namespace precast

PRECAST_SHIM aoti_torch_cpu_lora(AtenTensorHandle x, AtenTensorHandle y, AtenTensorHandle slots,
                                 AtenTensorHandle a, AtenTensorHandle b, const int64_t* widths,
                                 int64_t widths_len, AtenTensorHandle* ret) {
  using precast::tensor;
  PRECAST_RETURN(precast::lora(tensor(x), tensor(y), tensor(slots), tensor(a), tensor(b),
                               at::IntArrayRef(widths, widths_len)));
}
