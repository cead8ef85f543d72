// The vector of the instruction set that the including file is being compiled for (isa.h): 16, 32
// or 64 bytes of float or double, as a compiler vector type, so that + - * and comparisons are
// written as usual. Works with g++ and clang++.
//
// Everything is in namespace nibble::cpu::NIBBLE_ISA. Loads and stores need no alignment.
#pragma once

#include <cstdint>

#if NIBBLE_ISA_LEVEL > 0
#include <immintrin.h>
#endif

#include "engine/float16.h"

namespace nibble::cpu::NIBBLE_ISA {

#if NIBBLE_ISA_LEVEL == 2
inline constexpr int kVectorBytes = 64;
#elif NIBBLE_ISA_LEVEL == 1
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

inline constexpr int kFloatLanes = kVectorBytes / 4;
inline constexpr int kDoubleLanes = kVectorBytes / 8;

typedef float VecF32 __attribute__((vector_size(kVectorBytes)));
typedef double VecF64 __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));  // kFloatLanes long

// The vector and lane count that go with an element type.
template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Vec = VecF32;
  static constexpr int lanes = kFloatLanes;
};
template <>
struct Simd<double> {
  using Vec = VecF64;
  static constexpr int lanes = kDoubleLanes;
};

template <class T>
[[gnu::always_inline]] inline typename Simd<T>::Vec load(const T* p) {
  typename Simd<T>::Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
[[gnu::always_inline]] inline void store(float* p, VecF32 v) { __builtin_memcpy(p, &v, sizeof v); }
[[gnu::always_inline]] inline void store(double* p, VecF64 v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T>
[[gnu::always_inline]] inline typename Simd<T>::Vec splat(T x) {
  return x - typename Simd<T>::Vec{};
}

[[gnu::always_inline]] inline VecU32 bits_of(VecF32 v) { return reinterpret_cast<VecU32>(v); }
[[gnu::always_inline]] inline VecF32 from_bits(VecU32 v) { return reinterpret_cast<VecF32>(v); }

// a * b + c with one rounding where the set has the instruction (avx2, avx512), two on portable.
[[gnu::always_inline]] inline VecF32 fma(VecF32 a, VecF32 b, VecF32 c) {
#if NIBBLE_ISA_LEVEL == 2
  return _mm512_fmadd_ps(a, b, c);
#elif NIBBLE_ISA_LEVEL == 1
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
[[gnu::always_inline]] inline VecF64 fma(VecF64 a, VecF64 b, VecF64 c) {
#if NIBBLE_ISA_LEVEL == 2
  return _mm512_fmadd_pd(a, b, c);
#elif NIBBLE_ISA_LEVEL == 1
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// kFloatLanes BF16 values as floats.
[[gnu::always_inline]] inline VecF32 load(const bf16* p) {
  VecU16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return from_bits(__builtin_convertvector(v, VecU32) << 16);
}

// kFloatLanes floats as BF16: to nearest even, NaN stays NaN; the bits of to_bf16.
[[gnu::always_inline]] inline void store(bf16* p, VecF32 x) {
  const VecU32 u = bits_of(x);
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU32 quiet_nan = (u >> 16) | 0x40u;
  const VecU32 is_nan = reinterpret_cast<VecU32>((u & 0x7fffffffu) > 0x7f800000u);
  const VecU32 chosen = (is_nan & quiet_nan) | (~is_nan & rounded);
  const VecU16 narrow = __builtin_convertvector(chosen, VecU16);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

// Sum of the lanes in a fixed order: halves are added until one lane remains.
template <class T>
[[gnu::always_inline]] inline T sum_lanes(typename Simd<T>::Vec v) {
  T lane[Simd<T>::lanes];
  store(lane, v);
  for (int half = Simd<T>::lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

}  // namespace nibble::cpu::NIBBLE_ISA
