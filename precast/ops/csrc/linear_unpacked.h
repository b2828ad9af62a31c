// Linears of many rows whose weights take several instructions to unpack: a stretch of some panels is unpacked
// once, into the first cache, and used by all rows there are.
//
// Of 2048 inputs on one core with AVX-512, against unpacking for each tile of rows: q4_1 1.12 and 1.27 times as
// fast at 16 and 64 rows, q5_K 1.5 and 1.7, q6_K 1.25 and 1.4, iq4_xs 1.25 and 1.7; with AVX2 q4_1 1.05 and 1.13,
// q5_K 1.3 and 1.5, q6_K 1.4 and 1.6, iq4_nl 1.2, int8 and q8_0 1.1.
//
// Sums of integers and of floats are those of the other tiles, in the same order: a row has the same bits
// whichever tile it is in.
#pragma once

#include <algorithm>
#include <type_traits>

#include "group_dots.h"
#include "linear_fold.h"

namespace precast {
namespace {

constexpr int kStretchGroups = 8;  // of inputs; a whole number of any format's blocks
constexpr int64_t kStretchRows = 64;
static_assert(kStretchRows % kRowBlock == 0);

// Whether it pays. kInt8's weights are what AVX-512 multiplies already.
constexpr bool unpacks_once([[maybe_unused]] Format f) {
#if defined(__AVX512F__)
  return is_grouped(f);
#elif defined(__AVX2__)
  return is_quantized(f);
#else
  return false;
#endif
}
constexpr int64_t kUnpackedFrom = 8;  // rows

bool takes_wide(Format format, int64_t rows) { return is_wide(format) && rows >= kUnpackedFrom; }

// A panel's groups, as group_dots takes weights that are unpacked, and their parameters as floats.
template <Format F>
struct UnpackedPanel {
  alignas(64) uint8_t weights[kStretchGroups][kGroup * kPanel * (is_wide(F) ? 2 : 1)];
  float scales[is_grouped(F) ? kStretchGroups : 1][parts_of(F)][kPanel];
  int32_t pairs[weighs_pairs(F) ? kStretchGroups : 1][2][kPanel];  // instead: see group_dots_of_pairs
  float minima[has_minima(F) ? kStretchGroups : 1][kPanel];
  float block_scales[kPanel];  // of has_halves, of whose blocks a stretch has one

  GroupParameters parameters(int group, int part, int v) const {
    GroupParameters own{};
    if constexpr (is_grouped(F)) own.scales = load(scales[group][part] + v * kLanes);
    if constexpr (has_minima(F)) own.minima = load(minima[group] + v * kLanes);
    return own;
  }
};

// A group's weights; kInt8's last group may have fewer than kSteps, with inputs of zero behind them.
template <Format F>
inline void unpack_weights(const uint8_t* from, int steps, uint8_t* to) {
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) {
    if (F == Format::kInt8 && s == steps) break;
    for (int v = 0; v < kVectors; ++v) put_weights<F>(to, s, v, load_weights<F>(from, s, v));
  }
}

inline void put_pairs(const uint8_t* parameters, int64_t group, int v, int32_t (&to)[2][kPanel]) {
  for (int half = 0; half < 2; ++half) {
    const vint own = half_scales(parameters, group, half, v), pairs = (own & 0xffff) | own << 16;
    std::memcpy(to[half] + v * kLanes, &pairs, sizeof(pairs));
  }
}

template <Format F>
[[gnu::noinline]] void unpack_panel(const uint8_t* panel, int64_t first, int count, UnpackedPanel<F>& to) {
  constexpr int kGroups = block_of(F).groups;
  for (int g = 0; g < count; ++g) {
    const uint8_t* block = panel + (first + g) / kGroups * block_bytes(F);
    const int64_t group = (first + g) % kGroups;
    unpack_weights<F>(block + values_at(F) + group * group_bytes(F), kSteps, to.weights[g]);
    const uint8_t* parameters = block + parameters_at(F);
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (has_halves(F)) store(to.block_scales + v * kLanes, block_scales(parameters, v));
      if constexpr (weighs_pairs(F)) put_pairs(parameters, group, v, to.pairs[g]);
      for (int part = 0; part < (weighs_pairs(F) ? 0 : parts_of(F)); ++part) {
        const auto own = group_parameters<F>(parameters, group, part, v);
        store(to.scales[g][part] + v * kLanes, own.scales);
        if constexpr (has_minima(F)) store(to.minima[g] + v * kLanes, own.minima);
      }
    }
  }
}

// As above, of kInt8, whose panel has `steps` times four inputs.
template <Format F>
[[gnu::noinline]] void unpack_int8(const uint8_t* panel, int64_t first, int64_t steps, UnpackedPanel<F>& to) {
  if ((first + kStretchGroups) * kSteps > steps) std::memset(to.weights, 0, sizeof(to.weights));
  for (int g = 0; g < kStretchGroups && (first + g) * kSteps < steps; ++g) {
    const int64_t at = (first + g) * kSteps;
    unpack_weights<F>(panel + at * kStepBytes, static_cast<int>(std::min<int64_t>(kSteps, steps - at)), to.weights[g]);
  }
}

// A stretch of panels, and which inputs meet it.
template <Format F>
struct Stretched {
  const UnpackedPanel<F>* panels;
  int count;         // groups
  int64_t at, rows;  // entry of a tile's first row in the first group; entries from a group to the next
};

// Adds a stretch to the sums [MR][NP][kPanel] of a tile's rows; where halves have scales, as a block's sum.
template <Format F, int MR, int NP>
inline void add_stretch(const LinearArgs& a, const Stretched<F>& w, Prefetch& ahead, int64_t lines, float* sums) {
  static_assert(!has_halves(F) || block_of(F).groups == kStretchGroups);
  vfloat totals[MR][NP][kVectors], first[MR][NP][kVectors];
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        totals[r][p][v] = has_halves(F) ? vfloat{} : load(sums + (r * NP + p) * kPanel + v * kLanes);
      }
    }
  }
  int64_t at = w.at;
  for (int g = 0; g < w.count; ++g, at += w.rows) {
    ahead.ask(lines);
    const auto add = [&](int r, int p, int v, vint dots, int part) {
      const GroupParameters own = w.panels[p].parameters(g, part, v);
      const float scale = a.inputs.scales[at + r];
      if constexpr (has_halves(F)) {
        add_half(totals[r][p][v], first[r][p][v], dots, scale, own.scales, part);
      } else {
        totals[r][p][v] = add_group<F>(totals[r][p][v], dots, scale, a.inputs.sums[at + r], own);
      }
    };
    if constexpr (weighs_pairs(F)) {
      const auto add_whole = [&](int r, int p, int v, vint dots, int) {
        totals[r][p][v] = multiply_add(to_float(dots), splat(a.inputs.scales[at + r]), totals[r][p][v]);
      };
      group_dots_of_pairs<F, MR>(w.panels->weights[g], a.inputs.values + at * kGroup, w.panels->pairs[g][0],
                                 {a.inputs.starts + at, a.inputs.entries}, add_whole);
    } else if constexpr (is_wide(F)) {
      group_dots_of_wide<MR>(w.panels->weights[g], a.inputs.wide + at * kGroup, add);
    } else {
      group_dots<F, MR, NP, true>(w.panels->weights[g], sizeof(UnpackedPanel<F>), kSteps,
                                  a.inputs.values + at * kGroup, {a.inputs.starts + at, a.inputs.entries}, add);
    }
  }
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + (r * NP + p) * kPanel + v * kLanes;
        if constexpr (has_halves(F)) {
          const vfloat d = load(w.panels[p].block_scales + v * kLanes);
          store(to, multiply_add(totals[r][p][v], d, load(to)));
        } else {
          store(to, totals[r][p][v]);
        }
      }
    }
  }
}

// All tiles of a block of rows against a stretch; `at`: entry of the block's first row.
template <Format F, int MR, int NP>
inline void add_stretch_to_block(const LinearArgs& a, Stretched<F> w, Prefetch& ahead, int64_t lines, float* sums) {
  int64_t row = 0;
  const int64_t first = w.at;
  const auto tiles = [&](auto mr) {
    for (; row + mr <= w.rows; row += mr) {
      w.at = first + row;
      add_stretch<F, mr, NP>(a, w, ahead, lines, sums + row * NP * kPanel);
    }
  };
  tiles(std::integral_constant<int, MR>{});
  tiles(std::integral_constant<int, 3>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

// NP panels against rows [begin, end).
template <Format F, int MR, int NP>
inline void stretched_rows(const LinearArgs& a, int64_t panel, int64_t begin, int64_t end, Prefetch& ahead,
                           int64_t lines) {
  const int64_t groups = input_groups(F, a.k), stride = panel_bytes(F, a.k);
  UnpackedPanel<F> unpacked[NP];
  alignas(64) float sums[kStretchRows * NP * kPanel];
  std::memset(sums, 0, sizeof(float) * (end - begin) * NP * kPanel);
  for (int64_t g = 0; g < groups; g += kStretchGroups) {
    const int count = static_cast<int>(std::min<int64_t>(kStretchGroups, groups - g));
    for (int p = 0; p < NP; ++p) {
      const uint8_t* from = a.weight + (panel + p) * stride;
      if constexpr (F == Format::kInt8) {
        unpack_int8(from, g, padded_k(F, a.k) / 4, unpacked[p]);
      } else {
        unpack_panel<F>(from, g, count, unpacked[p]);
      }
    }
    for (int64_t first = begin; first < end; first += kRowBlock) {
      const int64_t rows = rows_of_block(a.m, first);
      add_stretch_to_block<F, MR, NP>(a, {unpacked, count, first * a.groups + g * rows, rows}, ahead, lines,
                                      sums + (first - begin) * NP * kPanel);
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    for (int p = 0; p < NP; ++p) {
      const uint8_t* behind = a.weight + (panel + p) * stride + padded_k(F, a.k) * kPanel;
      const auto* scales = F == Format::kInt8 ? reinterpret_cast<const float*>(behind) : nullptr;
      vfloat own[kVectors];
      for (int v = 0; v < kVectors; ++v) own[v] = load(sums + ((row - begin) * NP + p) * kPanel + v * kLanes);
      write_row(a, row, (panel + p) * kPanel, own, scales);
    }
  }
}

// NP panels against all rows. Meanwhile the panels behind them are asked for.
template <Format F, int MR, int NP>
inline void unpacked_panels(const LinearArgs& a, int64_t panel) {
  const int64_t bytes = NP * panel_bytes(F, a.k), groups = input_groups(F, a.k);
  Prefetch ahead{a.weight + panel * panel_bytes(F, a.k) + bytes, bytes};
  const int64_t lines = ceil_div(ahead.lines, groups * ceil_div(a.m, MR));
  for (int64_t row = 0; row < a.m; row += kStretchRows) {
    stretched_rows<F, MR, NP>(a, panel, row, std::min(a.m, row + kStretchRows), ahead, lines);
  }
}

}  // namespace
}  // namespace precast
