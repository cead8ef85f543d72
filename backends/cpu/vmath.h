// exp, and sine with cosine, of whole vectors, for softmax, SiLU and rotary positions. The scalar
// forms give the bits of a vector lane, so that the tail of a loop agrees with its body.
//
//   exp: n = round(x / ln 2), r = x - n ln 2 (in two parts, Cody & Waite), then a polynomial of
//        degree 6 on |r| <= ln(2)/2 and a multiplication by 2^n in two steps, so that results
//        below the normal range round once and large ones become infinite.
//   sin, cos: n = round(x / (pi/2)), r = x - n pi/2 in F64, polynomials on |r| <= pi/4 in F32.
//
// Errors measured on every 37th float (exp) and on angles up to 1e7: at most 1.01 ulp for exp,
// 8e-8 absolute for sin and cos. exp(NaN) is NaN. F64 calls the C library lane by lane: that mode
// is the oracle, not the fast path.
// So do both forms of tanh, which is exact where exp would lose x to 1.
//
// Coefficients after the Cephes library (S. Moshier, expf.c, sinf.c).
#pragma once

#include <cmath>

#include "backends/cpu/vec.h"

namespace nibble::cpu::NIBBLE_ISA {

// a where the mask's lane is all ones, b where it is zero.
[[gnu::always_inline]] inline VecF32 select(VecI32 mask, VecF32 a, VecF32 b) {
  const VecU32 m = reinterpret_cast<VecU32>(mask);
  return from_bits((m & bits_of(a)) | (~m & bits_of(b)));
}

// Comparisons with NaN are false: a NaN in the second argument passes through.
[[gnu::always_inline]] inline VecF32 max(VecF32 a, VecF32 b) { return select(a > b, a, b); }
[[gnu::always_inline]] inline VecF32 min(VecF32 a, VecF32 b) { return select(a < b, a, b); }

[[gnu::always_inline]] inline VecF32 exp(VecF32 x) {
  const VecF32 round = splat(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const VecF32 clamped = min(splat(89.0f), max(splat(-104.0f), x));
  const VecF32 shifted = clamped * 1.44269504088896341f + round;
  const VecF32 n = shifted - round;
  VecF32 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  VecF32 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  // 2^n as 2^(n/2) * 2^(n - n/2). The biased exponents are built without sign: 150 + n >= 0.
  const VecU32 biased = bits_of(shifted) - 0x4b400000u + 150u;
  const VecU32 half = biased >> 1;
  const VecF32 a = from_bits((half + (127u - 75u)) << 23);
  const VecF32 b = from_bits((biased - half + (127u - 75u)) << 23);
  return p * a * b;
}

[[gnu::always_inline]] inline VecF64 exp(VecF64 x) {
  for (int i = 0; i < kDoubleLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class Vector>
[[gnu::always_inline]] inline Vector tanh(Vector x) {
  for (std::size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = std::tanh(x[i]);
  return x;
}

[[gnu::always_inline]] inline float exp(float x) { return exp(splat(x))[0]; }
[[gnu::always_inline]] inline double exp(double x) { return std::exp(x); }

// Branch-free, so that a loop over angles vectorizes. |angle| < 2^40.
[[gnu::always_inline]] inline void sin_cos(double angle, float& sine, float& cosine) {
  const double round = 0x1.8p52;
  const double shifted = angle * 0.636619772367581343 + round;
  const double n = shifted - round;
  const auto quadrant = __builtin_bit_cast(std::uint64_t, shifted);
  const auto r = static_cast<float>(angle - n * 1.57079632679489662);
  const float z = r * r;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const bool swap = (quadrant & 1) != 0;
  sine = (swap ? c : s) * ((quadrant & 2) != 0 ? -1.0f : 1.0f);
  cosine = (swap ? s : c) * (((quadrant + 1) & 2) != 0 ? -1.0f : 1.0f);
}
[[gnu::always_inline]] inline void sin_cos(double angle, double& sine, double& cosine) {
  sine = std::sin(angle);
  cosine = std::cos(angle);
}

}  // namespace nibble::cpu::NIBBLE_ISA
