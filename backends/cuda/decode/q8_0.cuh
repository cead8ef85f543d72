// ggml Q8_0: 32 elements in 34 bytes: a half d, then signed bytes q. Value d * q.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

struct Q80Decoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    Bytes8 codes;
    std::uint32_t d;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 2) * 34;
    return {load_bytes8<2>(block + 2 + 8 * (unit & 3)), load_u16(block)};
  }
  __device__ void decode(const Raw& raw, std::int64_t, const NoTables&, float (&out)[kUnit]) const {
    // Flipping the sign bit adds 128.
    scale_codes({raw.codes.low ^ 0x80808080u, raw.codes.high ^ 0x80808080u}, 128,
                half_bits_to_float(raw.d), out);
  }
};

}  // namespace nibble::cuda
