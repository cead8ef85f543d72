// Encoding to and decoding from every storage type, one tensor or part of one at a time, in
// portable scalar code. These functions define the formats; backends have faster decoders that are
// checked against them bit for bit.
//
// NF4 rules (bitsandbytes CUDA, exact): absmax per block of `quant.block` elements of the flattened
// tensor; code = number of thresholds below x * (1/absmax), strict; a block of zeros has code 7
// (value +0). Double quantization: offset = mean of absmax (F64 sum in index order, rounded once),
// absmax - offset in the signed dynamic 8-bit map per 256 blocks, nearest by F32 midpoint, exact
// ties to the even index.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/dtype.h"

namespace nibble {

extern const float nf4_values[16];
extern const float nf4_thresholds[15];
extern const float fp4_values[16];
extern const float dynamic_map_signed[256];
extern const float dynamic_map_unsigned[256];

// The code of x in a dynamic map is the number of thresholds below x, strictly. That is the nearest
// entry by F32 midpoint: a threshold is the midpoint or, where a tie must go up to be even, the
// float before it.
constexpr float dynamic_map_threshold(const float* map, int i) {
  const float midpoint = (map[i + 1] + map[i]) * 0.5f;
  if (i % 2 == 0) return midpoint;
  const auto bits = std::bit_cast<std::uint32_t>(midpoint);
  return std::bit_cast<float>(midpoint > 0 ? bits - 1 : bits + 1);
}
extern const std::array<float, 255> dynamic_thresholds_signed, dynamic_thresholds_unsigned;

// Whether quantize() can produce this type.
bool can_quantize(DType dtype);

// Encodes type.elements() values into `out` (bytes(type) long, kHostPlaneAlignment planes).
// Padding between planes is zeroed. Throws Unsupported when !can_quantize. NaN and infinities in
// the source of a quantized type throw Error naming the element index.
void quantize(const TensorType& type, std::span<const float> values, std::span<std::byte> out);

// Decodes elements [begin, begin + out.size()) of the flattened tensor at `data`. `begin` may be
// any element. Exact per format: one F32 multiply per NF4 value, no other rounding.
void dequantize(const TensorType& type, const std::byte* data, std::int64_t begin,
                std::span<float> out);

}  // namespace nibble
