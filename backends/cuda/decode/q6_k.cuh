// ggml Q6_K: 256 elements in groups of 16 that share a signed 8-bit scale. Part p of 32 elements
// (half n = p / 4, quarter c = p % 4): low bits are nibble c / 2 of ql[64n + 32(c % 2) + l], high
// bits are bits 2c, 2c + 1 of qh[32n + l]. Value (d * scale) * (q - 32).
//
// ql[128], qh[64], scales[16], d.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

struct Q6KDecoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 low, high;
    std::uint32_t d, scale;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 5) * 210;
    const int half = static_cast<int>(unit >> 4 & 1), quarter = static_cast<int>(unit >> 2 & 3);
    const int byte = static_cast<int>(unit & 3) * 8;
    return {load_bytes8<2>(block + 64 * half + 32 * (quarter & 1) + byte),
            load_bytes8<2>(block + 128 + 32 * half + byte), load_u16(block + 208),
            load_u8(block + 192 + (unit >> 1 & 15))};
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    const int quarter = static_cast<int>(unit >> 2 & 3);
    const int low_shift = 4 * (quarter >> 1), high_shift = 2 * quarter;
    const float scale = __fmul_rn(half_bits_to_float(raw.d),
                                  static_cast<float>(static_cast<std::int8_t>(raw.scale)));
    const auto codes = [&](std::uint32_t low, std::uint32_t high) {
      return (low >> low_shift & 0x0F0F0F0Fu) | (high >> high_shift & 0x03030303u) << 4;
    };
    scale_codes({codes(raw.low.low, raw.high.low), codes(raw.low.high, raw.high.high)}, 32, scale,
                out);
  }
};

}  // namespace nibble::cuda
