// Dense products on the tensor cores, and the routes among them.
//
//   weights as [n, k] (forward):    y[m, n] = alpha * sum_k x[m, k] w[n, k]  + low
//   weights as [k, n] (gradient):   y[m, n] = alpha * sum_k x[m, k] w[k, n]  + low
//   low[m, n] = low_scale * keep[m, n] * sum_j u[m, j] b(n, j or j, n)
//
// `low` is an adapter's part: b lies like w, [n, rank] or [rank, n]. It is added in F32 before the
// one rounding. keep is the dropout mask over output channels (only in the gradient), 0 or 1; its
// factor 1/(1-p) is part of low_scale.
#pragma once

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

enum class WeightLayout { n_by_k, k_by_n };

struct Gemm {
  WeightLayout layout = WeightLayout::n_by_k;
  DType dtype = DType::BF16;  // of x, w, u and b: BF16 or F32
  std::int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;  // rows `x_stride` elements apart
  std::int64_t x_stride = 0;
  const void* w = nullptr;
  std::int64_t w_stride = 0;
  float alpha = 1;
  // The adapter's part; rank 0: none.
  std::int64_t rank = 0;
  const void* u = nullptr;  // [m, rank], contiguous
  const void* b = nullptr;  // [n, rank] or [rank, n], contiguous
  float low_scale = 1;
  DropoutArgs keep;
  // The result, BF16 or F32, rows `y_stride` elements apart.
  void* y = nullptr;
  DType y_dtype = DType::BF16;
  std::int64_t y_stride = 0;
};

// product.cu: the fastest route for the shape. `scratch` is product_scratch_bytes() long, 256-byte
// aligned, and depends on shapes, dtypes, strides and the card alone, not on the addresses.
std::int64_t product_scratch_bytes(const Gemm& gemm, const Card& card);
void product(const Gemm& gemm, void* scratch, const Launch& launch);

// gemm_hopper.cu: wgmma and bulk tensor copies, sm_90a only. Needs dtype BF16, 16-byte
// aligned bases, and strides and rank that are multiples of 8 elements.
bool gemm_hopper_supports(const Gemm& gemm, const Card& card);
void gemm_hopper(const Gemm& gemm, const Launch& launch);

}  // namespace nibble::cuda
