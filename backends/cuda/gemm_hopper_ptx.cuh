// Hopper's instructions for the dense product, one thin function each: shared-memory barriers, bulk
// tensor copies, warpgroup products, matrix stores. Names follow the PTX manual's (PTX ISA 8.0 and
// later, chapters "mbarrier", "cp.async.bulk.tensor", "wgmma", "stmatrix"), where the exact rules
// stand. Addresses in shared memory are 32-bit, in the window of the executing block.
//
// Everything here needs sm_90a; include it only where __CUDA_ARCH_FEAT_SM90_ALL is tested.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace nibble::cuda::hopper {

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// -- Clusters and barriers -----------------------------------------------------------------------

__device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster; orders no memory (that would cost a fence).
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.relaxed;\n"
      "barrier.cluster.wait;" ::
          : "memory");
}

__device__ inline void barrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster. Orders nothing but this thread's own
// block (a release at cluster scope costs a fence of 0.7 us): meant for stages that only the tensor
// cores have read, their reads complete.
__device__ inline void barrier_arrive_at(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// -- Bulk tensor copies --------------------------------------------------------------------------

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The box at (inner, outer); elements outside the tensor arrive as zeros. The barrier receives the
// whole box's bytes in any case.
__device__ inline void load_box(std::uint32_t to, const CUtensorMap& map, std::uint32_t barrier,
                                int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(inner), "r"(outer)
      : "memory");
}
// The same to the same place in every block of `mask`, each with its own barrier.
__device__ inline void load_box_multicast(std::uint32_t to, const CUtensorMap& map,
                                          std::uint32_t barrier, int inner, int outer,
                                          std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(inner), "r"(outer), "h"(mask)
      : "memory");
}
// Elements outside the tensor are not written.
__device__ inline void store_box(const CUtensorMap& map, std::uint32_t from, int inner, int outer) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(from), "r"(inner), "r"(outer)
      : "memory");
}
// Until at most kPending of this thread's stores still read shared memory.
template <int kPending>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Before the copy engine reads what this thread stored to shared memory.
__device__ inline void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void store_matrices(std::uint32_t row, std::uint32_t a, std::uint32_t b,
                                      std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// -- Warpgroup products --------------------------------------------------------------------------

template <int kRegisters>
__device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving arithmetic on the accumulators across this line.
template <int kCount>
__device__ inline void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
}

// A matrix in shared memory with 128-byte swizzle, its atoms (8 lines of 128 bytes) 1024 bytes
// apart along the lines. `panel_bytes`: between 64-element panels when the product runs along the
// lines of an operand whose rows are not contiguous in K; else without effect.
__device__ inline std::uint64_t matrix_descriptor(std::uint32_t address,
                                                  std::uint32_t panel_bytes) {
  return (static_cast<std::uint64_t>(address) & 0x3FFFF) >> 4 |
         static_cast<std::uint64_t>(panel_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(1024 >> 4) << 32 | std::uint64_t{1} << 62;
}

// d[64, kN] (+)= a[64, 16] b[16, kN]; kTransposed: b lies N-contiguous. Thread 32 w + l of the
// group holds in d[4 j + 2 h + i] row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + i.
template <int kN, int kTransposed>
__device__ void wgmma(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b, int accumulate);

#define NIBBLE_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define NIBBLE_D16(i) NIBBLE_D4(i), NIBBLE_D4((i) + 4), NIBBLE_D4((i) + 8), NIBBLE_D4((i) + 12)
#define NIBBLE_D32(i) NIBBLE_D16(i), NIBBLE_D16((i) + 16)
#define NIBBLE_R32_0                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NIBBLE_R32_32                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NIBBLE_R32_64                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NIBBLE_R32_96                                                                          \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
// `a`, `b`, `p`, `t` are the operand numbers that follow the accumulators.
#define NIBBLE_WGMMA(n, registers, a, b, p, t, ...)                                             \
  template <>                                                                                   \
  __device__ inline void wgmma<n, 0>(float(&d)[n / 2], std::uint64_t x, std::uint64_t y,        \
                                     int accumulate) {                                          \
    asm volatile("{\n.reg .pred q;\nsetp.ne.b32 q, " p                                          \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, " a \
                 ", " b ", q, 1, 1, 0, " t ";\n}"                                               \
                 : __VA_ARGS__                                                                  \
                 : "l"(x), "l"(y), "r"(accumulate), "n"(0));                                    \
  }                                                                                             \
  template <>                                                                                   \
  __device__ inline void wgmma<n, 1>(float(&d)[n / 2], std::uint64_t x, std::uint64_t y,        \
                                     int accumulate) {                                          \
    asm volatile("{\n.reg .pred q;\nsetp.ne.b32 q, " p                                          \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, " a \
                 ", " b ", q, 1, 1, 0, " t ";\n}"                                               \
                 : __VA_ARGS__                                                                  \
                 : "l"(x), "l"(y), "r"(accumulate), "n"(1));                                    \
  }

NIBBLE_WGMMA(64, NIBBLE_R32_0, "%32", "%33", "%34", "%35", NIBBLE_D32(0))
NIBBLE_WGMMA(128, NIBBLE_R32_0 NIBBLE_R32_32, "%64", "%65", "%66", "%67", NIBBLE_D32(0),
             NIBBLE_D32(32))
NIBBLE_WGMMA(192, NIBBLE_R32_0 NIBBLE_R32_32 NIBBLE_R32_64, "%96", "%97", "%98", "%99",
             NIBBLE_D32(0), NIBBLE_D32(32), NIBBLE_D32(64))
NIBBLE_WGMMA(256, NIBBLE_R32_0 NIBBLE_R32_32 NIBBLE_R32_64 NIBBLE_R32_96, "%128", "%129", "%130",
             "%131", NIBBLE_D32(0), NIBBLE_D32(32), NIBBLE_D32(64), NIBBLE_D32(96))

#undef NIBBLE_WGMMA
#undef NIBBLE_R32_96
#undef NIBBLE_R32_64
#undef NIBBLE_R32_32
#undef NIBBLE_R32_0
#undef NIBBLE_D32
#undef NIBBLE_D16
#undef NIBBLE_D4

}  // namespace nibble::cuda::hopper
