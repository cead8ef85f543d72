// A weight operand as the products want it: the stored bytes when they already have the compute
// dtype, otherwise a dequantized copy in scratch that lives for one op.
#pragma once

#include "backends/cuda/decode.h"

namespace nibble::cuda {

inline std::int64_t element_bytes(DType dtype) { return info(dtype).block_bytes; }

// Bytes of scratch for a copy of `type` in `dtype`; 0 when the stored bytes serve.
inline std::int64_t weight_copy_bytes(const TensorType& type, DType dtype) {
  if (type.dtype == dtype) return 0;
  return round_up(type.elements() * element_bytes(dtype), 256);
}

// Takes its copy from `scratch` and moves it on.
inline const void* dense_weight(const TensorType& type, const void* data, DType dtype,
                                std::byte*& scratch, const Launch& launch) {
  if (type.dtype == dtype) return data;
  std::byte* copy = scratch;
  scratch += weight_copy_bytes(type, dtype);
  dequantize(type, data, dtype, copy, type.shape.cols(), launch);
  return copy;
}

}  // namespace nibble::cuda
