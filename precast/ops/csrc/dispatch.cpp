#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention_kernels.h"
#include "kernels.h"
#include "sampling.h"

namespace precast {
namespace {

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

// Linux saves the registers of AMX only for processes that have asked for it; forks have what they had.
bool runs_amx() {
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
}

// Linears take matrices without being asked: of integers they give AVX-512's bits, and of bf16 they are no slower
// for one row. So does attention over 8 bits. Attention over bf16 does not: a token has the same bits in prefill and
// decode, and decode pays for them there. With AMX asked for, long prompts take half the time, steps of 16 sequences
// 1.2 times (docs/decisions.md).
const Kernels& kernels_avx512_with_matrices() {
  static const Kernels table = [] {
    Kernels mixed = kernels_amx();
    mixed.isa = kernels_avx512().isa;
    return mixed;
  }();
  return table;
}

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool runs_avxvnni() { return runs_avx2() && __builtin_cpu_supports("avxvnni"); }

const Kernels& choose() {
  const char* wanted = std::getenv("PRECAST_NATIVE_ISA");
  if (wanted == nullptr || *wanted == 0) {
    if (runs_amx()) return kernels_avx512_with_matrices();
    if (runs_avx512()) return kernels_avx512();
    if (runs_avxvnni()) return kernels_avxvnni();
    return runs_avx2() ? kernels_avx2() : kernels_scalar();
  }
  if (std::strcmp(wanted, "amx") == 0 && runs_amx()) return kernels_amx();
  if (std::strcmp(wanted, "avx512") == 0 && runs_avx512()) return kernels_avx512();
  if (std::strcmp(wanted, "avxvnni") == 0 && runs_avxvnni()) return kernels_avxvnni();
  if (std::strcmp(wanted, "avx2") == 0 && runs_avx2()) return kernels_avx2();
  if (std::strcmp(wanted, "scalar") == 0) return kernels_scalar();
  throw std::runtime_error(std::string("PRECAST_NATIVE_ISA=") + wanted +
                           ": not an instruction set that this CPU runs (scalar, avx2, avxvnni, avx512, amx)");
}

// But for its linears and attention over 8 bits.
bool has_avx2_otherwise(const Kernels* chosen) {
  return chosen == &kernels_avx2() || chosen == &kernels_avxvnni();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const SamplingKernels& sampling_kernels() {
  const Kernels* chosen = &kernels();
  if (has_avx2_otherwise(chosen)) return sampling_avx2();
  return chosen == &kernels_scalar() ? sampling_scalar() : sampling_avx512();
}

const AttentionKernels& attention_kernels(CacheType type) {
  const Kernels* chosen = &kernels();
  const bool integers = type == CacheType::kInt8;
  if (integers && chosen == &kernels_avx512_with_matrices()) return attention_amx();
  if (integers && chosen == &kernels_avxvnni()) return attention_avxvnni();
  if (chosen == &kernels_amx()) return attention_amx();
  if (has_avx2_otherwise(chosen)) return attention_avx2();
  return chosen == &kernels_scalar() ? attention_scalar() : attention_avx512();
}

}  // namespace precast
