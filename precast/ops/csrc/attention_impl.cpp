// Compiled once for each instruction set, with PRECAST_ISA naming it (see precast/ops/build.py).
#include "attention.h"
#include "attention_cache.h"
#include "attention_kernels.h"

#define PRECAST_CAT_(a, b) a##b
#define PRECAST_CAT(a, b) PRECAST_CAT_(a, b)

namespace precast {

const AttentionKernels& PRECAST_CAT(attention_, PRECAST_ISA)() {
  static const AttentionKernels table = {attend, merge_states, state_floats, scratch_floats,
                                         store_cache};
  return table;
}

}  // namespace precast
