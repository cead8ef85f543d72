// What the attention kernels on tensor cores share: tiles of BF16 rows in shared memory, how they
// are filled, and the m16n8k16 product that reads them.
//
// A tile is rows of kDim values, 64 or 128. Its 16-byte chunk c of row r lies at chunk c ^ (r % 8)
// of that row, so that the eight rows an ldmatrix phase reads always lie in different banks. Rows
// of a lane differ by multiples of 8 between fragments, thus the address of fragment k along the
// row is `start ^ 32 k` and that of other rows a constant further.
//
// Fragments (PTX ISA, mma.m16n8k16): with g = lane / 4 and p = lane % 4, an accumulator holds
// rows g and g + 8, columns 2p and 2p + 1. Two accumulators side by side, rounded to BF16, are the
// left operand of the next product.
#pragma once

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, or zeros; then nothing is read from `from`.
__device__ inline void copy_async(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_word(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread's copies are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// d += a b: a 16x16, b 16x8 as two registers.
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                           std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
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
