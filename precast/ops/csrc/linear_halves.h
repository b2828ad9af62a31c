// Linears of bf16 weights on AMX, of any number of rows: up to 16 of them against three panels at once.
//
// Inputs are floats. Each is taken as the sum of two bf16: itself rounded, and what is left of it, rounded. A row's
// sums depend neither on the other rows of its matrix nor on how many there are: it has the same bits in every step.
#pragma once

#include <algorithm>

#include "amx.h"
#include "linear_float.h"

namespace precast {
namespace {

// Inputs that one product of matrices sums over, and values of a right-hand matrix and of one of sums.
constexpr int kDepth = kGroup, kRightValues = kDepth * kPanel, kSumValues = kRowBlock * kPanel;
// Panels at once. With theirs and both parts of the inputs, eight registers are in use.
constexpr int kTrio = 3;
// Products whose weights stay in the first cache while rows pass by, and bytes of rows that stay in the second while
// panels do.
constexpr int kStretch = 8;
constexpr int64_t kHotBytes = 1 << 20;
constexpr int64_t kMostRows = 256;

inline vfloat widened(const uint16_t* halves) { return load(reinterpret_cast<const BFloat16*>(halves)); }

inline __m512 load_some(const float* x, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1, x);
}

inline void split(const float* x, int64_t count, uint16_t* rounded, uint16_t* left) {
  const __m512 a = load_some(x, count), b = load_some(x + kLanes, count - kLanes);
  const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
  std::memcpy(rounded, &both, sizeof(both));
  const __m512 a_left = (__m512)((vfloat)a - widened(rounded));
  const __m512 b_left = (__m512)((vfloat)b - widened(rounded + kLanes));
  const __m512bh rest = _mm512_cvtne2ps_pbh(b_left, a_left);
  std::memcpy(left, &rest, sizeof(rest));
}

void split_inputs(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / a.groups * kRowBlock, group = unit % a.groups, first = group * kGroup;
    for (int64_t row = block; row < block + rows_of_block(a.m, block); ++row) {
      const int64_t at = input_at(a.m, a.groups, row, group);
      split(a.x + row * a.x_stride + first, a.k - first, a.halves.rounded[at].values, a.halves.left[at].values);
    }
  }
}

// A right-hand matrix of a panel's weights for 32 inputs, of which there are `count`: neighbours side by side.
inline void pair_up(const uint16_t* from, int64_t count, uint16_t* to) {
  alignas(64) static constexpr uint16_t kByTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i by_turns = _mm512_load_si512(kByTurns);
  for (int i = 0; i < kDepth; i += 2, from += 2 * kPanel, to += 2 * kPanel) {
    const __mmask32 there = i + 1 < count ? 0xffffffff : i < count ? 0xffff : 0;
    _mm512_store_si512(to, _mm512_permutexvar_epi16(by_turns, _mm512_maskz_loadu_epi16(there, from)));
  }
}

// Registers: sums with each panel, rounded inputs, what is left of them, panels.
constexpr int kRounded = kTrio, kLeft = kTrio + 1, kRight = kTrio + 2;
static_assert(kRight + kTrio == kTileRegisters);

constexpr TileShapes halves_shapes(int rows) {
  TileShapes shapes;
  for (int t = 0; t < kTrio; ++t) shapes.set(t, rows, kPanel * sizeof(float));
  for (const int t : {kRounded, kLeft}) shapes.set(t, rows, kDepth * sizeof(uint16_t));
  for (int t = kRight; t < kTileRegisters; ++t) shapes.set(t, kDepth / 2, 2 * kPanel * sizeof(uint16_t));
  return shapes;
}

template <int NP, typename Use>
[[gnu::always_inline]] inline void for_panels(Use&& use) {
  use(std::integral_constant<int, 0>{});
  if constexpr (NP > 1) use(std::integral_constant<int, 1>{});
  if constexpr (NP > 2) use(std::integral_constant<int, 2>{});
}

// Adds the products of a block of rows with `count` matrices of each of NP panels to sums [NP][16][16]. `inputs`: of
// the first one; the next one's are `to_next` further.
template <int NP>
inline void add_products(SplitInputs inputs, int64_t to_next, const uint16_t* weights, int count, Prefetch& ahead,
                         int64_t lines, float* sums) {
  for_panels<NP>([&](auto p) { tile_load<p>(sums + p * kSumValues, kPanel * sizeof(float)); });
  for (int i = 0; i < count; ++i, weights += kRightValues) {
    ahead.ask(lines);
    tile_load<kRounded>(inputs.rounded + i * to_next, sizeof(HalfInputs));
    for_panels<NP>([&](auto p) {
      tile_load<kRight + p>(weights + p * kStretch * kRightValues, 2 * kPanel * sizeof(uint16_t));
      tile_dots_bf16<p, kRounded, kRight + p>();
    });
    tile_load<kLeft>(inputs.left + i * to_next, sizeof(HalfInputs));
    for_panels<NP>([&](auto p) { tile_dots_bf16<p, kLeft, kRight + p>(); });
  }
  for_panels<NP>([&](auto p) { tile_store<p>(sums + p * kSumValues, kPanel * sizeof(float)); });
}

// NP panels against rows [begin, end). Meanwhile the panels behind them are asked for, `lines` at a time.
template <int NP>
inline void halves_of_rows(const LinearArgs& a, int64_t panel, int64_t begin, int64_t end, Prefetch& ahead,
                           int64_t lines) {
  alignas(64) float sums[kMostRows * NP * kPanel];
  alignas(64) uint16_t weights[NP * kStretch * kRightValues];
  const int64_t groups = ceil_div(a.k, kDepth), stride = panel_bytes(a.format, a.k) / sizeof(uint16_t);
  const auto* from = reinterpret_cast<const uint16_t*>(a.weight) + panel * stride;
  std::memset(sums, 0, ceil_div(end - begin, kRowBlock) * NP * kSumValues * sizeof(float));
  for (int64_t g = 0; g < groups; g += kStretch) {
    const int count = static_cast<int>(std::min<int64_t>(kStretch, groups - g));
    for (int i = 0; i < NP * count; ++i) {
      const int64_t p = i / count, own = i % count, at = g + own;
      pair_up(from + p * stride + at * kRightValues, a.k - at * kDepth, weights + (p * kStretch + own) * kRightValues);
    }
    written();
    for (int64_t first = begin; first < end; first += kRowBlock) {
      const int64_t rows = rows_of_block(a.m, first), at = first * a.groups + g * rows;
      add_products<NP>({a.halves.rounded + at, a.halves.left + at}, rows, weights, count, ahead, lines,
                       sums + (first - begin) * NP * kPanel);
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    for (int p = 0; p < NP; ++p) {
      const int64_t block = (row - begin) / kRowBlock * NP + p;
      const vfloat own = load(sums + block * kSumValues + (row - begin) % kRowBlock * kPanel);
      write_row(a, row, (panel + p) * kPanel, &own);
    }
  }
}

template <int NP>
inline void halves_of_panels(const LinearArgs& a, int64_t panel) {
  const int64_t bytes = NP * panel_bytes(a.format, a.k), groups = ceil_div(a.k, kDepth);
  const int64_t hot = kHotBytes / (groups * 2 * static_cast<int64_t>(sizeof(HalfInputs))) / kRowBlock * kRowBlock;
  const int64_t most = std::clamp<int64_t>(hot, 2 * kRowBlock, kMostRows);
  Prefetch ahead{a.weight + panel * panel_bytes(a.format, a.k) + bytes, bytes};
  const int64_t lines = ceil_div(ahead.lines, groups * ceil_div(a.m, kRowBlock));
  for (int64_t row = 0; row < a.m; row += most) {
    halves_of_rows<NP>(a, panel, row, std::min(a.m, row + most), ahead, lines);
  }
}

// A panel against a single block of rows: memory is what it waits for. Each matrix is made while the one before it is
// multiplied. What is four pages ahead is asked for: with one, reading took 1.02 to 1.15 times as long.
inline void stream_panel(const LinearArgs& a, int64_t panel) {
  alignas(64) float sums[kSumValues];
  alignas(64) uint16_t weights[2][kRightValues];
  const int64_t groups = ceil_div(a.k, kDepth);
  const auto* from = reinterpret_cast<const uint16_t*>(a.weight + panel * panel_bytes(a.format, a.k));
  const auto make = [&](int64_t g) {
    const uint16_t* group = from + g * kRightValues;
    Prefetch ahead(reinterpret_cast<const char*>(group) + 4 * kPageBytes, sizeof(weights[0]));
    ahead.ask(ahead.lines);
    pair_up(group, a.k - g * kDepth, weights[g % 2]);
    written();
  };
  tile_zero<0>();
  make(0);
  for (int64_t g = 0; g < groups; ++g) {
    if (g + 1 < groups) make(g + 1);
    tile_load<kRounded>(a.halves.rounded + g * a.m, sizeof(HalfInputs));
    tile_load<kLeft>(a.halves.left + g * a.m, sizeof(HalfInputs));
    tile_load<kRight>(weights[g % 2], 2 * kPanel * sizeof(uint16_t));
    tile_dots_bf16<0, kRounded, kRight>();
    tile_dots_bf16<0, kLeft, kRight>();
  }
  tile_store<0>(sums, kPanel * sizeof(float));
  for (int64_t row = 0; row < a.m; ++row) {
    const vfloat own = load(sums + row * kPanel);
    write_row(a, row, panel * kPanel, &own);
  }
}

void linear_halves(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.m == 0) return;  // there are no such matrices
  // Of more than a block, the last one's missing rows are computed in vain, out of what lies there.
  const TileShapes shapes = halves_shapes(static_cast<int>(std::min<int64_t>(a.m, kRowBlock)));
  const Tiles tiles(shapes);
  int64_t panel = begin;
  const auto panels = [&](auto np) {
    for (; panel + np <= end; panel += np) halves_of_panels<np>(a, panel);
  };
  if (a.m > kRowBlock) {
    panels(std::integral_constant<int, kTrio>{});
    panels(std::integral_constant<int, 2>{});
    panels(std::integral_constant<int, 1>{});
  }
  for (; panel < end; ++panel) stream_panel(a, panel);
}

}  // namespace
}  // namespace precast
