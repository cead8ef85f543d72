// ggml Q5_0 and Q5_1: as Q4_0 and Q4_1, with the fifth bits of the 32 elements in a 32-bit word
// before the nibbles. Values d * (q - 16) and d * q + m.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

struct Q50Decoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes;
    std::uint32_t d, bits;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 2) * 22;
    return {load_bytes8<2>(block + 6 + 8 * (unit & 1)), load_u16(block),
            load_u8(block + 2 + (unit & 3))};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    scale_codes(nibbles(raw.codes, static_cast<int>(unit & 2) * 2) | fifth_bits(raw.bits), 16,
                half_bits_to_float(raw.d), out);
  }
};

struct Q51Decoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes;
    std::uint32_t d_and_m, bits;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 2) * 24;
    return {load_bytes8<8>(block + 8 + 8 * (unit & 1)), load_u32(block),
            load_u8(block + 4 + (unit & 3))};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    scale_and_shift_codes(nibbles(raw.codes, static_cast<int>(unit & 2) * 2) | fifth_bits(raw.bits),
                          half_bits_to_float(raw.d_and_m & 0xFFFFu),
                          half_bits_to_float(raw.d_and_m >> 16), out);
  }
};

}  // namespace nibble::cuda
