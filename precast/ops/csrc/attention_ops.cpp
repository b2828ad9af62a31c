// Schema and CPU implementation of paged attention; its fake is in precast/ops/native.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "attention_plan.h"
#include "kernels.h"
#include "pool.h"
#include "prefetch.h"
#include "shims.h"

namespace precast {
namespace {

void check_ints(const at::Tensor& t, int64_t dim, const char* what) {
  TORCH_CHECK(t.is_contiguous() && t.scalar_type() == at::kInt && t.dim() == dim,
              "paged_attention: ", what, " must be a contiguous int32 tensor of ", dim, " dimensions");
}

void check_heads(const at::Tensor& t, const char* what) {
  TORCH_CHECK(t.dim() == 3 && t.scalar_type() == at::kFloat && t.stride(2) == 1 &&
                  t.stride(1) == t.size(2),
              "paged_attention: ", what, " must be float32 [T, heads, head_dim], packed within a token");
}

CacheType cache_type(const at::Tensor& cache) {
  switch (cache.scalar_type()) {
    case at::kFloat: return CacheType::kFloat32;
    case at::kBFloat16: return CacheType::kBFloat16;
    case at::kChar: return CacheType::kInt8;
    default: TORCH_CHECK(false, "paged_attention: caches must be float32, bfloat16 or int8");
  }
}

// Floats that begin on a cache line; they are not kept when more are asked for.
class Buffer {
 public:
  float* get(int64_t floats) {
    if (floats + kLine > static_cast<int64_t>(memory_.size())) memory_.resize(floats + kLine);
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kLineBytes - at % kLineBytes) % kLineBytes / sizeof(float);
  }

 private:
  static constexpr int64_t kLine = kLineBytes / sizeof(float);
  std::vector<float> memory_;
};

void check_paging(const at::Tensor& context_lens, const at::Tensor& query_starts,
                  const at::Tensor& block_tables, const at::Tensor& slots, int64_t tokens,
                  int64_t blocks, int64_t block_size) {
  const int64_t sequences = context_lens.size(0), width = block_tables.size(1);
  const int32_t* starts = query_starts.const_data_ptr<int32_t>();
  const int32_t* lengths = context_lens.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < sequences; ++s) {
    TORCH_CHECK(lengths[s] >= 0 && lengths[s] <= width * block_size && starts[s] <= starts[s + 1],
                "paged_attention: context of ", lengths[s], " does not fit the block table");
    const int32_t* table = block_tables.const_data_ptr<int32_t>() + s * width;
    for (int64_t b = 0; b * block_size < lengths[s]; ++b) {
      TORCH_CHECK(table[b] >= 0 && table[b] < blocks, "paged_attention: block ", table[b],
                  " is outside of the cache");
    }
  }
  TORCH_CHECK(starts[0] == 0 && starts[sequences] <= tokens, "paged_attention: query_starts");
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK(slots.const_data_ptr<int32_t>()[t] < blocks * block_size, "paged_attention: slot ",
                slots.const_data_ptr<int32_t>()[t], " is outside of the cache");
  }
}

// First query head of each KV head, and the number of query heads. `groups`: query heads of each KV head;
// empty: all have as many.
std::vector<int64_t> first_queries(at::IntArrayRef groups, int64_t q_heads, int64_t kv_heads) {
  TORCH_CHECK(kv_heads > 0, "paged_attention: no KV heads");
  TORCH_CHECK(groups.empty() ? q_heads % kv_heads == 0
                             : static_cast<int64_t>(groups.size()) == kv_heads,
              "paged_attention: ", q_heads, " query heads don't fit ", kv_heads, " KV heads");
  std::vector<int64_t> first{0};
  for (int64_t h = 0; h < kv_heads; ++h) {
    const int64_t group = groups.empty() ? q_heads / kv_heads : groups[h];
    TORCH_CHECK(group > 0 && group <= kMaxQueryGroup, "paged_attention: ", group,
                " query heads for a KV head");
    first.push_back(first.back() + group);
  }
  TORCH_CHECK(first.back() == q_heads, "paged_attention: groups ", groups, " of ", q_heads,
              " query heads");
  return first;
}

AttentionArgs attention_args(const at::Tensor& q, const at::Tensor& k, const at::Tensor& k_cache,
                             const at::Tensor& v_cache, double scale, int64_t window,
                             double softcap, const std::vector<int64_t>& first_query) {
  AttentionArgs args{};
  args.type = cache_type(k_cache);
  const int64_t extra = args.type == CacheType::kInt8 ? kScaleBytes : 0;
  const int64_t kv_heads = k.size(1), dim = q.size(2);
  TORCH_CHECK(k_cache.is_contiguous() && k_cache.dim() == 4 && k_cache.size(1) == kv_heads &&
                  k_cache.size(2) == dim + extra && k_cache.size(3) % kPanel == 0 &&
                  v_cache.is_contiguous() && v_cache.scalar_type() == k_cache.scalar_type() &&
                  v_cache.dim() == 4 && v_cache.size(0) == k_cache.size(0) &&
                  v_cache.size(1) == kv_heads && v_cache.size(2) == k_cache.size(3) &&
                  v_cache.size(3) == dim + extra,
              "paged_attention: caches must be k [blocks, kv_heads, head_dim, block_size] and v "
              "[blocks, kv_heads, block_size, head_dim], block_size a multiple of 16");
  TORCH_CHECK(window >= 0 && softcap >= 0, "paged_attention: window and softcap can't be negative");
  args.q = q.const_data_ptr<float>();
  args.q_stride = q.stride(0);
  args.k_cache = k_cache.const_data_ptr();
  args.v_cache = v_cache.const_data_ptr();
  args.q_heads = static_cast<int>(q.size(1));
  args.kv_heads = static_cast<int>(kv_heads);
  args.first_query = first_query.data();
  for (int h = 0; h < args.kv_heads; ++h) {
    args.largest_group = std::max(args.largest_group, args.group(h));
  }
  args.head_dim = static_cast<int>(dim);
  args.block_size = static_cast<int>(k_cache.size(3));
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.window = window;
  return args;
}

// Sinks as the kernels have scores: in powers of two.
std::vector<float> sinks_of(const std::optional<at::Tensor>& sinks, const AttentionArgs& args) {
  if (!sinks) return {};
  TORCH_CHECK(sinks->scalar_type() == at::kFloat && sinks->is_contiguous() &&
                  sinks->numel() == args.q_heads,
              "paged_attention: sinks must be a contiguous float32 for each query head");
  std::vector<float> scaled;
  const float* values = sinks->const_data_ptr<float>();
  for (int h = 0; h < args.q_heads; ++h) scaled.push_back(values[h] * 1.4426950408889634f);
  return scaled;
}

void write_cache(const AttentionArgs& args, const at::Tensor& k, const at::Tensor& v,
                 const int32_t* slots) {
  const auto write = [&](int64_t begin, int64_t end) {
    attention_kernels(args.type).store_cache(args, k.const_data_ptr<float>(), k.stride(0),
                                             v.const_data_ptr<float>(), v.stride(0), slots, begin, end);
  };
  if (k.size(0) < 16) return write(0, k.size(0));
  ThreadPool::instance().run([&](int part, int parts) {
    const Range tokens = share(k.size(0), part, parts);
    write(tokens.begin, tokens.end);
  });
}

// What threads share while they attend.
struct Job {
  const Step& step;
  const int32_t* tables;
  int64_t table_width;
  Plan& plan;
  float* states;
  float* y;  // [T, q_heads, head_dim]
};

AttentionTile tile_of(const Job& job, const Item& item) {
  const int32_t* table = job.tables + item.sequence * job.table_width;
  return {table, item.token, item.tokens, item.position, item.kv_head, item.begin, item.end, nullptr};
}

void attend_item(const Job& job, const Item& item, AttentionTile tile, Buffer& buffer) {
  const AttentionArgs& args = job.step.args;
  const AttentionKernels& kernels = attention_kernels(args.type);
  const int rows = item.tokens * args.group(item.kv_head);
  float* scratch = buffer.get(kernels.scratch_floats(args, rows));
  if (item.shared < 0) return kernels.attend(args, tile, nullptr, job.y, scratch);
  Shared& whole = job.plan.shared[item.shared];
  float* states = job.states + whole.states;
  const int64_t before = (item.begin - whole.begin) / kKeyBlock;
  kernels.attend(args, tile, states + before * kernels.state_floats(args, rows), job.y, scratch);
  // Whoever is the last one of a context merges it, and sees what the others wrote.
  if (std::atomic_ref(whole.parts).fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  tile.begin = whole.begin;
  tile.end = whole.end;
  kernels.merge_states(args, tile, states, job.y, scratch);
}

void attend_all(const Step& step, const int32_t* tables, int64_t table_width, float* y) {
  thread_local Plan plan;
  thread_local Buffer states;
  plan_items(step, plan);
  const Job job{step, tables, table_width, plan, states.get(plan.state_floats), y};
  const std::vector<Item>& items = plan.items;
  auto& pool = ThreadPool::instance();
  pool.run([&](int part, int parts) {
    thread_local Buffer buffer;
    // Dealt out one by one, neighbours to different threads: causal rows cost more the later they come.
    const int each = parts / pool.size();
    for (size_t i = part % each * pool.size() + part / each; i < items.size(); i += parts) {
      AttentionTile tile = tile_of(job, items[i]), next{};
      if (i + parts < items.size()) {
        next = tile_of(job, items[i + parts]);
        tile.next = &next;
      }
      attend_item(job, items[i], tile, buffer);
    }
  });
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& slots, const at::Tensor& query_starts,
                           const at::Tensor& context_lens, const at::Tensor& block_tables,
                           double scale, int64_t window, double softcap, at::IntArrayRef groups,
                           const std::optional<at::Tensor>& sinks) {
  check_heads(q, "q");
  check_heads(k, "k");
  check_heads(v, "v");
  check_ints(slots, 1, "slots");
  check_ints(query_starts, 1, "query_starts");
  check_ints(context_lens, 1, "context_lens");
  check_ints(block_tables, 2, "block_tables");
  const int64_t tokens = q.size(0), sequences = context_lens.size(0);
  TORCH_CHECK(k.size(0) == tokens && v.sizes() == k.sizes() && k.size(2) == q.size(2) &&
                  slots.size(0) == tokens && query_starts.size(0) == sequences + 1 &&
                  block_tables.size(0) == sequences,
              "paged_attention: shapes do not agree");
  const std::vector<int64_t> first_query = first_queries(groups, q.size(1), k.size(1));
  AttentionArgs args = attention_args(q, k, k_cache, v_cache, scale, window, softcap, first_query);
  const std::vector<float> scaled_sinks = sinks_of(sinks, args);
  if (sinks) args.sinks = scaled_sinks.data();
  check_paging(context_lens, query_starts, block_tables, slots, tokens, k_cache.size(0),
               args.block_size);
  write_cache(args, k, v, slots.const_data_ptr<int32_t>());

  at::Tensor out = at::empty({tokens, q.size(1), q.size(2)}, q.options());
  float* y = out.mutable_data_ptr<float>();
  const int32_t* starts = query_starts.const_data_ptr<int32_t>();
  // Rows behind the last sequence's only pad.
  std::fill(y + starts[sequences] * out.stride(0), y + out.numel(), 0.0f);
  attend_all({args, starts, context_lens.const_data_ptr<int32_t>(), sequences,
              ThreadPool::instance().size()},
             block_tables.const_data_ptr<int32_t>(), block_tables.size(1), y);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  // groups: query heads of each KV head, which lie side by side; empty: all have as many.
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slots, Tensor query_starts, Tensor context_lens, Tensor block_tables, float scale, "
      "int window, float softcap, int[] groups=[], Tensor? sinks=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) { m.impl("paged_attention", paged_attention); }

}  // namespace precast

using precast::tensor;

PRECAST_SHIM aoti_torch_cpu_paged_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache,
    AtenTensorHandle v_cache, AtenTensorHandle slots, AtenTensorHandle query_starts,
    AtenTensorHandle context_lens, AtenTensorHandle block_tables, double scale, int64_t window,
    double softcap, const int64_t* groups, int64_t groups_len, AtenTensorHandle* sinks,
    AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::paged_attention(
      tensor(q), tensor(k), tensor(v), tensor(k_cache), tensor(v_cache), tensor(slots),
      tensor(query_starts), tensor(context_lens), tensor(block_tables), scale, window, softcap,
      at::IntArrayRef(groups, static_cast<size_t>(groups_len)), precast::optional_tensor(sinks)));
}
