// AMX: AVX-512's kernels, but for linears of bf16, and of many rows whose weights are matrices as they lie.
#include "kernels.h"
#include "linear_amx.h"
#include "linear_halves.h"

namespace precast {
namespace {

bool takes_halves(Format format) { return format == Format::kBFloat16; }

void linear(const LinearArgs& a, int64_t begin, int64_t end) {
  if (takes_halves(a.format)) return linear_halves(a, begin, end);
  if (a.m >= kMatrixRowsFrom) {
    if (a.format == Format::kInt8) return linear_matrices<Format::kInt8>(a, begin, end);
    if (a.format == Format::kQ8_0) return linear_matrices<Format::kQ8_0>(a, begin, end);
  }
  kernels_avx512().linear(a, begin, end);
}

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels table = [] {
    Kernels own = kernels_avx512();
    own.isa = "amx";
    own.takes_halves = takes_halves;
    own.split_inputs = split_inputs;
    own.linear = linear;
    return own;
  }();
  return table;
}

}  // namespace precast
