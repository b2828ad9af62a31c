// Linears with 8-bit and 4-bit weights and inputs quantised to 8 bits on the fly.
//
// The grouped formats are GGUF's blocks, regrouped (blocks.h): each needs a way to load four of its values
// for each column, and a group's scales.
#pragma once

#include <type_traits>

#include "group_dots.h"
#include "linear_fold.h"
#include "linear_unpacked.h"

namespace precast {
namespace {

// Rows and panels of a register tile. AVX-512: a broadcast of inputs is a load, and one is issued a cycle
// beside one dot product of 64 bytes, so inputs are used for three panels; with sums of a group and totals,
// 4 by 3 fill the registers.
// Half groups are kept until the other half is there: 4 by 2.
constexpr int kRows = 4, kPanels = kVectors == 1 ? 3 : 1;
constexpr int panels_of_tile(Format f) { return has_halves(f) && kPanels > 2 ? 2 : kPanels; }

// Rows of inputs against panels: where a tile begins.
struct Tile {
  int64_t row, panel;
  int64_t at, rows;  // entry of the row's first group; entries from a group to the next
  Prefetch ahead;  // of the panels behind the tile's own: see share_ahead
};

inline int64_t per_step(int64_t lines, int64_t steps) { return steps > 0 ? ceil_div(lines, steps) : 0; }

// One scale for each column and each group of a row.
template <int MR, int NP>
inline void int8_tile(const LinearArgs& a, const Tile& t) {
  const int64_t k = padded_k(a.format, a.k), stride = panel_bytes(a.format, a.k);
  const uint8_t* w = a.weight + t.panel * stride;
  vfloat totals[MR][NP][kVectors];
  clear(totals);
  int64_t at = t.at;
  Prefetch ahead = t.ahead;
  const int64_t lines = per_step(ahead.lines, input_groups(a.format, a.k));
  const auto add = [&](int steps) {
    ahead.ask(lines);
    group_dots<Format::kInt8, MR, NP>(
        w, stride, steps, a.inputs.values + at * kGroup, {a.inputs.starts + at, 0},
        [&](int r, int p, int v, vint dots, int) {
          totals[r][p][v] = add_group<Format::kInt8>(totals[r][p][v], dots, a.inputs.scales[at + r],
                                                     0, GroupParameters{});
        });
    w += steps * kStepBytes;
    at += t.rows;
  };
  for (int64_t g = 0; g < k / kGroup; ++g) add(kGroup / 4);
  if (k % kGroup != 0) add(static_cast<int>(k % kGroup / 4));
  for (int p = 0; p < NP; ++p) {
    const float* scales = reinterpret_cast<const float*>(w + p * stride);
    for (int r = 0; r < MR; ++r) {
      write_row(a, t.row + r, (t.panel + p) * kPanel, totals[r][p], scales);
    }
  }
}

// Adds a block's sums to a tile's totals.
template <Format F, int MR, int NP>
inline void add_block(vfloat (&totals)[MR][NP][kVectors], const vfloat (&sums)[MR][NP][kVectors],
                      const uint8_t* block, int64_t stride) {
  for (int p = 0; p < NP; ++p) {
    for (int v = 0; v < kVectors; ++v) {
      const vfloat scales = block_scales(block + parameters_at(F) + p * stride, v);
      for (int r = 0; r < MR; ++r) totals[r][p][v] = multiply_add(sums[r][p][v], scales, totals[r][p][v]);
    }
  }
}

// One scale for each group of a row and of a column.
template <Format F, int MR, int NP>
inline void grouped_tile(const LinearArgs& a, const Tile& t) {
  const int64_t groups = input_groups(F, a.k), stride = panel_bytes(F, a.k);
  const uint8_t* block = a.weight + t.panel * stride;
  vfloat totals[MR][NP][kVectors], sums[MR][NP][kVectors], first[MR][NP][kVectors];
  clear(totals);
  int64_t at = t.at;
  Prefetch ahead = t.ahead;
  constexpr int kGroups = block_of(F).groups, kPairs = kGroups / 2;
  const int64_t lines = per_step(ahead.lines, groups / 2);
  const auto add = [&](int group) {
    const uint8_t* parameters = block + parameters_at(F);
    group_dots<F, MR, NP>(
        block + values_at(F) + group * group_bytes(F), stride, kSteps, a.inputs.values + at * kGroup,
        {a.inputs.starts + at, a.inputs.entries}, [&](int r, int p, int v, vint dots, int part) {
          const auto own = group_parameters<F>(parameters + p * stride, group, part, v);
          const float scale = a.inputs.scales[at + r];
          if constexpr (has_halves(F)) {
            add_half(sums[r][p][v], first[r][p][v], dots, scale, own.scales, part);
          } else {
            totals[r][p][v] = add_group<F>(totals[r][p][v], dots, scale, a.inputs.sums[at + r], own);
          }
        });
    at += t.rows;
  };
  for (int64_t b = 0; b < groups; b += kGroups, block += block_bytes(F)) {
    if constexpr (has_halves(F)) clear(sums);
    for (int pair = 0; pair < kPairs; ++pair) {
      ahead.ask(lines);
      add(2 * pair);
      add(2 * pair + 1);
    }
    if constexpr (has_halves(F)) add_block<F>(totals, sums, block, stride);
  }
  for (int p = 0; p < NP; ++p) {
    for (int r = 0; r < MR; ++r) {
      write_row(a, t.row + r, (t.panel + p) * kPanel, totals[r][p]);
    }
  }
}

// NP panels against all rows of a block of inputs.
template <Format F, int NP>
inline void block_of_rows(const LinearArgs& a, int64_t panel, int64_t first) {
  const int64_t groups = a.groups, rows = rows_of_block(a.m, first);
  const int64_t bytes = NP * panel_bytes(F, a.k);
  const uint8_t* next = a.weight + panel * panel_bytes(F, a.k) + bytes;
  int64_t row = 0;
  const auto tiles = [&](auto mr) {
    for (; row + mr <= rows; row += mr) {
      const Tile tile{first + row, panel, first * groups + row, rows,
                      share_ahead(next, bytes, first + row, a.m, kRows)};
      if constexpr (F == Format::kInt8) {
        int8_tile<mr, NP>(a, tile);
      } else {
        grouped_tile<F, mr, NP>(a, tile);
      }
    }
  };
  tiles(std::integral_constant<int, kRows>{});
  tiles(std::integral_constant<int, 3>{});
  tiles(std::integral_constant<int, 2>{});
  tiles(std::integral_constant<int, 1>{});
}

template <Format F>
void linear_quantized(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t panel = begin;
  const auto panels = [&](auto np) {
    for (; panel + np <= end; panel += np) {
      if constexpr (unpacks_once(F)) {
        if (a.m >= kUnpackedFrom) {
          unpacked_panels<F, kRows, np>(a, panel);
          continue;
        }
      }
      for (int64_t first = 0; first < a.m; first += kRowBlock) block_of_rows<F, np>(a, panel, first);
    }
  };
  // A single row reads one panel after the other: memory is what it waits for.
  if (a.m > 1) panels(std::integral_constant<int, panels_of_tile(F)>{});
  panels(std::integral_constant<int, 1>{});
}

void linear_quantized(const LinearArgs& a, int64_t begin, int64_t end) {
  switch (a.format) {
    case Format::kInt8: return linear_quantized<Format::kInt8>(a, begin, end);
    case Format::kQ8_0: return linear_quantized<Format::kQ8_0>(a, begin, end);
    case Format::kQ4_0: return linear_quantized<Format::kQ4_0>(a, begin, end);
    case Format::kQ4_1: return linear_quantized<Format::kQ4_1>(a, begin, end);
    case Format::kQ4_K: return linear_quantized<Format::kQ4_K>(a, begin, end);
    case Format::kQ5_K: return linear_quantized<Format::kQ5_K>(a, begin, end);
    case Format::kQ6_K: return linear_quantized<Format::kQ6_K>(a, begin, end);
    case Format::kQ5_0: return linear_quantized<Format::kQ5_0>(a, begin, end);
    case Format::kQ5_1: return linear_quantized<Format::kQ5_1>(a, begin, end);
    case Format::kIQ4_NL: return linear_quantized<Format::kIQ4_NL>(a, begin, end);
    case Format::kIQ4_XS: return linear_quantized<Format::kIQ4_XS>(a, begin, end);
    case Format::kMXFP4: return linear_quantized<Format::kMXFP4>(a, begin, end);
    default: return;  // floats, and kMixed, whose parts have formats of their own
  }
}

}  // namespace
}  // namespace precast
