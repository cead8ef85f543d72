// Rounding of a reference value to what a kernel stores, for ops whose later outputs are computed
// from the stored earlier ones.
#pragma once

#include "engine/dtype.h"
#include "engine/float16.h"

namespace nibble {

inline double rounded_to(DType dtype, double value) {
  switch (dtype) {
    case DType::F32:
      return static_cast<float>(value);
    case DType::BF16:
      return to_float(to_bf16(static_cast<float>(value)));
    case DType::F16:
      return to_float(to_f16(static_cast<float>(value)));
    default:
      return value;
  }
}

}  // namespace nibble
