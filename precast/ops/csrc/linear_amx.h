// Linears of many rows on AMX: 16 rows at a time against a panel, of which a group of inputs is one product
// of matrices.
//
// Its sums of integers are exact, as the other tiles' are, and become floats in the same order: a row has
// the same bits whichever tile it is in.
//
// kInt8's and kQ8_0's panels are matrices as they are: 1.1 to 1.2 times as fast from 32 rows on. The others' tiles
// are those of AVX-512. Unpacked into matrices of bytes first, 4 bits took 1.1 to 1.3 times as long with 16 rows, and
// as long with 64: what takes the time is the sums of each group of 32, as floats, and not their products.
#pragma once

#include <utility>

#include "amx.h"
#include "linear_fold.h"

namespace precast {
namespace {

// Rows of a matrix, and from how many on they come here: missing ones are computed in vain.
constexpr int kMatrixRows = 16;
constexpr int64_t kMatrixRowsFrom = 12;
static_assert(kMatrixRows == kRowBlock && kVectors == 1);
constexpr int kGroupValues = kGroup * kPanel;

// A panel's weights as matrices, a group each, and their scales.
struct MatrixPanel {
  const uint8_t* values;
  int64_t to_second, to_first;  // from a block's first group to its second, and on to the next block's
  const uint8_t* last;          // the last group, which may be elsewhere
  const uint8_t* scales;        // of the first block
  const float* column_scales;   // kInt8's
  uint8_t short_group[kGroupValues];
};

template <Format F>
inline void find_matrices(const LinearArgs& a, const uint8_t* panel, MatrixPanel& m) {
  const int64_t groups = input_groups(F, a.k);
  m.scales = panel + 2 * group_bytes(F);
  m.column_scales = nullptr;
  if constexpr (F == Format::kQ8_0) {
    m.values = panel;
    m.to_second = kGroupValues;
    m.to_first = block_bytes(F) - kGroupValues;
    m.last = panel + groups / 2 * block_bytes(F) - block_bytes(F) + kGroupValues;
    return;
  }
  const int64_t size = padded_k(F, a.k) * kPanel, before = (groups - 1) * kGroupValues;
  m.values = panel;
  m.to_second = m.to_first = kGroupValues;
  m.last = m.short_group;
  std::memset(m.short_group, 0, sizeof(m.short_group));
  std::memcpy(m.short_group, panel + before, size - before);
  m.column_scales = reinterpret_cast<const float*>(panel + size);
}

// What a tile is computed from, group by group: the distances are those from a group to the next.
struct MatrixInputs {
  const int8_t* values;
  const float *scales, *sums;
  int64_t rows;
};

// Sums of 16 rows' products of a group. T: 0 or 1, so that two are under way.
template <int T>
inline void matrix_dots(const int8_t* inputs, const void* weights,
                        int32_t (&to)[kMatrixRows * kPanel]) {
  tile_zero<T>();
  tile_load<2 + T>(inputs, kGroup);
  tile_load<4 + T>(weights, kStepBytes);
  tile_dots<T, 2 + T, 4 + T>();
  tile_store<T>(to);
}

constexpr TileShapes matrix_shapes() {
  TileShapes shapes;
  for (int t = 0; t < 2; ++t) {
    shapes.set(t, kMatrixRows, kPanel * sizeof(int32_t));
    shapes.set(2 + t, kMatrixRows, kGroup);
    shapes.set(4 + t, kGroup / 4, kStepBytes);
  }
  return shapes;
}

template <typename F, int... Rs>
[[gnu::always_inline]] inline void for_rows_of(F& body, std::integer_sequence<int, Rs...>) {
  (body(std::integral_constant<int, Rs>{}), ...);
}
// Calls body for each row as a constant: of loops GCC 12 keeps the totals in memory.
template <typename F>
[[gnu::always_inline]] inline void for_matrix_rows(F&& body) {
  for_rows_of(body, std::make_integer_sequence<int, kMatrixRows>{});
}

// Sums of a block of rows with a panel, [16][kPanel]. Not inline: with a caller's variables GCC 12 keeps the
// totals in memory, and the loop takes twice as long.
template <Format F>
[[gnu::noinline]] void matrix_sums(MatrixInputs x, const MatrixPanel& m, int64_t groups, Prefetch ahead,
                                   float* to) {
  alignas(64) int32_t dots[2][kMatrixRows * kPanel];
  vfloat totals[kMatrixRows];
  for_matrix_rows([&](auto r) { totals[r] = vfloat{}; });
  const int64_t lines = 2 * ceil_div(ahead.lines, groups);
  const uint8_t *weights = m.values, *scales = m.scales;
  const auto multiply = [&](auto t, const uint8_t* group) {
    matrix_dots<t>(x.values, group, dots[t]);
    x.values += x.rows * kGroup;
    weights += t == 0 ? m.to_second : m.to_first;
  };
  const auto add = [&](auto t) {
    const GroupParameters p = F == Format::kInt8 ? GroupParameters{} : group_parameters<F>(scales, t, 0, 0);
    if (t == 1) scales += block_bytes(F);
    for_matrix_rows([&](auto r) {
      const vint sum = load_as<vint>(dots[t] + r * kPanel);
      totals[r] = add_group<F>(totals[r], sum, x.scales[r], x.sums[r], p);
    });
    x.scales += x.rows;
    x.sums += x.rows;
  };
  constexpr std::integral_constant<int, 0> even{};
  constexpr std::integral_constant<int, 1> odd{};
  multiply(even, groups == 1 ? m.last : weights);
  for (int64_t left = groups; left > 2; left -= 2) {
    ahead.ask(lines);
    multiply(odd, weights);
    add(even);
    multiply(even, left == 3 ? m.last : weights);
    add(odd);
  }
  if (groups % 2 == 0) multiply(odd, m.last);
  add(even);
  if (groups % 2 == 0) add(odd);
  for_matrix_rows([&](auto r) { store(to + r * kPanel, totals[r]); });
}

template <Format F>
inline void matrix_tile(const LinearArgs& a, const MatrixPanel& m, int64_t index, int64_t first,
                        Prefetch ahead) {
  const int64_t groups = input_groups(F, a.k), rows = rows_of_block(a.m, first);
  const int64_t at = first * a.groups;
  alignas(64) float sums[kMatrixRows * kPanel];
  matrix_sums<F>({a.inputs.values + at * kGroup, a.inputs.scales + at, a.inputs.sums + at, rows}, m,
                 groups, ahead, sums);
  for (int64_t r = 0; r < rows; ++r) {
    const vfloat total = load(sums + r * kPanel);
    write_row(a, first + r, index * kPanel, &total, m.column_scales);
  }
}

template <Format F>
void linear_matrices(const LinearArgs& a, int64_t begin, int64_t end) {
  static constexpr TileShapes kShapes = matrix_shapes();
  const Tiles tiles(kShapes);
  const int64_t bytes = panel_bytes(F, a.k);
  MatrixPanel m;
  for (int64_t index = begin; index < end; ++index) {
    const uint8_t* panel = a.weight + index * bytes;
    find_matrices<F>(a, panel, m);
    written();
    for (int64_t first = 0; first < a.m; first += kMatrixRows) {
      matrix_tile<F>(a, m, index, first, share_ahead(panel + bytes, bytes, first, a.m, kMatrixRows));
    }
  }
}

}  // namespace
}  // namespace precast
