// What adapters add to a linear's result, for one instruction set.
#pragma once

#include <cstdint>

namespace precast {

constexpr int64_t kLoraRows = 16;  // of one adapter, that are computed side by side

struct LoraKernels {
  // y[row] = sum over `depth` inputs of x[row][i] * w[i], for `rows` rows of n columns each; added to what
  // is there where `add`. w is fp16, with `stride` values from one input to the next. A row's sums are made
  // in one order, whatever rows are beside it; those of columns depend on n alone.
  void (*multiply)(const float* const* x, int64_t rows, int64_t depth, const uint16_t* w, int64_t stride,
                   int64_t n, float* const* y, bool add);
  // The same bits, of weights that are float32.
  void (*multiply_floats)(const float* const* x, int64_t rows, int64_t depth, const float* w,
                          int64_t stride, int64_t n, float* const* y, bool add);
  // fp16 to float32, exactly.
  void (*widen)(const uint16_t* from, int64_t count, float* to);
};

const LoraKernels& lora_scalar();
const LoraKernels& lora_avx2();
const LoraKernels& lora_avx512();

}  // namespace precast
