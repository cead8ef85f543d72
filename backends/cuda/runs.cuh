// Runs: a few consecutive elements, moved by the widest instructions that their size allows, and
// the loop over flat arrays that all elementwise kernels share.
//
// for_each_run() applies a body to `count` elements of arrays that start 16-byte aligned. A body
// says how many elements one run has, what it loads for them, and what it stores:
//
//   struct Body {
//     static constexpr int kWidth;
//     template <int kWidth> struct Loaded;
//     template <int kWidth> __device__ Loaded<kWidth> load(std::int64_t i) const;
//     template <int kWidth> __device__ void store(std::int64_t i, const Loaded<kWidth>&) const;
//   };
//
// A thread takes kRunsPerThread runs, a block's width apart, and loads all of them before it stores
// any, so that several loads are in flight; the last count % kWidth elements are runs of one, by
// threads of the last block. An element belongs to one thread, which reads it before it writes it:
// an output may be the very memory of an input whose elements have its size.
#pragma once

#include <type_traits>

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

constexpr int run_alignment(int bytes) {
  return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2;
}

// What one instruction moves of a run of this many bytes.
template <int kBytes>
using RunWord = std::conditional_t<
    run_alignment(kBytes) == 16, uint4,
    std::conditional_t<run_alignment(kBytes) == 8, uint2,
                       std::conditional_t<run_alignment(kBytes) == 4, unsigned, unsigned short>>>;

template <class T, int kWidth>
struct alignas(run_alignment(sizeof(T) * kWidth)) Run {
  using Word = RunWord<sizeof(T) * kWidth>;
  static constexpr int kWords = sizeof(T) * kWidth / sizeof(Word);
  T values[kWidth];
};

// Addresses must be multiples of the run's alignment.
template <int kWidth, class T>
__device__ inline Run<T, kWidth> load_run(const T* from) {
  using R = Run<T, kWidth>;
  R run;
#pragma unroll
  for (int i = 0; i < R::kWords; ++i) {
    reinterpret_cast<typename R::Word*>(&run)[i] =
        reinterpret_cast<const typename R::Word*>(from)[i];
  }
  return run;
}
template <class T, int kWidth>
__device__ inline void store_run(T* to, const Run<T, kWidth>& run) {
  using R = Run<T, kWidth>;
#pragma unroll
  for (int i = 0; i < R::kWords; ++i) {
    reinterpret_cast<typename R::Word*>(to)[i] = reinterpret_cast<const typename R::Word*>(&run)[i];
  }
}

// Makes the compiler forget what it derived from the run: where a run of BF16 is used on both sides
// of a barrier, it would otherwise keep the elements as floats, in twice the registers.
template <class T, int kWidth>
__device__ inline void forget_derived(Run<T, kWidth>& run) {
  if constexpr (sizeof(run) % sizeof(unsigned) == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(run) / sizeof(unsigned)); ++i) {
      asm volatile("" : "+r"(reinterpret_cast<unsigned*>(&run)[i]));
    }
  }
}

// Elements of T that one instruction moves.
template <class T>
inline constexpr int kPackWidth = 16 / sizeof(T);

inline constexpr int kRunThreads = 256;
inline constexpr int kRunsPerThread = 2;

template <class Body>
__global__ __launch_bounds__(kRunThreads) void for_each_run_kernel(Body body, std::int64_t count) {
  begin_kernel();
  constexpr int kWidth = Body::kWidth;
  const std::int64_t runs = count / kWidth;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * (kRunThreads * kRunsPerThread) + threadIdx.x;
  typename Body::template Loaded<kWidth> loaded[kRunsPerThread];
#pragma unroll
  for (int j = 0; j < kRunsPerThread; ++j) {
    const std::int64_t run = first + j * kRunThreads;
    if (run < runs) loaded[j] = body.template load<kWidth>(run * kWidth);
  }
#pragma unroll
  for (int j = 0; j < kRunsPerThread; ++j) {
    const std::int64_t run = first + j * kRunThreads;
    if (run < runs) body.template store<kWidth>(run * kWidth, loaded[j]);
  }
  if (blockIdx.x + 1 == gridDim.x) {
    const std::int64_t i = runs * kWidth + threadIdx.x;
    if (i < count) body.template store<1>(i, body.template load<1>(i));
  }
}

template <class Body>
void for_each_run(const char* name, const Body& body, std::int64_t count, const Launch& launch) {
  static_assert(Body::kWidth <= kRunThreads);  // the last block's threads cover the rest
  if (count == 0) return;
  const std::int64_t per_block = std::int64_t{kRunThreads} * kRunsPerThread * Body::kWidth;
  start_kernel(name, for_each_run_kernel<Body>, static_cast<unsigned>(ceil_div(count, per_block)),
               kRunThreads, 0, launch, body, count);
}

}  // namespace nibble::cuda
