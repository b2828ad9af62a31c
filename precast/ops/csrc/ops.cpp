// Schemas and CPU implementations of torch.ops.precast.*; fakes are in precast/ops/native.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "mixed.h"
#include "pool.h"
#include "prefetch.h"
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

// Rows from which weights are dealt out in whole tiles of panels.
constexpr int64_t kTileRowsFrom = 4;

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

Format format_of(int64_t format) {
  TORCH_CHECK(format >= 0 && format < kFormats, "linear: no weight format ", format);
  return static_cast<Format>(format);
}

using WriteInputs = void (*)(const LinearArgs& args, int64_t begin, int64_t end);

// Units are dealt out by group and not by row: a group's scales are a cache line, and threads that write the same one
// pass it to and fro. Where the cores were far apart, a step of 16 tokens took 1.36 times as long.
void write_inputs(const LinearArgs& args, WriteInputs write) {
  const int64_t units = input_units(args);
  if (args.m < 4) return write(args, 0, units);
  ThreadPool::instance().run([&](int part, int count) {
    const Range mine = share(units, part, count);
    write(args, mine.begin, mine.end);
  });
}

// At least so many. Never fewer: what grows again would be cleared again, at every linear of a layer.
template <typename T>
T* at_least(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// They live as long as quantised ones.
void split_inputs(LinearArgs& args) {
  thread_local std::vector<HalfInputs> rounded, left;
  const int64_t entries = args.m * args.groups + kRowBlock;
  args.halves = {at_least(rounded, entries), at_least(left, entries)};
  write_inputs(args, kernels().split_inputs);
}

// Quantised inputs live as long as the thread that calls operators, and grow to the largest it has seen.
// `wide`: in 16 bits as well. `parts`: of a weight, each with starts of its own; 0: a weight of args.format alone.
void quantize_inputs(LinearArgs& args, bool wide, int64_t parts = 0) {
  thread_local std::vector<int8_t> values;
  thread_local std::vector<int16_t> wide_values;
  thread_local std::vector<float> scales, sums;
  thread_local std::vector<int32_t> starts, halves;
  // And some behind the last row, for tiles that read more rows than there are.
  const int64_t entries = args.m * args.groups + kRowBlock;
  const bool by_halves = parts > 0 || has_halves(args.format);
  const int64_t starts_of_entry = by_halves ? 2 * std::max<int64_t>(parts, 1) : 1;
  args.inputs = {at_least(values, entries * kGroup),
                 wide ? at_least(wide_values, entries * kGroup) : nullptr,
                 at_least(scales, entries),
                 at_least(starts, entries * starts_of_entry),
                 at_least(sums, entries),
                 by_halves ? at_least(halves, 2 * entries) : nullptr,
                 entries};
  write_inputs(args, kernels().quantize_inputs);
  if (by_halves && parts == 0) kernels().find_starts(args.format, args.inputs);
}

void multiply(const LinearArgs& args, int64_t panels) {
  const int64_t unit = args.m >= kTileRowsFrom ? kernels().tile_panels : 1;
  ThreadPool::instance().run([&](int part, int parts) {
    const Range units = share(ceil_div(panels, unit), part, parts);
    kernels().linear(args, units.begin * unit, std::min(units.end * unit, panels));
  });
}

MixedWeight mixed_of(const at::Tensor& weight, int64_t k, const char* what) {
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kByte, what,
              ": weight must be packed as uint8");
  MixedWeight found;
  const std::string wrong = read_mixed(weight.const_data_ptr<uint8_t>(), weight.numel(), found);
  TORCH_CHECK(wrong.empty(), what, ": weight must be packed as parts: ", wrong);
  TORCH_CHECK(found.k == k, what, ": weight is packed as parts of ", found.k, " columns, not ", k);
  return found;
}

// All parts in one go: their units lie one behind the other.
void multiply_mixed(LinearArgs args, const MixedWeight& weight) {
  args.groups = mixed_groups(weight);
  bool quantized = false, wide = false, halves = false;
  for (int64_t i = 0; i < weight.count; ++i) {
    quantized |= is_quantized(weight.parts[i].format);
    wide |= kernels().takes_wide(weight.parts[i].format, args.m);
    halves |= kernels().takes_halves(weight.parts[i].format);
  }
  if (halves) split_inputs(args);
  if (quantized) quantize_inputs(args, wide, weight.count);
  const int64_t unit = args.m >= kTileRowsFrom ? kernels().tile_panels : 1;
  LinearArgs parts[kMaxParts];
  int64_t units[kMaxParts + 1] = {}, row = 0;
  for (int64_t i = 0; i < weight.count; ++i) {
    const MixedPart& own = weight.parts[i];
    parts[i] = args;
    parts[i].format = own.format;
    parts[i].n = own.rows;
    parts[i].weight = args.weight + own.at;
    parts[i].y = args.y + row;
    if (args.bias != nullptr) parts[i].bias = args.bias + row;
    if (is_quantized(own.format)) {
      parts[i].inputs.starts += 2 * i * args.inputs.entries;
      kernels().find_starts(own.format, parts[i].inputs);
    }
    units[i + 1] = units[i] + ceil_div(panels_of(own.rows), unit);
    row += own.rows;
  }
  ThreadPool::instance().run([&](int part, int count) {
    const Range mine = share(units[weight.count], part, count);
    for (int64_t i = 0; i < weight.count; ++i) {
      const int64_t begin = std::max(mine.begin, units[i]) - units[i], end = std::min(mine.end, units[i + 1]) - units[i];
      const int64_t panels = panels_of(parts[i].n);
      if (begin < end) kernels().linear(parts[i], begin * unit, std::min(end * unit, panels));
    }
  });
}

}  // namespace

at::Tensor linear(const at::Tensor& x_in, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, int64_t n, int64_t format) {
  const at::Tensor x = rows_of(x_in, "linear: x");
  LinearArgs args{};
  args.format = format_of(format);
  args.m = x.size(0);
  args.n = n;
  args.k = x.size(1);
  at::Tensor y = at::empty({args.m, n}, x.options());
  args.x = x.const_data_ptr<float>();
  args.x_stride = x.stride(0);
  args.bias = bias_of(bias, n);
  args.y = y.mutable_data_ptr<float>();
  args.y_stride = n;
  if (args.format == Format::kMixed) {
    const MixedWeight mixed = mixed_of(weight, args.k, "linear");
    TORCH_CHECK(mixed.rows == n, "linear: weight is packed as parts of ", mixed.rows, " rows, not ", n);
    args.weight = weight.const_data_ptr<uint8_t>();
    ThreadPool::instance().will_read({args.weight, static_cast<int64_t>(weight.nbytes())});
    multiply_mixed(args, mixed);
    return y;
  }
  args.groups = input_groups(args.format, args.k);
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kByte && weight.dim() == 2 &&
                  weight.size(0) == panels_of(n) &&
                  weight.size(1) == panel_bytes(args.format, args.k),
              "linear: weight must be packed as uint8 [", panels_of(n), ", ",
              panel_bytes(args.format, args.k), "]");
  args.weight = weight.const_data_ptr<uint8_t>();
  if (is_quantized(args.format)) quantize_inputs(args, kernels().takes_wide(args.format, args.m));
  if (kernels().takes_halves(args.format)) split_inputs(args);
  ThreadPool::instance().will_read({args.weight, static_cast<int64_t>(weight.nbytes())});
  multiply(args, weight.size(0));
  return y;
}

namespace {

// A packed weight as its parts: itself, if it is not mixed.
MixedWeight parts_of(const at::Tensor& weight, int64_t k, Format f) {
  if (f == Format::kMixed) return mixed_of(weight, k, "embedding");
  TORCH_CHECK(k > 0 && weight.is_contiguous() && weight.scalar_type() == at::kByte &&
                  weight.dim() == 2 && weight.size(1) == panel_bytes(f, k),
              "embedding: weight must be packed as uint8 [panels, ", panel_bytes(f, k), "]");
  return {k, 1, weight.size(0) * kPanel, {{f, weight.size(0) * kPanel, 0}}};
}

void unpack_row(const uint8_t* weight, const MixedWeight& mixed, int64_t row, float* to) {
  const MixedPart* part = mixed.parts;
  for (; row >= part->rows; ++part) row -= part->rows;
  kernels().unpack_row(part->format, weight + part->at, mixed.k, row, to);
}

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& weight, int64_t k, int64_t format) {
  TORCH_CHECK(ids.dim() == 1 && ids.is_contiguous() && ids.scalar_type() == at::kLong,
              "embedding: ids must be a contiguous 1-D int64 tensor");
  const MixedWeight mixed = parts_of(weight, k, format_of(format));
  const int64_t* rows = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.size(0); ++i) {
    TORCH_CHECK(rows[i] >= 0 && rows[i] < mixed.rows, "embedding: no row ", rows[i]);
  }
  at::Tensor y = at::empty({ids.size(0), k}, ids.options().dtype(at::kFloat));
  float* out = y.mutable_data_ptr<float>();
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      unpack_row(weight.const_data_ptr<uint8_t>(), mixed, rows[i], out + i * k);
    }
  };
  if (ids.size(0) < 8) {
    copy(0, ids.size(0));
    return y;
  }
  ThreadPool::instance().run([&](int part, int parts) {
    const Range r = share(ids.size(0), part, parts);
    copy(r.begin, r.end);
  });
  return y;
}

void start_threads(at::IntArrayRef cores) { ThreadPool::instance().start(cores.vec()); }

std::string native_isa() { return kernels().isa; }

// Sum of a tensor's 64-bit words, read by all threads: what the memory gives to them.
int64_t read_memory(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kLong, "read_memory: expected int64");
  const int64_t* words = x.const_data_ptr<int64_t>();
  std::atomic<int64_t> total{0};
  ThreadPool::instance().run([&](int part, int parts) {
    const Range r = share(x.numel() / 8, part, parts);
    int64_t sums[8] = {};
    for (int64_t i = r.begin; i < r.end; ++i) {
      // as linears of one row do, which would be faster than what the memory is said to give
      __builtin_prefetch(reinterpret_cast<const char*>(words + i * 8) + kPageBytes, 0, 2);
      for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i * 8 + lane];
    }
    for (const int64_t sum : sums) total += sum;
  });
  return total;
}

}  // namespace

TORCH_LIBRARY(precast, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int out_features, int format) -> Tensor");
  m.def("embedding(Tensor ids, Tensor weight, int features, int format) -> Tensor");
  m.def("unpack(Tensor ids, Tensor weight, int features, int format) -> Tensor");
  m.def("panel_bytes(int format, int in_features) -> int", [](int64_t format, int64_t k) {
    TORCH_CHECK(format_of(format) != Format::kMixed, "panel_bytes: parts have formats of their own");
    return panel_bytes(format_of(format), k);
  });
  m.def("start_threads(int[] cores) -> ()", start_threads);
  m.def("native_isa() -> str", native_isa);
  m.def("read_memory(Tensor x) -> int");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) {
  m.impl("linear", linear);
  m.impl("embedding", embedding);
  m.impl("unpack", embedding);  // whoever provides the other one
  m.impl("read_memory", read_memory);
}

}  // namespace precast

using precast::optional_tensor;
using precast::tensor;

PRECAST_SHIM aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight,
                                   AtenTensorHandle* bias, int64_t out_features, int64_t format,
                                   AtenTensorHandle* ret) {
  PRECAST_RETURN(
      precast::linear(tensor(x), tensor(weight), optional_tensor(bias), out_features, format));
}

PRECAST_SHIM aoti_torch_cpu_embedding(AtenTensorHandle ids, AtenTensorHandle weight,
                                      int64_t features, int64_t format, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::embedding(tensor(ids), tensor(weight), features, format));
}
