// Transposes a square of kFloatLanes x kFloatLanes 32-bit values in registers.
//
// log2(lanes) rounds of a perfect shuffle: each pairs register i with register i + lanes/2 and
// interleaves the two, which rotates the bits of (register, lane) by one. After log2(lanes)
// rotations the register and lane indices have changed places.
#pragma once

#include "backends/cpu/vec.h"

namespace nibble::cpu::NIBBLE_ISA {

[[gnu::always_inline]] inline VecF32 interleave_low(VecF32 a, VecF32 b) {
#if NIBBLE_ISA_LEVEL == 2
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif NIBBLE_ISA_LEVEL == 1
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

[[gnu::always_inline]] inline VecF32 interleave_high(VecF32 a, VecF32 b) {
#if NIBBLE_ISA_LEVEL == 2
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#elif NIBBLE_ISA_LEVEL == 1
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

[[gnu::always_inline]] inline void transpose(VecF32 (&v)[kFloatLanes]) {
#pragma GCC unroll 4
  for (int round = kFloatLanes; round > 1; round /= 2) {
    VecF32 next[kFloatLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kFloatLanes / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + kFloatLanes / 2]);
      next[2 * i + 1] = interleave_high(v[i], v[i + kFloatLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kFloatLanes; ++i) v[i] = next[i];
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
