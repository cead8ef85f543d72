// The three products of a linear layer, from dense or quantized weights.
//
//   y[T, N]   = sum over terms of alpha * x[T, K] * W[N, K]^T    multiply, WeightUse::Transposed
//   dx[T, K]  = sum over terms of alpha * dy[T, N] * W[N, K]     multiply, WeightUse::Plain
//   dW[N, K] += alpha * dy[T, N]^T * x[T, K]                     accumulate_gradient
//
// A second term is how LoRA rides along: y = x W^T + s u B^T is one call with one rounding.
// Accumulation is in F32, or F64 when the activations are F64. alpha is multiplied into the
// activations (x, dy). A weight is decoded panel by panel into scratch, once per call.
//
// The order of summation is fixed: in multiply, each output is one chain of multiply-adds over k
// = 0, 1, ... through the terms in order, starting from zero (from y when accumulating), rounded
// once at the end when y is BF16. So a row's bits do not depend on T, the row's place, blocking or
// threads. In accumulate_gradient each 512 rows of T are one chain from zero, added to dW in order:
// splitting T at multiples of 512 changes nothing. Bits do differ between instruction sets.
//
// Blocking after Goto & van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "backends/cpu/decode.h"
#include "backends/cpu/isa.h"
#include "backends/cpu/thread_pool.h"
#include "engine/dtype.h"

namespace nibble::cpu {

inline constexpr std::int64_t kGradientTile = 512;  // rows of T summed before touching dW

// Row-major F32, BF16 or F64 with rows `stride` elements apart.
struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::F32;
  std::int64_t stride = 0;
};
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::F32;
  std::int64_t stride = 0;
};

// Where a product runs. `scratch` is aligned to 64 bytes and at least as long as the matching
// *_scratch_bytes; its contents do not matter before or after.
struct GemmContext {
  Isa isa;
  ThreadPool& pool;
  std::span<std::byte> scratch;
};

enum class WeightUse { Transposed, Plain };
enum class Output { Overwrite, Accumulate };  // Accumulate: y is F32 or F64

// alpha * x * W^T or alpha * x * W. `weight` may be a part of a tensor's rows: see row_range.
struct Term {
  ConstMatrix x;
  StoredMatrix weight;
  double alpha = 1;
};

// One or two terms whose activations have the same dtype, over `rows` rows of x and y. The number
// of columns of y is weight.rows (Transposed) or weight.cols (Plain), the same for all terms.
// Dtypes (x, y): (F32 or BF16, F32 or BF16), (F64, F64); others throw Unsupported.
void multiply(const GemmContext& context, WeightUse use, std::int64_t rows,
              std::span<const Term> terms, Matrix y, Output output = Output::Overwrite);

// Scratch of multiply for at most `rows` rows, `outputs` columns of y and reductions of at most `inner`
// elements over all terms together. The same for every instruction set and thread
// count.
std::int64_t multiply_scratch_bytes(DType x, DType y, std::int64_t rows, std::int64_t outputs,
                                    std::int64_t inner);

// dw[n, k] += alpha * sum over t of dy[t, n] * x[t, k], for t < rows. dw is F32 (F64 when dy and x
// are F64). dy and x may differ (F32, BF16).
void accumulate_gradient(const GemmContext& context, std::int64_t rows, std::int64_t n,
                         std::int64_t k, ConstMatrix dy, ConstMatrix x, double alpha, Matrix dw);
std::int64_t gradient_scratch_bytes(DType dw, std::int64_t rows, std::int64_t n, std::int64_t k);

}  // namespace nibble::cpu
