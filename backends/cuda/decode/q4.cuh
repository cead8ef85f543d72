// ggml Q4_0 and Q4_1: 32 elements with a half d (Q4_1: and a half m), then 16 bytes; the low nibble
// of byte j is element j, the high nibble element j + 16. Values d * (q - 8) and d * q + m.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

struct Q40Decoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes;
    std::uint32_t d;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 2) * 18;
    return {load_bytes8<2>(block + 2 + 8 * (unit & 1)), load_u16(block)};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    scale_codes(nibbles(raw.codes, static_cast<int>(unit & 2) * 2), 8, half_bits_to_float(raw.d),
                out);
  }
};

struct Q41Decoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes;
    std::uint32_t d_and_m;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 2) * 20;
    return {load_bytes8<4>(block + 4 + 8 * (unit & 1)), load_u32(block)};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    scale_and_shift_codes(nibbles(raw.codes, static_cast<int>(unit & 2) * 2),
                          half_bits_to_float(raw.d_and_m & 0xFFFFu),
                          half_bits_to_float(raw.d_and_m >> 16), out);
  }
};

}  // namespace nibble::cuda
