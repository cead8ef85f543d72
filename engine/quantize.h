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

#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/dtype.h"

namespace nibble {

extern const float nf4_values[16];
extern const float nf4_thresholds[15];
extern const float fp4_values[16];
extern const float dynamic_map_signed[256];

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
