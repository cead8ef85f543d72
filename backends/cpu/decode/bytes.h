// Codes of 32 elements, one per byte, turned into floats. Intrinsics, because g++ 12 takes the
// bytes of a vector conversion apart one by one (measured: NF4 rows at 1.4 instead of 9 G/s).
#pragma once

#include <cstdint>

#include "backends/cpu/vec.h"

namespace nibble::cpu::NIBBLE_ISA {

#if NIBBLE_ISA_LEVEL > 0

// The first kFloatLanes bytes at p as 32-bit values. (On AVX-512 the maskz form with all lanes on,
// which is the same instruction: the plain one makes g++ 12 warn about its own header.)
[[gnu::always_inline]] inline VecI32 widen_bytes(const std::uint8_t* p) {
#if NIBBLE_ISA_LEVEL == 2
  return reinterpret_cast<VecI32>(
      _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return reinterpret_cast<VecI32>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
}

[[gnu::always_inline]] inline VecI32 widen_bytes(const std::int8_t* p) {
#if NIBBLE_ISA_LEVEL == 2
  return reinterpret_cast<VecI32>(
      _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return reinterpret_cast<VecI32>(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
}

#endif

using Bytes16 = std::uint8_t __attribute__((vector_size(16)));

// The 32 codes of 16 bytes of nibbles: low ones first, then high ones.
struct Nibbles {
  Bytes16 low, high;
};
[[gnu::always_inline]] inline Nibbles split_nibbles(const unsigned char* p) {
  Bytes16 bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return {bytes & 15, bytes >> 4};
}

// Byte i is 16 if bit i of the two bytes at p is set, else 0.
[[gnu::always_inline]] inline Bytes16 fifth_bits(const unsigned char* p) {
  constexpr std::uint64_t kEvery = 0x0101010101010101u;
  const std::uint64_t copies[2] = {p[0] * kEvery, p[1] * kEvery};
  Bytes16 bits;
  __builtin_memcpy(&bits, copies, sizeof bits);
  const Bytes16 mask = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return reinterpret_cast<Bytes16>((bits & mask) != 0) & 16;
}

// out[i] = scale * code[i], i < count, a multiple of 16.
template <class Code>
[[gnu::always_inline]] inline void scale_codes(const Code* code, int count, float scale,
                                               float* out) {
#if NIBBLE_ISA_LEVEL > 0
  for (int i = 0; i < count; i += kFloatLanes) {
    store(out + i, splat(scale) * __builtin_convertvector(widen_bytes(code + i), VecF32));
  }
#else
  for (int i = 0; i < count; ++i) out[i] = scale * static_cast<float>(code[i]);
#endif
}

// out[i] = scale * code[i] + shift, in two roundings.
template <class Code>
[[gnu::always_inline]] inline void scale_codes(const Code* code, int count, float scale,
                                               float shift, float* out) {
#if NIBBLE_ISA_LEVEL > 0
  for (int i = 0; i < count; i += kFloatLanes) {
    const VecF32 product = splat(scale) * __builtin_convertvector(widen_bytes(code + i), VecF32);
    store(out + i, product + splat(shift));
  }
#else
  for (int i = 0; i < count; ++i) out[i] = scale * static_cast<float>(code[i]) + shift;
#endif
}

}  // namespace nibble::cpu::NIBBLE_ISA
