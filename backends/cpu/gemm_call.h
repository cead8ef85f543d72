// An op call's operands as the matrix products of gemm.h take them.
//
// Only for files compiled once per instruction set.
#pragma once

#include <span>

#include "backends/cpu/gemm.h"
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"

namespace nibble::cpu::NIBBLE_ISA {

// The dtypes (x, y) of multiply() and (dy, x, dw) of accumulate_gradient().
[[gnu::always_inline]] inline bool multiplies(DType x, DType y) {
  return is_computable(x) && is_computable(y) && (x == DType::F64) == (y == DType::F64);
}
[[gnu::always_inline]] inline bool accumulates(DType dy, DType x, DType dw) {
  return multiplies(dy, x) && dw == (x == DType::F64 ? DType::F64 : DType::F32);
}

[[gnu::always_inline]] inline ConstMatrix input_matrix(const OpCall& call, int i) {
  const TensorType& type = call.in_types[static_cast<std::size_t>(i)];
  return {call.input<void>(i), type.dtype, type.shape[1]};
}
[[gnu::always_inline]] inline Matrix output_matrix(const OpCall& call, int i) {
  const TensorType& type = call.out_types[static_cast<std::size_t>(i)];
  return {call.output<void>(i), type.dtype, type.shape[1]};
}
[[gnu::always_inline]] inline StoredMatrix input_weight(const OpCall& call, int i) {
  return stored_matrix(call.in_types[static_cast<std::size_t>(i)], call.input<std::byte>(i));
}

// Products that use the first `bytes` of the call's scratch.
[[gnu::always_inline]] inline GemmContext gemm_context(const OpCall& call, ThreadPool& pool,
                                                       std::int64_t bytes) {
  return {kIsa, pool, {static_cast<std::byte*>(call.scratch), static_cast<std::size_t>(bytes)}};
}

}  // namespace nibble::cpu::NIBBLE_ISA
