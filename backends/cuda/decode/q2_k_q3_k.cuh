// ggml Q2_K and Q3_K: 256 elements in groups of 16 that share a scale. Element 128h + 32j + 16s + l
// is bits 2j, 2j + 1 of byte 32h + 16s + l and has scale 8h + 2j + s. Values
// (d * scale) * q - dmin * min and (d * (scale - 32)) * q.
//
// Q2_K: scales[16], qs[64], d, dmin. Q3_K: hmask[32], qs[64], scales[12], d.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

// Unit 0 ... 31 of a block of 256: half h, pair of bits j, byte within the 32.
struct PairUnit {
  int half, pair, byte, group;
  __device__ explicit PairUnit(std::int64_t unit)
      : half(static_cast<int>(unit >> 4 & 1)),
        pair(static_cast<int>(unit >> 2 & 3)),
        byte(static_cast<int>(unit & 3) * 8),
        group(static_cast<int>(unit >> 1 & 15)) {}
};

struct Q2KDecoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes;
    std::uint32_t d_and_min, scale;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 5) * 84;
    const PairUnit at(unit);
    return {load_bytes8<4>(block + 16 + 32 * at.half + at.byte), load_u32(block + 80),
            load_u8(block + at.group)};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    const int shift = 2 * PairUnit(unit).pair;
    const float scale =
        __fmul_rn(half_bits_to_float(raw.d_and_min & 0xFFFFu), static_cast<float>(raw.scale & 15));
    const float minimum =
        __fmul_rn(half_bits_to_float(raw.d_and_min >> 16), static_cast<float>(raw.scale >> 4));
    scale_and_shift_codes(
        {raw.codes.low >> shift & 0x03030303u, raw.codes.high >> shift & 0x03030303u}, scale,
        -minimum, out);
  }
};

struct Q3KDecoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes, mask;
    std::uint32_t d, low, high;
  };
  const std::uint8_t* data;

  // The 6-bit scale i of 16: low nibbles in bytes 0-7, pairs of high bits in bytes 8-11.
  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 5) * 110;
    const PairUnit at(unit);
    return {load_bytes8<2>(block + 32 + 32 * at.half + at.byte), load_bytes8<2>(block + at.byte),
            load_u16(block + 108), load_u8(block + 96 + (at.group & 7)),
            load_u8(block + 104 + (at.group & 3))};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    const PairUnit at(unit);
    const int shift = 2 * at.pair, bit = 4 * at.half + at.pair;
    const std::uint32_t low = at.group < 8 ? raw.low & 15 : raw.low >> 4;
    const std::uint32_t high = raw.high >> (2 * (at.group >> 2)) & 3;
    const float scale = __fmul_rn(half_bits_to_float(raw.d),
                                  static_cast<float>(static_cast<int>(low | high << 4) - 32));
    const auto codes = [&](std::uint32_t bytes, std::uint32_t mask) {
      return (bytes >> shift & 0x03030303u) | (mask >> bit & 0x01010101u) << 2;
    };
    scale_codes({codes(raw.codes.low, raw.mask.low), codes(raw.codes.high, raw.mask.high)}, 4,
                scale, out);
  }
};

}  // namespace nibble::cuda
