// Drawing tokens from logits, without sorting the vocabulary. See sampling.cpp for how, and
// precast/ops/sampling.py for what the columns mean.
//
// Bits depend on a row alone: not on the other rows, the number of threads or the instruction set.
// Sums are taken over blocks of kSampleBlock logits in one fixed order, then over the blocks one by one;
// the vector code is compiled without contraction to fused multiply-adds.
#pragma once

#include <cstdint>

namespace precast {

constexpr int64_t kSampleBlock = 64;
inline int64_t sample_blocks(int64_t n) { return (n + kSampleBlock - 1) / kSampleBlock; }

// What is compiled for each instruction set (sampling_impl.cpp). Rows have n logits; blocks are numbered
// from the row's start. Buffers for all but `scan` and `masses` have kSampleBlock elements more than
// they need.
struct SamplingKernels {
  // Blocks [begin, end): sets tokens whose bit in `mask` (may be null) is clear to -inf and writes each
  // block's largest logit. Returns whether there was a NaN or +inf.
  bool (*scan)(float* x, int64_t n, const uint32_t* mask, int64_t begin, int64_t end, float* maxima);

  // sums[b] of blocks [begin, end): the sum of exp((x - maximum) * inverse).
  void (*masses)(const float* x, int64_t n, float maximum, float inverse, int64_t begin, int64_t end,
                 float* sums);

  // The logits of at least `threshold` and their ids, in order of ids; returns how many.
  int64_t (*gather)(const float* x, int64_t n, const float* maxima, float threshold, float* values,
                    int32_t* ids);

  // weights[i] = exp((x[i] - maximum) * inverse) for i < n.
  void (*weights)(const float* x, int64_t n, float maximum, float inverse, float* weights);

  // The place of each value on a scale from `maximum` downwards: the whole part of (maximum - x) * scale, at
  // most `last`.
  void (*rank)(const float* x, int64_t n, float maximum, float scale, int32_t last, int32_t* places);

  // Indices i with places[i] == place, in order; returns how many.
  int64_t (*find)(const int32_t* places, int64_t n, int32_t place, int32_t* indices);

  // Sets weights to 0 of values that are less than `value`, or equal to it with an id above `id`.
  void (*cut)(const float* values, const int32_t* ids, int64_t n, float value, int32_t id, float* weights);

  // sums[b] of the blocks of `weights`, as `masses` adds them up. Sets what fills the last block to 0.
  void (*fold)(float* weights, int64_t n, float* sums);
};

const SamplingKernels& sampling_scalar();
const SamplingKernels& sampling_avx2();
const SamplingKernels& sampling_avx512();
// Of the instruction set that kernels() has.
const SamplingKernels& sampling_kernels();

enum class DrawStatus : int32_t {
  kDrawn = 0,
  kNotFinite = 1,   // a logit is NaN or +inf
  kNothingLeft = 2, // every token is masked
  kBadToken = 3,    // a penalised, biased or given token is outside of the vocabulary
};

// One row's columns.
struct DrawParams {
  double temperature, top_p, min_p;
  double repetition, presence, frequency;
  int64_t top_k;      // 0: all
  uint64_t seed, step;
  int64_t top;        // likeliest tokens to report; -1: no log probabilities at all
  int64_t given = -1; // the token to report instead of drawing one
};

// One row's entries of a list by rows.
struct TokenCounts {
  const int32_t* ids;
  const int32_t* counts;
  int64_t size;
};
struct TokenBiases {
  const int32_t* ids;
  const float* values;
  int64_t size;
};

// One row between the passes over its logits.
struct DrawRow {
  float* x;
  int64_t n;
  const uint32_t* mask;
  float* maxima;  // [blocks]
  float* masses;  // [blocks] at the row's temperature, where drawing needs them
  float* plain;   // [blocks] at temperature 1, where log probabilities are wanted; may be `masses`
  float maximum;
  DrawStatus status;
  int64_t first, whole;  // the logits' place in a vocabulary of which this rank has a part
};

struct Drawn {
  int64_t token;  // -1 unless status is kDrawn
  float logprob;
  int32_t* top_ids;  // [top], -1 behind the last
  float* top_logprobs;
};

// Whether the draw needs the sum over the whole row at the row's temperature.
bool needs_masses(const DrawParams& p, int64_t n);
// What logits are multiplied by: 1 / temperature, kept finite.
float inverse_of(double temperature);

// Penalties, then bias, in place. Sets status where an id is outside of the whole vocabulary.
void adjust_row(DrawRow& row, const DrawParams& p, const TokenCounts& seen, const TokenBiases& bias);
// Behind the scan: the row's largest logit, and status where there is none.
void finish_scan(DrawRow& row, bool not_finite);
// Where the largest logit is first.
int64_t likeliest(const DrawRow& row);
// Behind all passes.
void draw_row(const DrawRow& row, const DrawParams& p, Drawn& out);

// In [0, 1): the first of Philox4x64-10's numbers for key (seed, 0) and counter (step + 1, 0, 0, 0), as
// numpy's Generator(Philox(key=seed, counter=step)).random() has it. J. Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", 2011.
double philox_uniform(uint64_t seed, uint64_t step);

}  // namespace precast
