// The storage families behind quantize() and dequantize(). Arguments are already checked: the type
// is of the family, buffers have the right size, ranges lie inside the tensor. Not for use outside
// engine/quantize*.cpp.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "engine/dtype.h"
#include "engine/error.h"

namespace nibble::codecs {

void quantize_planes(const TensorType& type, std::span<const float> values,
                     std::span<std::byte> out);
void dequantize_planes(const TensorType& type, const std::byte* data, std::int64_t begin,
                       std::span<float> out);

void quantize_blocks(DType dtype, std::span<const float> values, std::span<std::byte> out);
// Decodes one storage block, info(dtype).block elements.
void dequantize_block(DType dtype, const std::byte* data, float* out);

// The largest magnitude. Magnitudes of floats order like their bits, NaN and infinity last, so one
// integer maximum both finds it and shows whether anything is not finite; that is an Error, which
// counts elements from `begin`.
inline float finite_absmax(std::span<const float> values, std::int64_t begin, DType dtype) {
  constexpr std::uint32_t kInfinity = 0x7f800000u;
  std::uint32_t largest = 0;
  for (const float value : values) {
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest < kInfinity) return std::bit_cast<float>(largest);
  std::size_t i = 0;
  while ((std::bit_cast<std::uint32_t>(values[i]) & 0x7fffffffu) < kInfinity) ++i;
  throw Error("quantize: element " + std::to_string(begin + static_cast<std::int64_t>(i)) +
              " is not finite, " + std::string(name(dtype)) +
              " holds finite values only; check the source of the weights");
}

}  // namespace nibble::codecs
