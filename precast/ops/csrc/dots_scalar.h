// group_dots without vectors of integers.
#pragma once

#include <algorithm>

#include "group_weights.h"

namespace precast {
namespace {

// acc[c] += sum over j < 4 of x[j] * w[4 c + j].
inline vint dot4(vint acc, vint w, const int8_t* x) {
  int8_t bytes[kLanes * 4];
  std::memcpy(bytes, &w, sizeof(bytes));
  for (int c = 0; c < kLanes; ++c) {
    for (int j = 0; j < 4; ++j) acc[c] += static_cast<int32_t>(x[j]) * bytes[c * 4 + j];
  }
  return acc;
}

// These weights have no offset here.
template <Format F, int MR, int NP, bool Unpacked = false, typename Use>
inline void group_dots(const uint8_t* w, int64_t, int steps, const int8_t* x, Starts, Use&& use) {
  static_assert(NP == 1);
  constexpr int kParts = parts_of(F), kOwn = kSteps / kParts;
  for (int part = 0; part < kParts; ++part) {
    vint dots[MR][kVectors] = {};
    for (int s = part * kOwn; s < std::min(steps, (part + 1) * kOwn); ++s) {
      for (int v = 0; v < kVectors; ++v) {
        const vint weights = weights_of<F, Unpacked>(w, s, v);
        for (int r = 0; r < MR; ++r) dots[r][v] = dot4(dots[r][v], weights, x + r * kGroup + s * 4);
      }
    }
    for (int r = 0; r < MR; ++r) {
      for (int v = 0; v < kVectors; ++v) use(r, 0, v, dots[r][v], part);
    }
  }
}

}  // namespace
}  // namespace precast
