// Compiled once for each instruction set, with PRECAST_ISA naming it (see precast/ops/build.py); those that
// differ in their linears alone have files of their own.
#include "elementwise.h"
#include "kernels.h"
#include "linear_float.h"
#include "linear_quantized.h"
#include "simd.h"
#include "unpack.h"

#define PRECAST_CAT_(a, b) a##b
#define PRECAST_CAT(a, b) PRECAST_CAT_(a, b)
#define PRECAST_STR_(a) #a
#define PRECAST_STR(a) PRECAST_STR_(a)

namespace precast {
namespace {

void linear(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.format) {
    case Format::kFloat32: return linear_float<float>(a, begin, end);
    case Format::kBFloat16: return linear_float<BFloat16>(a, begin, end);
    case Format::kFloat16: return linear_float<Float16>(a, begin, end);
    default: return linear_quantized(a, begin, end);
  }
}

void sum(const float* const* arrays, int count, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vfloat total = load(arrays[0] + i);
    for (int c = 1; c < count; ++c) total += load(arrays[c] + i);
    store(out + i, total);
  }
  for (; i < n; ++i) {
    float total = arrays[0][i];
    for (int c = 1; c < count; ++c) total += arrays[c][i];
    out[i] = total;
  }
}

}  // namespace

const Kernels& PRECAST_CAT(kernels_, PRECAST_ISA)() {
  static const Kernels table = {PRECAST_STR(PRECAST_ISA),
                                kPanels,
                                takes_wide,
                                quantize_inputs,
                                [](Format) { return false; },
                                nullptr,
                                find_starts,
                                linear,
                                unpack_row,
                                sum,
                                rms_norm_row,
                                silu_and_mul_row,
                                gelu_tanh_and_mul_row,
                                soft_cap_row,
                                softmax_row,
                                rotate_head};
  return table;
}

}  // namespace precast
