// ggml Q4_K and Q5_K: 256 elements in 8 parts of 32, each with a 6-bit scale and minimum packed in
// 12 bytes. Parts 2c and 2c + 1 are the low and high nibbles of bytes 32c ... 32c + 31; Q5_K's
// fifth bit of element l of a part is bit `part` of qh[l]. Value (d * scale) * q - dmin * min.
//
// d, dmin, scales[12], then qs[128]; Q5_K has qh[32] before qs.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

template <bool kFive>
struct Q4KDecoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = false;
  static constexpr int kBytes = kFive ? 176 : 144;
  struct Raw {
    Bytes8 codes, high;
    uint4 head;
  };
  const std::uint8_t* data;

  __device__ Raw load(std::int64_t unit) const {
    const std::uint8_t* block = data + (unit >> 5) * kBytes;
    const int part = static_cast<int>(unit >> 2 & 7), byte = static_cast<int>(unit & 3) * 8;
    Raw raw{load_bytes8<8>(block + (kFive ? 48 : 16) + 32 * (part / 2) + byte),
            {},
            __ldg(reinterpret_cast<const uint4*>(block))};
    if constexpr (kFive) raw.high = load_bytes8<8>(block + 16 + byte);
    return raw;
  }
  __device__ void decode(const Raw& raw, std::int64_t unit, const NoTables&,
                         float (&out)[kUnit]) const {
    const int part = static_cast<int>(unit >> 2 & 7);
    // Words a, b, c of scales: parts 0-3 have their scale in a and their minimum in b; parts 4-7
    // the low nibbles of both in c and two high bits in a and b.
    const int at = 8 * (part & 3);
    const std::uint32_t a = raw.head.y >> at & 255, b = raw.head.z >> at & 255,
                        c = raw.head.w >> at & 255;
    const std::uint32_t six_bit_scale = part < 4 ? a & 63 : (c & 15) | (a >> 6) << 4;
    const std::uint32_t six_bit_minimum = part < 4 ? b & 63 : c >> 4 | (b >> 6) << 4;
    const float scale =
        __fmul_rn(half_bits_to_float(raw.head.x & 0xFFFFu), static_cast<float>(six_bit_scale));
    const float minimum =
        __fmul_rn(half_bits_to_float(raw.head.x >> 16), static_cast<float>(six_bit_minimum));
    Bytes8 codes = nibbles(raw.codes, 4 * (part & 1));
    if constexpr (kFive) {
      codes = codes | Bytes8{(raw.high.low >> part & 0x01010101u) << 4,
                             (raw.high.high >> part & 0x01010101u) << 4};
    }
    scale_and_shift_codes(codes, scale, -minimum, out);
  }
};

}  // namespace nibble::cuda
