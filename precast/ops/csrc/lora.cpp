// A linear, and what low-rank adapters add to its result: each row by its own adapter, or by none.
//
// Rows of one adapter lie in blocks: its weights are read once for a block. All sums are made in an order
// that depends on sizes of the linear alone, so a row's bits depend on no other row and on no thread; a row
// without an adapter has the linear's bits.
#include "lora.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "shims.h"

namespace precast {
namespace {

// Multiplications from which on threads share them. With less, the others fetch the next weights meanwhile.
constexpr int64_t kParallelWork = 131072;
constexpr int64_t kColumns = 128;  // of a result, that one job writes: whole vectors
constexpr int64_t kMaxChunks = 8, kChunk = 128;
constexpr int64_t kFewRows = 4;  // more read weights from a copy in float32: where 3072 columns lie between
                                 // rows of B, all of these have the same few lines of a cache

// For the instruction set that the other kernels have.
const LoraKernels& choose() {
  const std::string_view isa = kernels().isa;
  if (isa == "scalar") return lora_scalar();
  return isa == "avx512" || isa == "amx" ? lora_avx512() : lora_avx2();
}

const LoraKernels& lora_kernels() {
  static const LoraKernels& chosen = choose();
  return chosen;
}

struct Adapters {
  const uint16_t *a, *b;  // fp16 [count, k, inner], [count, rank, n]
  int64_t count, k, rank, n, inner;
  std::vector<int64_t> ends;  // of each part's columns

  // Inputs are summed up in so many runs, which threads can share.
  int64_t chunks() const { return std::clamp<int64_t>(k / kChunk, 1, kMaxChunks); }
};

// Rows of one adapter: places [begin, end) in the order of rows.
struct Block {
  int64_t adapter, begin, end;
};

struct Job {
  const Adapters& all;
  const float* x;
  float* y;
  std::vector<int32_t> rows;  // that have an adapter, those of one beside each other
  std::vector<Block> blocks;
  int64_t parts;  // of the sums of inputs that are kept: one for each chunk, or one
  float* hidden;  // [parts, rows, inner]

  float* hidden_of(int64_t part, int64_t place) const {
    return hidden + (part * static_cast<int64_t>(rows.size()) + place) * all.inner;
  }
};

// Rows sorted by their slots, in blocks. Slots have been checked.
void find_blocks(const int32_t* slots, int64_t count, Job& job) {
  std::vector<int64_t> starts(job.all.count + 2, 0);
  for (int64_t row = 0; row < count; ++row) ++starts[slots[row] + 1];
  const int64_t none = starts[1];
  starts[1] = 0;
  for (size_t slot = 2; slot < starts.size(); ++slot) starts[slot] += starts[slot - 1];
  job.rows.resize(count - none);
  std::vector<int64_t> next(starts.begin(), starts.end());
  for (int64_t row = 0; row < count; ++row) {
    if (slots[row] != 0) job.rows[next[slots[row]]++] = static_cast<int32_t>(row);
  }
  for (int64_t slot = 1; slot <= job.all.count; ++slot) {
    for (int64_t at = starts[slot]; at < starts[slot + 1]; at += kLoraRows) {
      job.blocks.push_back({slot - 1, at, std::min(at + kLoraRows, starts[slot + 1])});
    }
  }
}

// Sums of a block's inputs in chunks [begin, end), as if there were one thread: the first is written, the
// others are added to it one by one.
void add_inputs(const Job& job, const Block& block, int64_t begin, int64_t end, int64_t part) {
  const Adapters& all = job.all;
  const float* x[kLoraRows];
  float* to[kLoraRows];
  const int64_t rows = block.end - block.begin, chunks = all.chunks();
  for (int64_t i = 0; i < rows; ++i) to[i] = job.hidden_of(part, block.begin + i);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = all.k * chunk / chunks, last = all.k * (chunk + 1) / chunks;
    for (int64_t i = 0; i < rows; ++i) x[i] = job.x + job.rows[block.begin + i] * all.k + first;
    const uint16_t* w = all.a + (block.adapter * all.k + first) * all.inner;
    lora_kernels().multiply(x, rows, last - first, w, all.inner, all.inner, to, chunk > begin);
  }
}

// A row's sums for one part of the linear, in `scratch` where chunks are still to be added up.
const float* hidden_part(const Job& job, int64_t place, int64_t part, float* scratch) {
  const int64_t first = part * job.all.rank, rank = job.all.rank;
  if (job.parts == 1) return job.hidden_of(0, place) + first;
  std::copy_n(job.hidden_of(0, place) + first, rank, scratch);
  for (int64_t chunk = 1; chunk < job.parts; ++chunk) {
    const float* more = job.hidden_of(chunk, place) + first;
    for (int64_t i = 0; i < rank; ++i) scratch[i] += more[i];
  }
  return scratch;
}

// Columns [first, last) of one part of the linear, for a block's rows.
void add_outputs(const Job& job, const Block& block, int64_t part, int64_t first, int64_t last) {
  const Adapters& all = job.all;
  const float* x[kLoraRows];
  float* to[kLoraRows];
  thread_local std::vector<float> scratch, near;
  if (job.parts > 1) scratch.resize(kLoraRows * all.rank);
  const int64_t rows = block.end - block.begin, count = last - first;
  for (int64_t i = 0; i < rows; ++i) {
    x[i] = hidden_part(job, block.begin + i, part, scratch.data() + i * all.rank);
    to[i] = job.y + job.rows[block.begin + i] * all.n + first;
  }
  const uint16_t* w = all.b + block.adapter * all.rank * all.n + first;
  if (rows <= kFewRows) {
    lora_kernels().multiply(x, rows, all.rank, w, all.n, count, to, true);
    return;
  }
  near.resize(all.rank * count);
  for (int64_t i = 0; i < all.rank; ++i) lora_kernels().widen(w + i * all.n, count, near.data() + i * count);
  lora_kernels().multiply_floats(x, rows, all.rank, near.data(), count, count, to, true);
}

// Pieces of the linear's columns, none of which is in two parts.
struct Piece {
  int64_t part, first, last;
};

std::vector<Piece> pieces_of(const Adapters& all) {
  std::vector<Piece> pieces;
  int64_t first = 0;
  for (int64_t part = 0; part < static_cast<int64_t>(all.ends.size()); ++part) {
    for (; first < all.ends[part]; first += kColumns) {
      pieces.push_back({part, first, std::min(first + kColumns, all.ends[part])});
    }
    first = all.ends[part];
  }
  return pieces;
}

// `body(number)` for each of `count` jobs, on all threads or here.
template <typename F>
void for_each(int64_t count, bool parallel, F&& body) {
  auto some = [&](int part, int parts) {
    const Range r = share(count, part, parts);
    for (int64_t number = r.begin; number < r.end; ++number) body(number);
  };
  if (parallel) {
    ThreadPool::instance().run(std::move(some));
  } else {
    some(0, 1);
  }
}

void add_adapters(const Adapters& all, const float* x, const int32_t* slots, int64_t count, float* y) {
  if (std::all_of(slots, slots + count, [](int32_t slot) { return slot == 0; })) return;
  Job job{all, x, y, {}, {}, 1, nullptr};
  find_blocks(slots, count, job);
  const int64_t blocks = job.blocks.size(), threads = ThreadPool::instance().size();
  const int64_t work = static_cast<int64_t>(job.rows.size()) * (all.k * all.inner + all.n * all.rank);
  const bool parallel = threads > 1 && work >= kParallelWork;
  if (parallel && blocks < 2 * threads) job.parts = all.chunks();
  thread_local std::vector<float> hidden;
  hidden.resize(std::max<size_t>(hidden.size(), job.parts * job.rows.size() * all.inner));
  job.hidden = hidden.data();
  for_each(blocks * job.parts, parallel, [&](int64_t number) {
    const int64_t part = number % job.parts, end = job.parts == 1 ? all.chunks() : part + 1;
    add_inputs(job, job.blocks[number / job.parts], part, end, part);
  });
  const std::vector<Piece> pieces = pieces_of(all);
  const int64_t each = pieces.size();
  for_each(blocks * each, parallel, [&](int64_t number) {
    const Piece& piece = pieces[number % each];
    add_outputs(job, job.blocks[number / each], piece.part, piece.first, piece.last);
  });
}

void check(const at::Tensor& x, at::ScalarType type, int64_t dim, const char* what) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.dim() == dim && x.is_contiguous(),
              "adapted_linear: ", what, " must be contiguous ", type == at::kHalf ? "float16" : "float32",
              " of ", dim, " dimensions on the CPU");
}

const uint16_t* bits_of(const at::Tensor& halves) {
  return reinterpret_cast<const uint16_t*>(halves.const_data_ptr<at::Half>());
}

Adapters adapters_of(const at::Tensor& a, const at::Tensor& b, at::IntArrayRef widths) {
  check(a, at::kHalf, 3, "a");
  check(b, at::kHalf, 3, "b");
  Adapters all{bits_of(a), bits_of(b), a.size(0), a.size(1), b.size(1), b.size(2), a.size(2), {}};
  int64_t end = 0;
  for (const int64_t width : widths) all.ends.push_back(end += width);
  TORCH_CHECK(b.size(0) == all.count && end == all.n &&
                  all.inner == all.rank * static_cast<int64_t>(widths.size()),
              "adapted_linear: a [adapters, K, parts * rank], b [adapters, rank, N] and widths, which "
              "sum to N, don't go together");
  return all;
}

const int32_t* slots_of(const at::Tensor& slots, int64_t rows, const Adapters& all) {
  TORCH_CHECK(slots.is_cpu() && slots.scalar_type() == at::kInt && slots.is_contiguous() &&
                  slots.dim() == 1 && slots.size(0) >= rows,
              "adapted_linear: slots must be int32, one for each row");
  const int32_t* each = slots.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK(each[row] >= 0 && each[row] <= all.count, "adapted_linear: there is no adapter ",
                each[row]);
  }
  return each;
}

// Adds to y, which nobody else has yet.
at::Tensor adapted(at::Tensor y, const at::Tensor& x_in, const at::Tensor& slots, const at::Tensor& a,
                   const at::Tensor& b, at::IntArrayRef widths) {
  const at::Tensor x = x_in.contiguous();
  check(x, at::kFloat, 2, "x");
  check(y, at::kFloat, 2, "y");
  const Adapters all = adapters_of(a, b, widths);
  TORCH_CHECK(x.size(1) == all.k && y.size(0) == x.size(0) && y.size(1) == all.n,
              "adapted_linear: x, the result and the adapters differ in their sizes");
  const int32_t* each = slots_of(slots, x.size(0), all);
  add_adapters(all, x.const_data_ptr<float>(), each, x.size(0), y.mutable_data_ptr<float>());
  return y;
}

// Whoever serves linears (precast/ops/providers).
at::Tensor adapted_linear(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const at::Tensor& slots,
                          const at::Tensor& a, const at::Tensor& b, at::IntArrayRef widths,
                          int64_t format) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            int64_t, int64_t);
  static const auto linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("precast::linear", "").typed<Linear>();
  int64_t n = 0;
  for (const int64_t width : widths) n += width;
  return adapted(linear.call(x, weight, bias, n, format).contiguous(), x, slots, a, b, widths);
}

TORCH_LIBRARY_FRAGMENT(precast, m) {
  // x [T, K]; slots int32 [T or more]: each row's adapter, counted from 1 on, or 0 for none. The columns
  // of the result are in parts of these widths, each of which has `rank` columns of an adapter's
  // a, float16 [K, parts * rank]; b is float16 [rank, N].
  m.def("adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor slots, Tensor a, Tensor b, "
        "int[] widths, int format) -> Tensor");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) { m.impl("adapted_linear", adapted_linear); }

}  // namespace
}  // namespace precast

// For graphs whose linears are native ones.
PRECAST_SHIM aoti_torch_cpu_adapted_linear(AtenTensorHandle x, AtenTensorHandle weight,
                                           AtenTensorHandle* bias, AtenTensorHandle slots,
                                           AtenTensorHandle a, AtenTensorHandle b,
                                           const int64_t* widths, int64_t widths_len, int64_t format,
                                           AtenTensorHandle* ret) {
  using precast::tensor;
  const auto compute = [&] {
    const at::IntArrayRef parts(widths, widths_len);
    int64_t n = 0;
    for (const int64_t width : parts) n += width;
    at::Tensor y =
        precast::linear(tensor(x), tensor(weight), precast::optional_tensor(bias), n, format);
    return precast::adapted(y, tensor(x), tensor(slots), tensor(a), tensor(b), parts);
  };
  PRECAST_RETURN(compute());
}
