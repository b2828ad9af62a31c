// Schemas and CPU implementations of the collectives; fakes are in precast/ops/native.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "comm.h"
#include "shims.h"

namespace precast {
namespace {

Communicator& group() {
  Communicator* comm = communicator();
  TORCH_CHECK(comm != nullptr, "this process has joined no tensor-parallel group");
  return *comm;
}

void check_float(const at::Tensor& x, const char* what) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_cpu(), what, ": expected a float32 tensor on the CPU, got ",
              x.scalar_type(), " on ", x.device());
}

at::Tensor all_reduce(const at::Tensor& x_in) {
  check_float(x_in, "all_reduce");
  const at::Tensor x = x_in.contiguous();
  at::Tensor out = at::empty_like(x);
  group().all_reduce(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.numel());
  return out;
}

at::Tensor all_gather(const at::Tensor& x_in, at::IntArrayRef widths) {
  Communicator& comm = group();
  check_float(x_in, "all_gather");
  TORCH_CHECK(x_in.dim() == 2, "all_gather: expected [T, N], got ", x_in.dim(), " dimensions");
  int64_t total = 0;
  for (const int64_t w : widths) {
    TORCH_CHECK(w >= 0, "all_gather: a width is ", w);
    total += w;
  }
  TORCH_CHECK(static_cast<int>(widths.size()) == comm.size() && widths[comm.rank()] == x_in.size(1),
              "all_gather: widths ", widths, " do not agree with ", x_in.size(1), " columns on rank ",
              comm.rank(), " of ", comm.size());
  const at::Tensor x = x_in.contiguous();
  at::Tensor out = at::empty({x.size(0), total}, x.options());
  comm.all_gather(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.size(0),
                  widths.data());
  return out;
}

at::Tensor broadcast(const at::Tensor& x, int64_t root) {
  Communicator& comm = group();
  TORCH_CHECK(x.is_cpu() && x.layout() == at::kStrided, "broadcast: expected a dense tensor on the CPU");
  TORCH_CHECK(root >= 0 && root < comm.size(), "broadcast: rank ", root, " is not in a group of ",
              comm.size());
  at::Tensor out = x.clone(at::MemoryFormat::Contiguous);
  comm.broadcast(out.mutable_data_ptr(), static_cast<int64_t>(out.nbytes()), static_cast<int>(root));
  return out;
}

void join(const std::string& name, int64_t rank, int64_t size, double timeout_s) {
  join_group(name, static_cast<int>(rank), static_cast<int>(size), timeout_s);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def("all_reduce(Tensor x) -> Tensor");
  m.def("all_gather(Tensor x, int[] widths) -> Tensor");
  m.def("broadcast(Tensor x, int root) -> Tensor");
  m.def("join_group(str name, int rank, int size, float timeout_s) -> ()", join);
}

TORCH_LIBRARY_IMPL(precast, CPU, m) {
  m.impl("all_reduce", all_reduce);
  m.impl("all_gather", all_gather);
  m.impl("broadcast", broadcast);
}

}  // namespace precast

PRECAST_SHIM aoti_torch_cpu_all_reduce(AtenTensorHandle x, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::all_reduce(precast::tensor(x)));
}

PRECAST_SHIM aoti_torch_cpu_all_gather(AtenTensorHandle x, const int64_t* widths,
                                       int64_t widths_len, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::all_gather(
      precast::tensor(x), at::IntArrayRef(widths, static_cast<size_t>(widths_len))));
}

PRECAST_SHIM aoti_torch_cpu_broadcast(AtenTensorHandle x, int64_t root, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::broadcast(precast::tensor(x), root));
}
