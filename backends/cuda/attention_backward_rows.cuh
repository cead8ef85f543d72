// dq, dk and dv of attention for any head_dim and dtype, in F32 on ordinary cores
// (attention_rows.cuh), and the arguments that all kernels of attention_backward.cu share.
//
// Two sweeps, so that every sum belongs to one warp and has one order: over queries for dq, with k
// and v streamed past 16 queries of a head, and over keys for dk and dv, with q and dy streamed
// past 16 keys of a key-value head, head by head of its group. Scores are computed in both.
#pragma once

#include "backends/cuda/attention.h"
#include "backends/cuda/attention_rows.cuh"

namespace nibble::cuda {

struct AttentionGradient {
  const void *q, *k, *v, *o;
  const float* lse;
  const void* dy;
  const std::int32_t* span_begin;
  void *dq, *dk, *dv;
  int rows, heads, kv_heads, head_dim;
  float scale, soft_cap;
  // Scratch. Rows are padded to whole tiles of queries; padding has D = 0, a probability of 0 and
  // sees no key.
  int padded_rows;
  float* sums;           // D, [heads, padded_rows]
  float* lse_base2;      // lse / ln 2, the same; the rest is null off the tensor cores
  std::int32_t* begins;  // span_begin, [padded_rows]
  std::int32_t* turns;   // [heads, padded_rows / kQueries]
  std::int32_t* ticket;  // [1]
  float* dq_sums;        // [heads, padded_rows, head_dim], in the order of registers
};

__device__ inline int first_key(const AttentionGradient& a, int t) {
  return t < a.rows ? min(max(a.span_begin[t], 0), t) : t;
}

template <int kRows, int kColumns>
__device__ inline void clear(float (&c)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    for (int e = 0; e < kColumns; ++e) c[i][e] = 0;
  }
}

// dq of 16 queries: k and v are streamed. Only the widest rows need more registers than the
// compiler grants of its own accord.
template <class T, int kPasses>
__global__ void __launch_bounds__(kRowThreads, kPasses == 8 ? 1 : 0)
    differentiate_queries(const AttentionGradient a) {
  begin_kernel();
  extern __shared__ __align__(16) float floats[];
  const int d = a.head_dim, width = row_stride(d);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int tiles = (a.rows + kOwned - 1) / kOwned;
  const int t0 = (tiles - 1 - static_cast<int>(blockIdx.x) / a.heads) * kOwned;
  const int head = static_cast<int>(blockIdx.x) % a.heads;
  const int end = min(t0 + kOwned, a.rows), row = t0 + warp * kRowsPerWarp;
  float *q = floats, *dy = q + kOwned * width, *k = dy + kOwned * width, *v = k + kStreamed * width;

  const std::int64_t stride = static_cast<std::int64_t>(a.heads) * d;
  const std::int64_t kv_stride = static_cast<std::int64_t>(a.kv_heads) * d;
  const std::int64_t at = t0 * stride + static_cast<std::int64_t>(head) * d;
  const std::int64_t kv_at = static_cast<std::int64_t>(head / (a.heads / a.kv_heads)) * d;
  load_rows(q, static_cast<const T*>(a.q) + at, stride, kOwned, end - t0, d);
  load_rows(dy, static_cast<const T*>(a.dy) + at, stride, kOwned, end - t0, d);
  int begin[kRowsPerWarp];
  float lse[kRowsPerWarp], sum[kRowsPerWarp], dq[kRowsPerWarp][kPasses];
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const std::int64_t t = min(row + r, a.rows - 1);
    begin[r] = first_key(a, row + r);
    lse[r] = a.lse[t * a.heads + head];
    sum[r] = a.sums[static_cast<std::int64_t>(head) * a.padded_rows + t];
  }
  const Score score{a.scale, a.soft_cap};
  clear(dq);
  for (int j = first_key(a, t0); j < end; j += kStreamed) {
    __syncthreads();
    load_rows(k, static_cast<const T*>(a.k) + kv_at + j * kv_stride, kv_stride, kStreamed, end - j,
              d);
    load_rows(v, static_cast<const T*>(a.v) + kv_at + j * kv_stride, kv_stride, kStreamed, end - j,
              d);
    __syncthreads();
    float s[kRowsPerWarp], dp[kRowsPerWarp];
    dot_rows(s, q + warp * kRowsPerWarp * width, k + lane * width, d);
    dot_rows(dp, dy + warp * kRowsPerWarp * width, v + lane * width, d);
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const bool sees = j + lane >= begin[r] && j + lane <= row + r;
      s[r] = score.of(s[r]);
      dp[r] = sees ? expf(s[r] - lse[r]) * (dp[r] - sum[r]) * score.slope(s[r]) : 0.0f;
    }
    add_weighted<kPasses>(dq, dp, k, d);
  }
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (row + r >= end) continue;
    T* to = static_cast<T*>(a.dq) + (row + r) * stride + static_cast<std::int64_t>(head) * d;
    for (int i = 0; i < kPasses; ++i) {
      if (const int c = lane + i * kWarp; c < d) to[c] = from_float<T>(dq[r][i] * a.scale);
    }
  }
}

// dk and dv of 16 keys: q and dy are streamed, head by head.
template <class T, int kPasses>
__global__ void __launch_bounds__(kRowThreads, kPasses == 8 ? 1 : 0)
    differentiate_keys(const AttentionGradient a) {
  begin_kernel();
  extern __shared__ __align__(16) float floats[];
  const int d = a.head_dim, width = row_stride(d);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int j0 = static_cast<int>(blockIdx.x) / a.kv_heads * kOwned;
  const int kv_head = static_cast<int>(blockIdx.x) % a.kv_heads, group = a.heads / a.kv_heads;
  const int end = min(j0 + kOwned, a.rows), key = j0 + warp * kRowsPerWarp;
  float *k = floats, *v = k + kOwned * width, *q = v + kOwned * width, *dy = q + kStreamed * width;

  const std::int64_t stride = static_cast<std::int64_t>(a.heads) * d;
  const std::int64_t kv_stride = static_cast<std::int64_t>(a.kv_heads) * d;
  const std::int64_t kv_at = j0 * kv_stride + static_cast<std::int64_t>(kv_head) * d;
  load_rows(k, static_cast<const T*>(a.k) + kv_at, kv_stride, kOwned, end - j0, d);
  load_rows(v, static_cast<const T*>(a.v) + kv_at, kv_stride, kOwned, end - j0, d);
  float dk[kRowsPerWarp][kPasses], dv[kRowsPerWarp][kPasses];
  const Score score{a.scale, a.soft_cap};
  clear(dk);
  clear(dv);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    // Spans do not fall: past the first row that begins behind these keys nobody sees them.
    for (int t0 = j0; t0 < a.rows && first_key(a, t0) < end; t0 += kStreamed) {
      __syncthreads();
      const std::int64_t at = t0 * stride + static_cast<std::int64_t>(head) * d;
      load_rows(q, static_cast<const T*>(a.q) + at, stride, kStreamed, a.rows - t0, d);
      load_rows(dy, static_cast<const T*>(a.dy) + at, stride, kStreamed, a.rows - t0, d);
      __syncthreads();
      const int t = t0 + lane, begin = first_key(a, t);
      const std::int64_t in_range = min(t, a.rows - 1);
      const float lse = a.lse[in_range * a.heads + head];
      const float sum = a.sums[static_cast<std::int64_t>(head) * a.padded_rows + in_range];
      float s[kRowsPerWarp], dp[kRowsPerWarp];
      dot_rows(s, k + warp * kRowsPerWarp * width, q + lane * width, d);
      dot_rows(dp, v + warp * kRowsPerWarp * width, dy + lane * width, d);
      for (int r = 0; r < kRowsPerWarp; ++r) {
        const bool sees = t < a.rows && key + r >= begin && key + r <= t;
        const float value = score.of(s[r]);
        s[r] = sees ? expf(value - lse) : 0.0f;
        dp[r] = s[r] * (dp[r] - sum) * score.slope(value);
      }
      add_weighted<kPasses>(dv, s, dy, d);
      add_weighted<kPasses>(dk, dp, q, d);
    }
  }
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (key + r >= end) continue;
    const std::int64_t to = (key + r) * kv_stride + static_cast<std::int64_t>(kv_head) * d;
    for (int i = 0; i < kPasses; ++i) {
      const int c = lane + i * kWarp;
      if (c >= d) continue;
      static_cast<T*>(a.dk)[to + c] = from_float<T>(dk[r][i] * a.scale);
      static_cast<T*>(a.dv)[to + c] = from_float<T>(dv[r][i]);
    }
  }
}

constexpr int row_bytes(int d) {
  return 2 * (kOwned + kStreamed) * row_stride(d) * static_cast<int>(sizeof(float));
}
static_assert(row_bytes(kMaxHeadDim) <= kSharedLimit);

template <class T, int kPasses>
void launch_rows(const AttentionGradient& a, const Launch& launch) {
  const auto start = [&](auto kernel, std::int64_t blocks) {
    start_kernel("attention_backward", kernel, static_cast<unsigned>(blocks), kRowThreads,
                 static_cast<std::size_t>(row_bytes(a.head_dim)), launch, a);
  };
  start(differentiate_queries<T, kPasses>, ceil_div(a.rows, kOwned) * a.heads);
  start(differentiate_keys<T, kPasses>, ceil_div(a.rows, kOwned) * a.kv_heads);
}

}  // namespace nibble::cuda
