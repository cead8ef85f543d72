// What device code of several kernels shares: element types, 16-byte packs, sums over warps and
// blocks, Philox. Everything is computed in F32 and rounded once, to nearest even, when stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backends/cuda/kernel.h"
#include "backends/cuda/launch.cuh"

namespace nibble::cuda {

using bf16 = __nv_bfloat16;

inline constexpr int kWarp = 32;
// What a block may use on every card from sm_80 on but A100 and H100 (sm_86, sm_89, sm_120).
inline constexpr int kSharedLimit = 99 * 1024;

__host__ __device__ inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// The address of shared memory as its instructions take it.
__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(double x) { return static_cast<float>(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes of T: one load or store instruction. Addresses must be multiples of 16.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};
template <class T>
__device__ inline Pack<T> load_pack(const T* from) {
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(from);
  return pack;
}
template <class T>
__device__ inline void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
__device__ inline double warp_sum(double x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}

// The sum over a block of kThreads threads, in every thread; a fixed order. May be called again
// right away.
template <int kThreads, class T>
__device__ inline T block_sum(T x) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  __shared__ T sums[kThreads / kWarp];
  x = warp_sum(x);
  if constexpr (kThreads == kWarp) return x;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) total += sums[i];
  return total;
}
template <int kThreads>
__device__ inline float block_max(float x) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  __shared__ float most[kThreads / kWarp];
  x = warp_max(x);
  if constexpr (kThreads == kWarp) return x;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) most[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = most[0];
  for (int i = 1; i < kThreads / kWarp; ++i) total = fmaxf(total, most[i]);
  return total;
}

// Philox4x32-10, as engine/philox.h.
__device__ inline uint4 philox(std::uint64_t key, uint4 c) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const std::uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// An adapter's dropout (engine/dropout.h), with its numbers read on the device: `rng` is
// {seed, step}. p = 0: keeps everything, and rng and ordinal are null.
struct DropoutArgs {
  const std::int64_t* rng = nullptr;
  const std::int32_t* ordinal = nullptr;
  std::uint32_t adapter = 0;
  float p = 0;
  // The smallest word >> 8 that is kept; host side, dropout_threshold(p).
  std::uint32_t threshold = 0;
};
// The smallest t with (t + 0.5) * 2^-24 >= p in F32: uniform() never falls as its word grows.
inline std::uint32_t dropout_threshold(float p) {
  std::uint32_t low = 0, high = 1u << 24;
  while (low < high) {
    const std::uint32_t middle = (low + high) / 2;
    if ((static_cast<float>(middle) + 0.5f) * 0x1p-24f >= p) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}
// The dropout of a lora op: inputs `first` (rng) and `first + 1` (ordinal) when p > 0.
inline DropoutArgs dropout_of(const OpCall& call, int first) {
  const auto params = call.node->get<LoraParams>();
  if (params.dropout == 0) return {};
  return {call.input<std::int64_t>(first), call.input<std::int32_t>(first + 1),
          static_cast<std::uint32_t>(params.adapter), params.dropout,
          dropout_threshold(params.dropout)};
}
// The four words of channels [4 group, 4 group + 4) of a token; channel c is kept when word
// c % 4 >> 8 reaches the threshold.
__device__ inline uint4 dropout_words(std::int64_t seed, std::int64_t step, std::uint32_t adapter,
                                      std::int32_t ordinal, std::uint32_t group) {
  return philox(static_cast<std::uint64_t>(seed),
                make_uint4(static_cast<std::uint32_t>(step), adapter,
                           static_cast<std::uint32_t>(ordinal), group));
}

// Calls f(T{}) with the element type of `dtype`: float or bf16.
template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::BF16) {
    f(bf16{});
  } else {
    f(float{});
  }
}
inline bool is_computable(DType dtype) { return dtype == DType::F32 || dtype == DType::BF16; }

}  // namespace nibble::cuda
