// Schema and CPU implementation of paged attention; its fake is in precast/ops/native.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"
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

// A part of one sequence's attention: `tokens` of its new tokens from row `token`, one KV head, cached
// tokens [begin, end). Parts of the same rows follow each other and are merged: `index` of `count`.
struct Item {
  int64_t sequence, token, position;
  int tokens, kv_head;
  int64_t begin, end;
  int index, count;
  int64_t floats;  // where its result lies in the partial results, if count > 1
};

// Query rows of a tile: enough that keys and values are read once for several, few enough for the cache.
constexpr int kQueryRows = 48;
static_assert(kQueryRows <= kMaxTileRows && kMaxQueryGroup <= kMaxTileRows);
// Cached tokens that are worth a part of their own.
constexpr int64_t kSplitTokens = 256;
constexpr int64_t kItemsPerThread = 4;

int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }

// Calls use(sequence, first token, tokens, its position, begin and end of what they see in the cache)
// for every tile of tokens of one sequence.
template <typename F>
void for_tiles(const AttentionArgs& args, const int32_t* starts, const int32_t* lengths,
               int64_t sequences, F&& use) {
  const int tile = std::max(1, kQueryRows / args.largest_group);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t past = lengths[s] - (starts[s + 1] - starts[s]);
    for (int64_t t = starts[s]; t < starts[s + 1]; t += tile) {
      const int count = static_cast<int>(std::min<int64_t>(tile, starts[s + 1] - t));
      const int64_t position = past + (t - starts[s]);
      const int64_t end = std::max<int64_t>(0, position + count);
      const int64_t seen = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
      use(s, t, count, position, round_down(seen, args.block_size), end);
    }
  }
}

// Contexts that are long beside the others' are split, so that each thread has a few items to work on.
std::vector<Item> attention_items(const AttentionArgs& args, const int32_t* starts,
                                  const int32_t* lengths, int64_t sequences, int threads) {
  int64_t total = 0, tiles = 0;
  for_tiles(args, starts, lengths, sequences,
            [&](int64_t, int64_t, int, int64_t, int64_t begin, int64_t end) {
              total += (end - begin) * args.kv_heads;
              ++tiles;
            });
  std::vector<Item> items;
  items.reserve(tiles * args.kv_heads + kItemsPerThread * threads);
  int64_t floats = 0;
  for_tiles(args, starts, lengths, sequences, [&](int64_t s, int64_t t, int count, int64_t position,
                                                  int64_t begin, int64_t end) {
    const int64_t context = end - begin;
    const int64_t wanted =
        threads == 1 ? 1 : kItemsPerThread * threads * context / std::max<int64_t>(1, total);
    const int64_t splits = std::max<int64_t>(1, std::min(wanted, context / kSplitTokens));
    const int64_t step =
        std::max<int64_t>(1, ceil_div(ceil_div(context, splits), args.block_size)) * args.block_size;
    const int parts = static_cast<int>(std::max<int64_t>(1, ceil_div(context, step)));
    for (int h = 0; h < args.kv_heads; ++h) {
      for (int part = 0; part < parts; ++part) {
        const int64_t from = begin + part * step;
        items.push_back(
            {s, t, position, count, h, from, std::min(end, from + step), part, parts, floats});
        if (parts > 1) {
          floats += static_cast<int64_t>(count) * args.group(h) * (args.head_dim + 2);
        }
      }
    }
  });
  return items;
}

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

void write_cache(const AttentionArgs& args, const at::Tensor& k, const at::Tensor& v,
                 const int32_t* slots) {
  const auto write = [&](int64_t begin, int64_t end) {
    kernels().store_cache(args, k.const_data_ptr<float>(), k.stride(0), v.const_data_ptr<float>(),
                          v.stride(0), slots, begin, end);
  };
  if (k.size(0) < 16) return write(0, k.size(0));
  ThreadPool::instance().run([&](int part, int parts) {
    const Range tokens = share(k.size(0), part, parts);
    write(tokens.begin, tokens.end);
  });
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& slots, const at::Tensor& query_starts,
                           const at::Tensor& context_lens, const at::Tensor& block_tables,
                           double scale, int64_t window, double softcap, at::IntArrayRef groups) {
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
  const AttentionArgs args =
      attention_args(q, k, k_cache, v_cache, scale, window, softcap, first_query);
  check_paging(context_lens, query_starts, block_tables, slots, tokens, k_cache.size(0),
               args.block_size);
  write_cache(args, k, v, slots.const_data_ptr<int32_t>());

  at::Tensor out = at::empty({tokens, q.size(1), q.size(2)}, q.options());
  float* y = out.mutable_data_ptr<float>();
  const int32_t* starts = query_starts.const_data_ptr<int32_t>();
  // Rows behind the last sequence's only pad.
  std::fill(y + starts[sequences] * out.stride(0), y + out.numel(), 0.0f);
  auto& pool = ThreadPool::instance();
  const std::vector<Item> items = attention_items(
      args, starts, context_lens.const_data_ptr<int32_t>(), sequences, pool.size());
  const int64_t row_floats = args.head_dim + 2;
  thread_local std::vector<float> partials;
  int64_t needed = 0;
  for (const Item& item : items) {
    if (item.count > 1) {
      needed = item.floats + item.tokens * args.group(item.kv_head) * row_floats;
    }
  }
  partials.resize(std::max<size_t>(partials.size(), needed));
  float* shared = partials.data();
  const int32_t* tables = block_tables.const_data_ptr<int32_t>();
  const auto tile_of = [&](const Item& item) {
    const int32_t* table = tables + item.sequence * block_tables.size(1);
    return AttentionTile{table,        item.token, item.tokens, item.position,
                         item.kv_head, item.begin, item.end,    nullptr};
  };
  pool.run([&](int part, int parts) {
    thread_local std::vector<float> local;
    // Dealt out one by one, neighbours to different threads: causal rows cost more the later they come.
    const int each = parts / pool.size();
    for (size_t i = part % each * pool.size() + part / each; i < items.size(); i += parts) {
      const Item& item = items[i];
      AttentionTile tile = tile_of(item), next{};
      if (i + parts < items.size()) {
        next = tile_of(items[i + parts]);
        tile.next = &next;
      }
      const int64_t rows = static_cast<int64_t>(item.tokens) * args.group(item.kv_head);
      const int64_t scratch = attention_scratch_floats(args, item.tokens);
      local.resize(std::max<size_t>(local.size(), rows * row_floats + scratch));
      float* result = item.count > 1 ? shared + item.floats : local.data() + scratch;
      kernels().attend(args, tile, result, result + rows * args.head_dim,
                       result + rows * (args.head_dim + 1), local.data());
      if (item.count == 1) kernels().merge_parts(args, tile, result, 1, y);
    }
  });
  for (const Item& item : items) {
    if (item.count == 1 || item.index > 0) continue;
    kernels().merge_parts(args, tile_of(item), shared + item.floats, item.count, y);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  // groups: query heads of each KV head, which lie side by side; empty: all have as many.
  m.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slots, Tensor query_starts, Tensor context_lens, Tensor block_tables, float scale, "
      "int window, float softcap, int[] groups=[]) -> Tensor");
}

TORCH_LIBRARY_IMPL(precast, CPU, m) { m.impl("paged_attention", paged_attention); }

}  // namespace precast

using precast::tensor;

PRECAST_SHIM aoti_torch_cpu_paged_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache,
    AtenTensorHandle v_cache, AtenTensorHandle slots, AtenTensorHandle query_starts,
    AtenTensorHandle context_lens, AtenTensorHandle block_tables, double scale, int64_t window,
    double softcap, const int64_t* groups, int64_t groups_len, AtenTensorHandle* ret) {
  PRECAST_RETURN(precast::paged_attention(
      tensor(q), tensor(k), tensor(v), tensor(k_cache), tensor(v_cache), tensor(slots),
      tensor(query_starts), tensor(context_lens), tensor(block_tables), scale, window, softcap,
      at::IntArrayRef(groups, static_cast<size_t>(groups_len))));
}
