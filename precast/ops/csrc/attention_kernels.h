// Attention's kernels, compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace precast {

enum class CacheType : int64_t { kFloat32, kBFloat16, kInt8 };

// Bytes behind each int8 key and value that hold their scale, a float32.
constexpr int kScaleBytes = 4;

struct AttentionArgs {
  CacheType type;
  const float* q;       // [T, q_heads, head_dim], row stride q_stride
  int64_t q_stride;
  const void* k_cache;  // [blocks, kv_heads, head_dim, block_size]; int8: head_dim + 4 rows, the last
                        // four hold the scales, float32 [block_size]
  const void* v_cache;  // [blocks, kv_heads, block_size, head_dim]; int8: head_dim + 4 columns
  int q_heads, kv_heads, head_dim, block_size;
  const int64_t* first_query;  // [kv_heads + 1] first query head of each KV head, and q_heads
  int largest_group;
  float scale;
  float softcap;   // scores become softcap * tanh(score / softcap); 0: none
  int64_t window;  // a token attends to this many, itself included; 0: all
  const float* sinks;  // [q_heads] scores that only add to a softmax' sum, in powers of two; null: none

  // Query heads of a KV head.
  int group(int kv_head) const {
    return static_cast<int>(first_query[kv_head + 1] - first_query[kv_head]);
  }
};

// Query heads to a KV head, at the most.
constexpr int kMaxQueryGroup = 64;
// Rows of a tile, at the most.
constexpr int kMaxTileRows = 192;
// Keys of a block, which begins at a multiple of this: what rows are folded by, whoever computes them.
constexpr int kKeyBlock = 64;

// What one call of attend works on: neighbouring tokens of a sequence, one KV head, and a part of
// their context.
struct AttentionTile {
  const int32_t* block_table;
  int64_t first_token;  // row in q
  int tokens;
  int64_t first_position;  // of first_token in its sequence
  int kv_head;
  int64_t begin, end;  // cached tokens [begin, end); begin is a multiple of kKeyBlock
  const AttentionTile* next;  // what this thread attends to after it, or null
};

struct AttentionKernels {
  // Attention of a tile, into `out` [T, q_heads, head_dim]. `states`, if not null: nothing is written
  // there, and what its rows know of each block of keys goes to `states`, state_floats(args, rows) a
  // block. `scratch`: scratch_floats(args, rows). Both begin on cache lines. A row is a token with a
  // query head.
  void (*attend)(const AttentionArgs& args, const AttentionTile& tile, float* states, float* out,
                 float* scratch);

  // The same output from the states of all blocks of [tile.begin, tile.end).
  void (*merge_states)(const AttentionArgs& args, const AttentionTile& tile, const float* states,
                       float* out, float* scratch);

  int64_t (*state_floats)(const AttentionArgs& args, int rows);
  int64_t (*scratch_floats)(const AttentionArgs& args, int rows);

  // Writes keys and values [T, kv_heads, head_dim] of tokens [begin, end) to their slots.
  void (*store_cache)(const AttentionArgs& args, const float* k, int64_t k_stride, const float* v,
                      int64_t v_stride, const int32_t* slots, int64_t begin, int64_t end);
};

const AttentionKernels& attention_scalar();
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avxvnni();
const AttentionKernels& attention_avx512();
const AttentionKernels& attention_amx();

// Of the instruction set that kernels() has, for caches of a type.
const AttentionKernels& attention_kernels(CacheType type);

}  // namespace precast
