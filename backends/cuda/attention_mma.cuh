// What the attention kernels on tensor cores share: tiles of BF16 rows in shared memory, how they
// are filled, and the m16n8k16 product that reads them.
//
// A tile is rows of kDim values, 64 or 128. Its 16-byte chunk c of row r lies at chunk c ^ (r % 8)
// of that row, so that the eight rows an ldmatrix phase reads always lie in different banks. Rows
// of a lane differ by multiples of 8 between fragments, thus the address of fragment k along the
// row is `start ^ 32 k` and that of other rows a constant further.
//
// Two accumulators (mma.cuh) side by side, rounded to BF16, are the left operand of the next
// product.
#pragma once

#include "backends/cuda/mma.cuh"

namespace nibble::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

// 2^x to 2 ulp; 0 for -infinity. Results below 2^-126 are flushed to 0: they are weights next to 1.
__device__ inline float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Over the four lanes that share the rows of an accumulator.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// x again, as a value the compiler knows nothing about. The addresses derived from it are then
// computed where they are used, one instruction each, instead of filling registers across a loop.
__device__ inline std::uint32_t unhoisted(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <int kDim>
__device__ inline std::uint32_t tile_offset(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kDim * 2 + ((chunk ^ (row & 7)) << 4));
}
// Where a lane's address for ldmatrix starts. "Rows first": matrices 1 and 3 lie eight rows below 0
// and 2. That gives a left operand from rows, or with transposition a right operand whose k runs
// along rows. "Columns first": matrices 1 and 3 lie eight columns right of 0 and 2. That gives two
// right operands whose n runs along rows, or transposed a left operand whose k does.
template <int kDim>
__device__ inline std::uint32_t rows_first(std::uint32_t tile, int row, int lane) {
  return tile + tile_offset<kDim>(row + (lane & 15), lane >> 4);
}
template <int kDim>
__device__ inline std::uint32_t columns_first(std::uint32_t tile, int row, int lane) {
  return tile + tile_offset<kDim>(row + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}

// Starts copying kRows rows, `stride` elements apart; rows from `valid` on become zeros. `thread`
// may be passed unhoisted.
template <int kDim, int kRows, int kThreads>
__device__ inline void copy_tile(std::uint32_t tile, const bf16* from, std::int64_t stride,
                                 int valid, unsigned thread = threadIdx.x) {
  constexpr int kChunks = kDim / 8, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kStep % 8 == 0 && kRows % kStep == 0);
  const int row = static_cast<int>(thread) / kChunks, chunk = static_cast<int>(thread) % kChunks;
  const std::uint32_t to = tile + tile_offset<kDim>(row, chunk);
  from += row * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    copy_async(to + i * kStep * kDim * 2, from, row + i * kStep < valid);
    from += kStep * stride;
  }
}

}  // namespace nibble::cuda
