// What the attention kernels for any head_dim and dtype share: F32 on ordinary cores.
//
// A block owns kOwned rows, four per warp, and streams tiles of 32 other rows past them. For scores
// a lane stands for one streamed row and computes its dot products with the warp's four rows; for
// weighted sums a lane stands for channels lane, lane + 32, ... and the weights are passed around
// by shuffles. Every number is one chain of multiply-adds whose order depends on the shapes alone,
// and none depends on what other rows the block works on.
//
// Rows lie in shared memory as F32, padded with zeros to an odd number of 16-byte chunks: the
// chunks that lanes read in a dot product then lie in different banks.
#pragma once

#include <type_traits>

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

inline constexpr int kRowsPerWarp = 4, kRowWarps = 4;
inline constexpr int kRowThreads = kRowWarps * kWarp, kOwned = kRowsPerWarp * kRowWarps;
inline constexpr int kStreamed = kWarp;

// Floats from one row to the next in shared memory.
__host__ __device__ constexpr int row_stride(int d) { return ((d + 3) / 4 | 1) * 4; }

// Rows of d values, `stride` elements apart, into shared memory; rows from `valid` on become zeros.
template <class T>
__device__ inline void load_rows(float* to, const T* from, std::int64_t stride, int rows, int valid,
                                 int d) {
  const int width = row_stride(d), warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int r = warp; r < rows; r += kRowWarps) {
    const T* row = from + (r < valid ? r : 0) * stride;
    for (int c = static_cast<int>(threadIdx.x) % kWarp; c < width; c += kWarp) {
      to[r * width + c] = r < valid && c < d ? to_float(row[c]) : 0.0f;
    }
  }
}

// dots[r] = owned row r . other, for the warp's four rows.
__device__ inline void dot_rows(float (&dots)[kRowsPerWarp], const float* owned, const float* other,
                                int d) {
  const int width = row_stride(d);
  for (int r = 0; r < kRowsPerWarp; ++r) dots[r] = 0;
  for (int c = 0; c < d; c += 4) {
    const float4 y = *reinterpret_cast<const float4*>(other + c);
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const float4 x = *reinterpret_cast<const float4*>(owned + r * width + c);
      dots[r] = fmaf(x.x, y.x, dots[r]);
      dots[r] = fmaf(x.y, y.y, dots[r]);
      dots[r] = fmaf(x.z, y.z, dots[r]);
      dots[r] = fmaf(x.w, y.w, dots[r]);
    }
  }
}

// A score from its dot product, and the factor of its gradient (engine/ops/attention.cpp).
struct Score {
  float scale, soft_cap;
  __device__ float of(float dot) const {
    const float x = dot * scale;
    return soft_cap > 0 ? soft_cap * tanhf(x / soft_cap) : x;
  }
  __device__ float slope(float score) const {
    const float part = soft_cap > 0 ? score / soft_cap : 0.0f;
    return 1 - part * part;
  }
};

// sums[r][i] += sum over streamed rows j of weights[r] of lane j * row j [lane + 32 i].
template <int kPasses>
__device__ inline void add_weighted(float (&sums)[kRowsPerWarp][kPasses],
                                    const float (&weights)[kRowsPerWarp], const float* streamed,
                                    int d) {
  const int width = row_stride(d), lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int j = 0; j < kStreamed; ++j) {
    float weight[kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) weight[r] = __shfl_sync(~0u, weights[r], j);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int c = lane + i * kWarp;
      const float x = c < d ? streamed[j * width + c] : 0.0f;
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) sums[r][i] = fmaf(weight[r], x, sums[r][i]);
    }
  }
}

// The softmax of the warp's four rows as far as it has got: the largest score, this lane's part of
// the sum of exponentials, and the weighted values.
template <int kPasses>
struct OnlineSoftmax {
  float largest[kRowsPerWarp], sum[kRowsPerWarp], out[kRowsPerWarp][kPasses];

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      largest[r] = -INFINITY;
      sum[r] = 0;
      for (int i = 0; i < kPasses; ++i) out[r][i] = 0;
    }
  }
  // `scores` of this lane's key, -infinity where it is hidden; v: the values of the 32 keys.
  __device__ void add(float (&scores)[kRowsPerWarp], const float* v, int d) {
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const float most = fmaxf(largest[r], warp_max(scores[r]));
      const float base = most == -INFINITY ? 0.0f : most;
      const float keep = expf(largest[r] - base);
      scores[r] = expf(scores[r] - base);
      largest[r] = most;
      sum[r] = fmaf(sum[r], keep, scores[r]);
      for (int i = 0; i < kPasses; ++i) out[r][i] *= keep;
    }
    add_weighted<kPasses>(out, scores, v, d);
  }
};

// Calls f(std::integral_constant<int, N>) with N * 32 >= d, N of 2, 4 and 8.
template <class F>
void with_passes(std::int64_t d, F&& f) {
  if (d <= 2 * kWarp) {
    f(std::integral_constant<int, 2>{});
  } else if (d <= 4 * kWarp) {
    f(std::integral_constant<int, 4>{});
  } else {
    f(std::integral_constant<int, 8>{});
  }
}

}  // namespace nibble::cuda
