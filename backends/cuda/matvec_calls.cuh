// What both kernels of matvec.cu take: up to four products of the same rows.
#pragma once

#include "backends/cuda/decode.h"
#include "backends/cuda/decode/decoders.cuh"

namespace nibble::cuda::matvec_kernels {

constexpr int kMaxCalls = 4;
constexpr int kMaxRows = 8;  // of x
constexpr int kSector = 32;  // bytes that memory delivers at once

// A value as the products of a graph of T see it.
template <class T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

// The adapter's part, and where results go.
struct Result {
  std::int64_t outputs;
  float scale, low_scale;
  std::int64_t rank;
  const void* u;
  const void* b;
  void* y;
  bool b_is_bf16, y_is_bf16;

  // As the products of a graph of T see it.
  template <class T>
  __device__ float b_value(std::int64_t at) const {
    return b_is_bf16 ? to_float(static_cast<const bf16*>(b)[at])
                     : rounded<T>(static_cast<const float*>(b)[at]);
  }
  __device__ void store(int token, std::int64_t row, float sum, float low) const {
    float value = __fmul_rn(scale, sum);
    if (rank > 0) value = fmaf(low_scale, low, value);
    const std::int64_t at = token * outputs + row;
    if (y_is_bf16) {
      static_cast<bf16*>(y)[at] = from_float<bf16>(value);
    } else {
      static_cast<float*>(y)[at] = value;
    }
  }
};

// sum_j u[token, j] b[row, j] for each token, by a warp; the sums are in every lane.
template <class T, int kTokens>
__device__ inline void low_rank(const Result& result, std::int64_t row, int m, int lane,
                                float (&sums)[kTokens]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = 0;
  if (result.rank == 0) return;
  const auto* u = static_cast<const T*>(result.u);
#pragma unroll 1
  for (std::int64_t j = lane; j < result.rank; j += kWarp) {
    const float b = result.b_value<T>(row * result.rank + j);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < m) sums[t] = fmaf(to_float(u[t * result.rank + j]), b, sums[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t < m) sums[t] = warp_sum(sums[t]);
  }
}

// Calls of one kernel; call c has the tiles (or blocks) from first[c] on, and calls that are not
// there begin past the last tile.
template <class Decoder>
struct Calls {
  struct Call {
    Decoder decoder;
    Result result;
  };
  // What every thread reads first comes first: it is one line of the constant cache.
  int count;
  int m;
  int first[kMaxCalls + 1];
  std::int64_t cols;
  const void* x;
  Call calls[kMaxCalls];

  __device__ int call_of(int tile) const {
    int c = 0;
#pragma unroll
    for (int i = 1; i < kMaxCalls; ++i) c += tile >= first[i] ? 1 : 0;
    return c;
  }
};

}  // namespace nibble::cuda::matvec_kernels
