// AVX-VNNI without AVX-512: AVX2's kernels, but for linears with quantised weights (and attention over 8 bits, which
// has its own table).
#include "kernels.h"
#include "linear_quantized.h"

namespace precast {
namespace {

void linear(const LinearArgs& a, int64_t begin, int64_t end) {
  if (is_quantized(a.format)) return linear_quantized(a, begin, end);
  kernels_avx2().linear(a, begin, end);
}

}  // namespace

const Kernels& kernels_avxvnni() {
  static const Kernels table = [] {
    Kernels own = kernels_avx2();
    own.isa = "avxvnni";
    own.takes_wide = takes_wide;
    own.quantize_inputs = quantize_inputs;
    own.find_starts = find_starts;
    own.linear = linear;
    return own;
  }();
  return table;
}

}  // namespace precast
