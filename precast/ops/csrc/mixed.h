// A weight [N, K] that says itself what it is: parts of formats of their own, one below the other.
//
// Files mix formats, from layer to layer and within a linear that was fused out of several. With the formats
// in the weight, one captured graph serves all of them. Eight-byte words: kMixedMagic, K, the number of
// parts, then of each its format, its rows and the byte at which its panels begin.
#pragma once

#include <cstring>
#include <string>

#include "kernels.h"

namespace precast {

constexpr int64_t kMixedMagic = 0x646578696d2e6370;
constexpr int64_t kMaxParts = 7;
constexpr int64_t kMixedHeader = 192;

struct MixedPart {
  Format format;
  int64_t rows, at;
};

struct MixedWeight {
  int64_t k = 0, count = 0, rows = 0;
  MixedPart parts[kMaxParts];
};

// What is wrong with a weight of `bytes` bytes; empty if nothing is, and `found` tells its parts.
inline std::string read_mixed(const uint8_t* weight, int64_t bytes, MixedWeight& found) {
  int64_t words[kMixedHeader / 8];
  if (bytes < kMixedHeader) return "it is shorter than its header";
  std::memcpy(words, weight, sizeof(words));
  if (words[0] != kMixedMagic) return "it has no header";
  found = {words[1], words[2], 0, {}};
  if (found.k <= 0 || found.k > 1 << 24 || found.count < 1 || found.count > kMaxParts) return "its header is wrong";
  for (int64_t i = 0; i < found.count; ++i) {
    const int64_t *part = words + 3 + 3 * i, format = part[0], rows = part[1], at = part[2];
    if (format < 0 || format >= kFormats - 1 || rows <= 0 || rows > 1 << 24 || at < kMixedHeader || at % 64 != 0) {
      return "its header is wrong";
    }
    found.parts[i] = {static_cast<Format>(format), rows, at};
    if (at + ceil_div(rows, kPanel) * panel_bytes(found.parts[i].format, found.k) > bytes) return "it is too short";
    found.rows += rows;
  }
  return {};
}

// The groups of inputs that all parts get along with.
inline int64_t mixed_groups(const MixedWeight& weight) {
  int64_t most = 0;
  for (int64_t i = 0; i < weight.count; ++i) {
    const int64_t groups = input_groups(weight.parts[i].format, weight.k);
    most = groups > most ? groups : most;
  }
  return most;
}

}  // namespace precast
