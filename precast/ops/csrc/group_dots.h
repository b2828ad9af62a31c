// Integer dot products of a group of inputs with a panel's columns.
//
// group_dots calls use(row, panel, vector, dots, part) for MR rows, each 32 inputs at x + 32 row, each vector
// of the columns of NP panels, `stride` bytes apart, and each part of the group, the first one first. Weights
// are those of `steps` times four inputs: 8, and less in kInt8's last group. `Unpacked`: they are bytes, as
// load_weights gives them.
#pragma once

#include "group_weights.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include "dots_vnni.h"
#elif defined(__AVX2__)
#include "dots_avx2.h"
#else
#include "dots_scalar.h"
#endif

namespace precast {
namespace {

// As group_dots, of unpacked weights where weighs_pairs(F): whole groups' sums times their scales. `scales`: two
// rows of pairs of 16 bits, the first half's scales twice, and the second's.
template <Format F, int MR, typename Use>
inline void group_dots_of_pairs(const uint8_t* w, const int8_t* x, const int32_t* scales, Starts starts, Use&& use);

// group_dots of weights where is_wide(F), as put_weights has them, with inputs as widen_inputs has them.
template <int MR, typename Use>
inline void group_dots_of_wide(const uint8_t* w, const int16_t* x, Use&& use);

}  // namespace
}  // namespace precast
