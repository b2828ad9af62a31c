// Linears of many rows whose weights take several instructions to unpack: a stretch of some panels is unpacked
// once, into the first cache, and used by all rows there are.
//
// Of 2048 inputs on one core with AVX-512, against unpacking for each tile of rows: q4_1 1.12 and 1.27 times as
// fast at 16 and 64 rows, q5_K 1.5 and 1.7, q6_K 1.25 and 1.4, iq4_xs 1.25 and 1.7; with AVX2 q4_1 1.05 and 1.13,
// q5_K 1.3 and 1.5, q6_K 1.3 and 1.5.
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

// Whether it pays. Where bytes are multiplied as bytes without unsigned ones, the multiplications are what
// takes the time: iq4_nl and q8_0 with AVX2.
constexpr bool unpacks_once([[maybe_unused]] Format f) {
#if defined(__AVX512VNNI__)
  return is_grouped(f);
#elif defined(__AVX2__)
  return is_grouped(f) && block_of(f).bits < 8 && !has_curve(f);
#else
  return false;
#endif
}
constexpr int64_t kUnpackedFrom = 8;  // rows

// A panel's groups, as group_dots takes weights that are unpacked, and their parameters as floats.
template <Format F>
struct UnpackedPanel {
  alignas(64) uint8_t weights[kStretchGroups][kGroup * kPanel];
  float scales[kStretchGroups][parts_of(F)][kPanel];
  float minima[has_minima(F) ? kStretchGroups : 1][kPanel];
};

template <Format F>
[[gnu::noinline]] void unpack_panel(const uint8_t* panel, int64_t first, int count, UnpackedPanel<F>& to) {
  constexpr int kGroups = block_of(F).groups;
  for (int g = 0; g < count; ++g) {
    const uint8_t* block = panel + (first + g) / kGroups * block_bytes(F);
    const int64_t group = (first + g) % kGroups;
    const uint8_t* from = block + values_at(F) + group * group_bytes(F);
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
      for (int v = 0; v < kVectors; ++v) {
        const auto four = load_weights<F>(from, s, v);
        std::memcpy(to.weights[g] + s * kStepBytes + v * kLanes * 4, &four, sizeof(four));
      }
    }
    for (int part = 0; part < parts_of(F); ++part) {
      for (int v = 0; v < kVectors; ++v) {
        const auto own = group_parameters<F>(block + parameters_at(F), group, part, v);
        store(to.scales[g][part] + v * kLanes, own.scales);
        if constexpr (has_minima(F)) store(to.minima[g] + v * kLanes, own.minima);
      }
    }
  }
}

// A stretch of panels, and which inputs meet it.
template <Format F>
struct Stretched {
  const UnpackedPanel<F>* panels;
  int count;         // groups
  int64_t at, rows;  // entry of a tile's first row in the first group; entries from a group to the next
};

// Adds a stretch to the sums [MR][NP][kPanel] of a tile's rows.
template <Format F, int MR, int NP>
inline void add_stretch(const LinearArgs& a, const Stretched<F>& w, Prefetch& ahead, int64_t lines, float* sums) {
  vfloat totals[MR][NP][kVectors];
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) totals[r][p][v] = load(sums + (r * NP + p) * kPanel + v * kLanes);
    }
  }
  int64_t at = w.at;
  for (int g = 0; g < w.count; ++g, at += w.rows) {
    ahead.ask(lines);
    group_dots<F, MR, NP, true>(
        w.panels->weights[g], sizeof(UnpackedPanel<F>), kSteps, a.inputs.values + at * kGroup,
        {a.inputs.starts + at, a.inputs.entries}, [&](int r, int p, int v, vint dots, int part) {
          GroupParameters own{load(w.panels[p].scales[g][part] + v * kLanes), vfloat{}};
          if constexpr (has_minima(F)) own.minima = load(w.panels[p].minima[g] + v * kLanes);
          totals[r][p][v] =
              add_group<F>(totals[r][p][v], dots, a.inputs.scales[at + r], a.inputs.sums[at + r], own);
        });
  }
  for (int r = 0; r < MR; ++r) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) store(sums + (r * NP + p) * kPanel + v * kLanes, totals[r][p][v]);
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
    for (int p = 0; p < NP; ++p) unpack_panel<F>(a.weight + (panel + p) * stride, g, count, unpacked[p]);
    for (int64_t first = begin; first < end; first += kRowBlock) {
      const int64_t rows = rows_of_block(a.m, first);
      add_stretch_to_block<F, MR, NP>(a, {unpacked, count, first * a.groups + g * rows, rows}, ahead, lines,
                                      sums + (first - begin) * NP * kPanel);
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    for (int p = 0; p < NP; ++p) {
      vfloat own[kVectors];
      for (int v = 0; v < kVectors; ++v) own[v] = load(sums + ((row - begin) * NP + p) * kPanel + v * kLanes);
      write_row(a, row, (panel + p) * kPanel, own);
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
