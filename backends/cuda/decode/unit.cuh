// What a storage format's decoder in this folder provides, and pieces that several share.
//
// The work is cut in units of 8 consecutive elements; a decoder is a small value with
//
//   kBf16              every value is exact in bf16
//   Raw                what one unit needs from memory, in registers
//   Raw load(unit)     loads alone, so that a thread can have several units in flight
//   decode(raw, unit, tables, out)   8 floats, the bits of nibble::dequantize
//   Tables             what all threads of a block look up, in shared memory
//
// Plain types and planes, whose rows may have any length, also have one(element, tables). Rows of
// the other formats are whole blocks of 32, so a unit never leaves its row. A tensor's last block
// ends where its memory ends, so loads are no wider than the alignment of the format's fields.
//
// No product and sum may be contracted: __fmul_rn and __fadd_rn stand wherever the order of
// roundings is part of the format.
#pragma once

#include <cuda_fp16.h>

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

inline constexpr int kUnit = 8;

struct NoTables {};
template <int kThreads>
__device__ inline void share_tables(const NoTables&, NoTables&) {}

// Eight bytes.
struct Bytes8 {
  std::uint32_t low, high;
};
__device__ inline std::uint32_t load_u8(const std::uint8_t* at) { return __ldg(at); }
__device__ inline std::uint32_t load_u16(const std::uint8_t* at) {
  return __ldg(reinterpret_cast<const std::uint16_t*>(at));
}
__device__ inline std::uint32_t load_u32(const std::uint8_t* at) {
  return __ldg(reinterpret_cast<const std::uint32_t*>(at));
}
// From an address that is a multiple of kAlignment.
template <int kAlignment>
__device__ inline Bytes8 load_bytes8(const std::uint8_t* at) {
  if constexpr (kAlignment >= 8) {
    const uint2 pair = __ldg(reinterpret_cast<const uint2*>(at));
    return {pair.x, pair.y};
  } else if constexpr (kAlignment == 4) {
    return {load_u32(at), load_u32(at + 4)};
  } else {
    return {load_u16(at) | load_u16(at + 2) << 16, load_u16(at + 4) | load_u16(at + 6) << 16};
  }
}

__device__ inline float half_bits_to_float(std::uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Byte i of `bytes` less `bias`, as a float. The byte becomes the last bits of 2^23, from which
// the difference is exact: two cheap instructions instead of a conversion.
__device__ inline float byte_to_float(std::uint32_t bytes, int i, float bias) {
  const std::uint32_t bits = __byte_perm(bytes, 0x4B000000u, 0x7540u + static_cast<unsigned>(i));
  return __fsub_rn(__uint_as_float(bits), 8388608.0f + bias);
}
__device__ inline float byte_to_float(const Bytes8& bytes, int i, float bias) {
  return byte_to_float(i < 4 ? bytes.low : bytes.high, i % 4, bias);
}

// The low or the high nibbles of eight bytes.
__device__ inline Bytes8 nibbles(const Bytes8& bytes, int shift) {
  return {bytes.low >> shift & 0x0F0F0F0Fu, bytes.high >> shift & 0x0F0F0F0Fu};
}
// Bit i of `bits` becomes bit 4 of byte i.
__device__ inline Bytes8 fifth_bits(std::uint32_t bits) {
  const auto spread = [](std::uint32_t four) {
    return (four & 1) << 4 | (four & 2) << 11 | (four & 4) << 18 | (four & 8) << 25;
  };
  return {spread(bits), spread(bits >> 4)};
}
__device__ inline Bytes8 operator|(const Bytes8& a, const Bytes8& b) {
  return {a.low | b.low, a.high | b.high};
}

// out = scale * (code - bias).
__device__ inline void scale_codes(const Bytes8& codes, float bias, float scale,
                                   float (&out)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) out[i] = __fmul_rn(scale, byte_to_float(codes, i, bias));
}
// out = scale * code + shift, in two roundings.
__device__ inline void scale_and_shift_codes(const Bytes8& codes, float scale, float shift,
                                             float (&out)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    out[i] = __fadd_rn(__fmul_rn(scale, byte_to_float(codes, i, 0)), shift);
  }
}

}  // namespace nibble::cuda
