// BF16 and IEEE half as storage: conversions to and from F32, round to nearest even, NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>

namespace nibble {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(bf16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

inline bf16 to_bf16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = (u >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

// Half to float by rebasing the exponent: the multiplication renormalizes subnormals exactly.
inline float to_float(f16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & 0x0f800000u;
  std::uint32_t bits;
  if (exponent == 0x0f800000u) {
    bits = magnitude | 0x7f800000u;  // infinity or NaN
  } else {
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    bits = std::bit_cast<std::uint32_t>(scaled);
  }
  return std::bit_cast<float>(bits | sign);
}

inline f16 to_f16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);  // NaN, quieted
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds past the largest half
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 places the half's last bit at the float's last bit, rounding once.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace nibble
