// How the attention of a step is dealt out to threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_kernels.h"
#include "kernels.h"

namespace precast {

// A part of one sequence's attention: `tokens` of its new tokens from row `token`, one KV head, cached
// tokens [begin, end). Where a context is dealt out in parts, `shared` is what they have in common.
struct Item {
  int64_t sequence, token, position;
  int tokens, kv_head;
  int64_t begin, end;
  int64_t shared;  // index of a Shared, or -1
};

// A context in parts: where the states of its blocks are, and how many parts are not done yet.
struct Shared {
  int64_t begin, end, states;
  int parts;
};

struct Plan {
  std::vector<Item> items;
  std::vector<Shared> shared;
  int64_t state_floats = 0;
};

// Rows of a tile (a token with a query head each). Converting a block of keys costs as much as
// computing two rows; with fewer rows there are more items to deal out.
constexpr int kMostRows = kMaxTileRows, kFewestRows = 24;
constexpr int64_t kItemsPerThread = 4;

inline int64_t round_down(int64_t n, int64_t unit) { return n / unit * unit; }

// What a step is dealt out by.
struct Step {
  const AttentionArgs& args;
  const int32_t *starts, *lengths;
  int64_t sequences;
  int threads;
};

// Calls use(sequence, first token, tokens, its position, begin and end of what they see in the cache)
// for every tile of tokens of one sequence.
template <typename F>
void for_tiles(const Step& step, int tile, F&& use) {
  const int64_t window = step.args.window;
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t past = step.lengths[s] - (step.starts[s + 1] - step.starts[s]);
    for (int64_t t = step.starts[s]; t < step.starts[s + 1]; t += tile) {
      const int count = static_cast<int>(std::min<int64_t>(tile, step.starts[s + 1] - t));
      const int64_t position = past + (t - step.starts[s]);
      const int64_t end = std::max<int64_t>(0, position + count);
      const int64_t seen = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
      use(s, t, count, position, round_down(std::min(seen, end), kKeyBlock), end);
    }
  }
}

// Tokens of a tile, such that each thread has a few tiles to work on, if that can be.
inline int tokens_of_a_tile(const Step& step) {
  int rows = kMostRows;
  const auto items = [&] {
    const int64_t tile = std::max(1, rows / step.args.largest_group);
    int64_t count = 0;
    for (int64_t s = 0; s < step.sequences; ++s) {
      count += ceil_div(step.starts[s + 1] - step.starts[s], tile);
    }
    return count * step.args.kv_heads;
  };
  while (rows / 2 >= kFewestRows && items() < kItemsPerThread * step.threads) rows /= 2;
  return std::max(1, rows / step.args.largest_group);
}

// Contexts that are long beside the others' are split, so that each thread has a few items to work on.
// Where they are split changes no bits: blocks are folded in order, whoever computed them.
inline void plan_items(const Step& step, Plan& plan) {
  const AttentionArgs& args = step.args;
  const int tile = tokens_of_a_tile(step);
  plan.items.clear();
  plan.shared.clear();
  plan.state_floats = 0;
  int64_t total = 0;
  for_tiles(step, tile, [&](int64_t, int64_t, int, int64_t, int64_t begin, int64_t end) {
    total += (end - begin) * args.kv_heads;
  });
  for_tiles(step, tile, [&](int64_t s, int64_t t, int count, int64_t position, int64_t begin,
                            int64_t end) {
    const int64_t blocks = ceil_div(end - begin, kKeyBlock);
    const int64_t items = step.threads == 1 ? 0 : kItemsPerThread * step.threads;
    const int64_t wanted = items * (end - begin) / std::max<int64_t>(1, total);
    const int64_t each = std::max<int64_t>(1, ceil_div(blocks, std::max<int64_t>(1, wanted)));
    const int64_t parts = std::max<int64_t>(1, ceil_div(blocks, each));
    for (int h = 0; h < args.kv_heads; ++h) {
      if (parts == 1) {
        plan.items.push_back({s, t, position, count, h, begin, end, -1});
        continue;
      }
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = begin + part * each * kKeyBlock;
        plan.items.push_back({s, t, position, count, h, from, std::min(end, from + each * kKeyBlock),
                              static_cast<int64_t>(plan.shared.size())});
      }
      plan.shared.push_back({begin, end, plan.state_floats, static_cast<int>(parts)});
      plan.state_floats += blocks * attention_kernels(args.type).state_floats(args, count * args.group(h));
    }
  });
}

}  // namespace precast
