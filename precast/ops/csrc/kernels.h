// Kernels that are compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace precast {

// Output columns in a packed panel. Float panels are [K][16]; int8 panels are [K/4][16][4].
constexpr int kPanel = 16;

enum class WeightType { kFloat32, kBFloat16 };

struct AttentionArgs {
  const float* q;         // [T, q_heads, head_dim]
  const float* k_cache;   // [blocks, kv_heads, block_size, head_dim]
  const float* v_cache;   // as k_cache
  float* out;             // [T, q_heads, head_dim]
  const int32_t* block_table;  // of one sequence
  int64_t q_stride;       // floats from one token's q to the next
  int q_heads, kv_heads, head_dim, block_size;
  float scale;
};

struct Kernels {
  const char* isa;

  // y[m, panels * 16 columns from `column`] = x w^T + bias, for panels [panel_begin, panel_end).
  // x: [M, K] row stride x_stride; y: [M, N] row stride N; columns from N on are dropped.
  void (*gemm_float)(WeightType type, const float* x, int64_t x_stride, const void* weight,
                     const float* bias, float* y, int64_t m, int64_t n, int64_t k,
                     int64_t panel_begin, int64_t panel_end);

  // Symmetric quantisation of one row: q = round(x / scale), scale = max|x| / 127; q is padded with
  // zeros to k_padded. Returns scale.
  float (*quantize_row)(const float* x, int8_t* q, int64_t k, int64_t k_padded);

  // y = (xq w^T) * x_scale * w_scale + bias over panels. `column_sums` [N rounded up to 16] holds the
  // sum of each weight column, which the VNNI path needs to take its +128 offset back.
  void (*gemm_int8)(const int8_t* xq, const float* x_scales, const int8_t* weight,
                    const float* w_scales, const int32_t* column_sums, const float* bias, float* y,
                    int64_t m, int64_t n, int64_t k_padded, int64_t panel_begin,
                    int64_t panel_end);

  // Attention of one token over `context` cached tokens for the query heads of one KV head.
  // `scratch` holds at least scratch_floats(args).
  void (*attend)(const AttentionArgs& args, int64_t token, int kv_head, int64_t context,
                 float* scratch);

  // out = sum over `count` arrays of n floats, added in order.
  void (*sum)(const float* const* arrays, int count, float* out, int64_t n);
};

inline int64_t attend_scratch_floats(const AttentionArgs& a) {
  const int64_t group = a.q_heads / a.kv_heads;
  return group * (a.head_dim + a.block_size + 2);
}

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

// The best set that this CPU runs, or the one that PRECAST_NATIVE_ISA names (scalar, avx2, avx512).
const Kernels& kernels();

}  // namespace precast
