// Packs a GGUF file's blocks into the kernels' panels, without a float in between.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "gguf_blocks.h"
#include "kernels.h"
#include "pool.h"

namespace precast {
namespace {

struct Packing {
  GgufType type;
  GgufLayout layout;
  int64_t n, k;
  const uint8_t* rows;
  int64_t stride;  // bytes from a row to the next
  uint8_t* out;
};

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                     : exponent == 31 ? std::numeric_limits<float>::infinity()
                                      : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits >> 15 ? -size : size;
}

// Rounds to nearest, halves to even; scales are no larger than fp16's own.
uint16_t float_to_half(float x) {
  if (!(x > 0)) return 0;
  int exponent;
  std::frexp(x, &exponent);
  const int shift = std::max(exponent - 11, -24);
  const float steps = std::nearbyint(std::ldexp(x, -shift));
  return static_cast<uint16_t>(static_cast<int>(steps) + (shift + 24) * 1024);
}

bool finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// Of one column of a panel: 32 values of a group, as blocks.h lays them out. What is there is zero.
void put_group(int bits, const uint8_t* values, uint8_t* group) {
  if (bits == 8) {
    for (int i = 0; i < 32; ++i) group[i / 4 * 64 + i % 4] = values[i];
    return;
  }
  for (int i = 0; i < 16; ++i) {
    group[i / 4 * 64 + i % 4] = static_cast<uint8_t>((values[i] & 15) | (values[16 + i] & 15) << 4);
  }
  uint8_t* high = group + 4 * 64;
  for (int i = 0; i < 32 && bits == 5; ++i) high[i % 4] |= (values[i] >> 4 & 1) << i / 4;
  for (int i = 0; i < 32 && bits == 6; ++i) high[i / 16 * 64 + i % 4] |= (values[i] >> 4 & 3) << i % 16 / 4 * 2;
}

// fp16 of a column; `row`: of 16 columns.
void put_half(uint8_t* parameters, int64_t row, uint16_t value) {
  std::memcpy(parameters + row * kPanel * 2, &value, 2);
}

// A block of 256 inputs. `parameters`: those of a column, for fp16.
void put_parameters(Format f, const GgufBlock& block, uint8_t* parameters, int64_t column) {
  uint8_t* bytes = parameters + 4 * kPanel + column;
  if (f == Format::kQ4_K || f == Format::kQ5_K) {
    put_half(parameters + column * 2, 0, block.d);
    put_half(parameters + column * 2, 1, block.e);
    for (int g = 0; g < 8; ++g) bytes[g * kPanel] = block.scales[g];
    for (int g = 0; g < 8; ++g) bytes[(8 + g) * kPanel] = block.minima[g];
    return;
  }
  const float d = half_to_float(block.d);
  std::memcpy(parameters + column * 4, &d, 4);
  for (int g = 0; g < (f == Format::kQ6_K ? 16 : 8); ++g) bytes[g * kPanel] = block.scales[g];
}

// A group of a block of small ones.
void put_parameters_of_group(Format f, const GgufBlock& block, uint8_t* parameters, int64_t column, int group) {
  if (f == Format::kMXFP4) {
    parameters[group * kPanel + column] = block.scales[0];
    return;
  }
  put_half(parameters + column * 2, group, block.d);
  if (f == Format::kQ4_1 || f == Format::kQ5_1) put_half(parameters + column * 2, 2 + group, block.e);
}

bool finite(GgufType type, const GgufBlock& block) {
  return finite(block.d) && finite(block.e) && !(type == GgufType::kMXFP4 && block.scales[0] == 255);
}

// A group of kQ2_K rounded to 8 bits, as kQ8_0 has them.
GgufBlock rounded_group(const GgufBlock& block, int group) {
  float values[32], largest = 0;
  for (int i = 0; i < 32; ++i) {
    const uint8_t own = block.scales[2 * group + i / 16];
    values[i] = half_to_float(block.d) * static_cast<float>(own & 15) * block.bits[32 * group + i] -
                half_to_float(block.e) * static_cast<float>(own >> 4);
    largest = std::max(largest, std::fabs(values[i]));
  }
  GgufBlock found;
  found.d = float_to_half(std::min(largest / 127, 65504.0f));
  const float scale = half_to_float(found.d);
  for (int i = 0; i < 32 && scale > 0; ++i) {
    const float steps = std::clamp(std::nearbyint(values[i] / scale), -127.0f, 127.0f);
    found.bits[i] = static_cast<uint8_t>(static_cast<int8_t>(steps));
  }
  return found;
}

// One column of a panel. Returns whether all scales are finite.
bool pack_long_blocks(const Packing& a, const uint8_t* row, uint8_t* panel, int64_t column) {
  const Format f = a.layout.format;
  const int bits = block_of(f).bits;
  bool sound = true;
  for (int64_t b = 0; b < a.k / 256; ++b) {
    GgufBlock block;
    read_block(a.type, row + b * a.layout.bytes, block);
    sound &= finite(a.type, block);
    for (int g = 0; g < 8; ++g) {
      if (a.type == GgufType::kQ2_K) {
        uint8_t* to = panel + (b * 4 + g / 2) * block_bytes(f);
        const GgufBlock own = rounded_group(block, g);
        put_group(bits, own.bits, to + values_at(f) + g % 2 * group_bytes(f) + column * 4);
        put_parameters_of_group(f, own, to + parameters_at(f), column, g % 2);
      } else {
        uint8_t* to = panel + b * block_bytes(f);
        put_group(bits, block.bits + 32 * g, to + values_at(f) + g * group_bytes(f) + column * 4);
        if (g == 0) put_parameters(f, block, to + parameters_at(f), column);
      }
    }
  }
  return sound;
}

bool pack_short_blocks(const Packing& a, const uint8_t* row, uint8_t* panel, int64_t column) {
  const Format f = a.layout.format;
  const int groups = block_of(f).groups, bits = block_of(f).bits;
  bool sound = true;
  for (int64_t b = 0; b < a.k / kGroup; ++b) {
    GgufBlock block;
    read_block(a.type, row + b * a.layout.bytes, block);
    sound &= finite(a.type, block);
    const int g = static_cast<int>(b % groups);
    uint8_t* to = panel + b / groups * block_bytes(f);
    put_group(bits, block.bits, to + values_at(f) + g * group_bytes(f) + column * 4);
    put_parameters_of_group(f, block, to + parameters_at(f), column, g);
  }
  return sound;
}

template <typename W>
bool pack_numbers(const Packing& a, const uint8_t* row, uint8_t* panel, int64_t column) {
  const W exponent = sizeof(W) == 4 ? W(0x7f800000) : a.type == GgufType::kF16 ? W(0x7c00) : W(0x7f80);
  bool sound = true;
  for (int64_t i = 0; i < a.k; ++i) {
    W value;
    std::memcpy(&value, row + i * sizeof(W), sizeof(W));
    sound &= (value & exponent) != exponent;
    std::memcpy(panel + (i * kPanel + column) * sizeof(W), &value, sizeof(W));
  }
  return sound;
}

bool pack_row(const Packing& a, const uint8_t* row, uint8_t* panel, int64_t column) {
  if (a.layout.inputs == 256) return pack_long_blocks(a, row, panel, column);
  if (a.layout.inputs == 32) return pack_short_blocks(a, row, panel, column);
  if (a.layout.bytes == 4) return pack_numbers<uint32_t>(a, row, panel, column);
  return pack_numbers<uint16_t>(a, row, panel, column);
}

GgufLayout known_layout(int64_t type) {
  const GgufLayout layout = layout_of(static_cast<GgufType>(type));
  TORCH_CHECK(layout.bytes > 0, "pack_gguf: no type ", type);
  return layout;
}

// Rows [n, bytes] of a tensor of GGUF's type `type` and `k` columns, into panels of gguf_format(type).
// Returns whether all scales and numbers are finite.
bool pack_gguf(const at::Tensor& rows, int64_t type, int64_t k, const at::Tensor& out) {
  const GgufLayout layout = known_layout(type);
  TORCH_CHECK(k > 0 && k % layout.inputs == 0, "pack_gguf: ", k, " inputs are no whole blocks");
  TORCH_CHECK(rows.dim() == 2 && rows.scalar_type() == at::kByte && rows.stride(1) == 1 &&
                  rows.size(1) == k / layout.inputs * layout.bytes,
              "pack_gguf: rows must be uint8 [n, ", k / layout.inputs * layout.bytes, "]");
  const int64_t size = panel_bytes(layout.format, k), panels = ceil_div(rows.size(0), kPanel);
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kByte && out.numel() == panels * size,
              "pack_gguf: out must be contiguous uint8 of ", panels * size, " bytes");
  const Packing a{static_cast<GgufType>(type), layout, rows.size(0), k, rows.const_data_ptr<uint8_t>(),
                  rows.stride(0), out.mutable_data_ptr<uint8_t>()};
  std::atomic<bool> sound{true};
  ThreadPool::instance().run([&](int part, int parts) {
    const Range mine = share(panels, part, parts);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      uint8_t* panel = a.out + p * size;
      std::memset(panel, 0, size);
      for (int64_t row = p * kPanel; row < std::min(a.n, (p + 1) * kPanel); ++row) {
        if (!pack_row(a, a.rows + row * a.stride, panel, row % kPanel)) sound = false;
      }
    }
  });
  return sound;
}

int64_t gguf_format(int64_t type) { return static_cast<int64_t>(known_layout(type).format); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(precast, m) {
  m.def("pack_gguf(Tensor rows, int type, int columns, Tensor(a!) out) -> bool");
  m.def("gguf_format(int type) -> int", gguf_format);
}

TORCH_LIBRARY_IMPL(precast, CPU, m) { m.impl("pack_gguf", pack_gguf); }

}  // namespace precast
