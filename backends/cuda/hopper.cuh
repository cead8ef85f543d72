// The Hopper (sm_90a) instructions that products and attention are built from, one thin function
// each: clusters, mbarriers, tensor copies (TMA), named barriers, warpgroup products (wgmma).
//
// Tiles in shared memory are made of boxes: up to 256 rows of 64 BF16 numbers (128 bytes), written
// by one tensor copy with the 128-byte swizzle: 16-byte piece c of row r lies at piece c ^ (r % 8).
// Boxes start at multiples of 1024 bytes. A matrix operand in such boxes is either
//   rows x depth, depth contiguous ("along"): 16 deep is 32 bytes further inside a row, or
//   depth x rows, rows contiguous ("across"): 16 deep is 16 rows, 2048 bytes, further down.
// Accumulators of a warpgroup (64 rows, n columns): thread t of the 128 holds, in register
// 4 g + 2 h + e, row 16 (t / 32) + (t % 32) / 4 + 8 h and column 8 g + 2 (t % 4) + e.
//
// A product runs asynchronously: between its start and the wait for its group, its registers must
// not be touched; hold() keeps the compiler from moving uses of them over the wait.
//
// Source: PTX ISA, sections mbarrier, cp.async.bulk.tensor, wgmma (matrix descriptor format).
#pragma once

#include <cuda.h>

#include "backends/cuda/common.cuh"

namespace nibble::cuda::hopper {

inline constexpr int kBoxColumns = 64;
inline constexpr int kBoxRowBytes = 128;
inline constexpr int kWarpgroup = 128;
// What a block of a Hopper card may use.
inline constexpr int kSharedBytes = 227 * 1024;

// -- Host ----------------------------------------------------------------------------------------

// The tensor map of a row-major BF16 matrix [rows, columns] whose rows are `stride` elements apart,
// a multiple of 8, read or written in boxes of box_rows x box_columns (16, 32 or 64, swizzled over
// the 32, 64 or 128 bytes of their rows). What a box has beyond the matrix reads as zero and is not
// written.
inline CUtensorMap strided_map(const void* address, std::int64_t rows, std::int64_t columns,
                               std::int64_t stride, int box_rows, int box_columns) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      check(cudaErrorNotSupported, "cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(entry);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(stride) * sizeof(bf16)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(address), sizes, pitch,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) check(cudaErrorInvalidValue, "cuTensorMapEncodeTiled");
  return map;
}
// Of a contiguous matrix, in boxes of box_rows x 64.
inline CUtensorMap tensor_map(const void* address, std::int64_t rows, std::int64_t columns,
                              int box_rows) {
  return strided_map(address, rows, columns, columns, box_rows, kBoxColumns);
}

// -- Addresses and barriers ----------------------------------------------------------------------

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster; orders no memory (that would cost a fence).
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// An mbarrier counts arrivals and bytes of tensor copies, and flips its phase when both are
// complete. By its shared address:
__device__ inline void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// Arrives, and lets the phase wait for so many bytes more.
__device__ inline void barrier_arrive_expecting(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster. Orders nothing but this thread's own
// block (a release at cluster scope costs a fence of 0.7 us): meant for stages that only the tensor
// cores have read, their reads complete.
__device__ inline void barrier_arrive_at(std::uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Until the phase of this parity has completed; a fresh barrier counts as having completed 1.
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// The same as an object in shared memory.
struct Barrier {
  std::uint64_t state;

  __device__ void init(int arrivals) { barrier_init(shared_address(this), arrivals); }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  __device__ void arrive_at(int rank) { barrier_arrive_at(shared_address(this), rank); }
  __device__ void arrive_expecting(int bytes) {
    barrier_arrive_expecting(shared_address(this), bytes);
  }
  __device__ void wait(int parity) {
    barrier_wait(shared_address(this), static_cast<std::uint32_t>(parity));
  }
};
// Makes initialized barriers visible to the cluster and to tensor copies.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Orders ordinary accesses of shared and global memory before those of copies and products.
__device__ inline void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Of shared memory alone.
__device__ inline void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers 1 to 15; `threads` counts those that arrive and those that wait.
__device__ inline void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers a thread, moved from a loading warpgroup to computing ones. A block starts with an even
// share of the multiprocessor's for every thread, and growing waits until there are enough: a block
// that asks for more than it started with never goes on.
constexpr bool registers_fit(int consumers, int producer_count, int consumer_count) {
  const int start = 65536 / ((consumers + 1) * kWarpgroup) / 8 * 8;
  return producer_count + consumers * consumer_count <= (consumers + 1) * start;
}
template <int kCount>
__device__ inline void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// -- Copies --------------------------------------------------------------------------------------

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// One box with its first number at (row, column) of the matrix, to a shared address; reports its
// bytes to the barrier `full`.
__device__ inline void load_box(std::uint32_t to, const CUtensorMap& map, int column, int row,
                                std::uint32_t full) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(full)
      : "memory");
}
// The same to the same place in every block of `mask`, each of which reports to its own `full`.
__device__ inline void load_box_everywhere(std::uint32_t to, const CUtensorMap& map, int column,
                                           int row, std::uint32_t full, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(full), "h"(mask)
      : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap& map, int column, int row,
                                Barrier& full) {
  load_box(shared_address(to), map, column, row, shared_address(&full));
}
__device__ inline void load_box_everywhere(void* to, const CUtensorMap& map, int column, int row,
                                           Barrier& full, std::uint16_t mask) {
  load_box_everywhere(shared_address(to), map, column, row, shared_address(&full), mask);
}
__device__ inline void store_box(const CUtensorMap& map, int column, int row, std::uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}
__device__ inline void store_box(const CUtensorMap& map, int column, int row, const void* from) {
  store_box(map, column, row, shared_address(from));
}
// Contiguous bytes, a multiple of 16.
__device__ inline void load_bytes(void* to, const void* from, int bytes, Barrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&full))
      : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the shared memory of all but the latest kPending groups of this thread's stores may be
// written again ...
template <int kPending = 0>
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... and until all are visible.
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices; lane l gives the shared address of row l % 8 of matrix l / 8.
__device__ inline void store_matrices(std::uint32_t row, std::uint32_t a, std::uint32_t b,
                                      std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// Accumulator columns [16 g, 16 g + 16) of a warp's 16 rows as BF16 into a box: `words` holds
// registers 8 g to 8 g + 7 rounded in pairs; `box` is the box's start, `row` the warp's first.
__device__ inline void store_fragment(void* box, int row, int column,
                                      const std::uint32_t (&words)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int r = row + lane % 16, piece = column / 8 + lane / 16;
  store_matrices(
      shared_address(box) + static_cast<std::uint32_t>(r * kBoxRowBytes + ((piece ^ (r % 8)) * 16)),
      words[0], words[1], words[2], words[3]);
}
// Two numbers as BF16, the first in the lower half.
__device__ inline std::uint32_t pack_pair(float low, float high) {
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -- Products ------------------------------------------------------------------------------------

// The descriptor of an operand in boxes at a shared address. box_bytes: from one box to the next 64
// rows of an operand stored across; unused otherwise. kRowBytes: of a box, which is less than 128
// where it is narrower. Adding bytes / 16 moves it.
template <int kRowBytes = kBoxRowBytes>
__device__ inline std::uint64_t operand(std::uint32_t address, int box_bytes = 16) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
  constexpr std::uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  return static_cast<std::uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<std::uint64_t>(box_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(8 * kRowBytes >> 4) << 32 | kSwizzle << 62;
}

template <int kRowBytes = kBoxRowBytes>
__device__ inline std::uint64_t operand(const void* p, int box_bytes = 16) {
  return operand<kRowBytes>(shared_address(p), box_bytes);
}

enum Stored : int { along = 0, across = 1 };

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the latest groups are still running.
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kSize>
__device__ inline void hold(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSize>
__device__ inline void hold(std::uint32_t (&d)[kSize][4]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
  }
}

// clang-format off
#define NIBBLE_D8(d, i)                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),           \
  "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define NIBBLE_D16(d, i) NIBBLE_D8(d, i), NIBBLE_D8(d, i + 8)
#define NIBBLE_D32(d, i) NIBBLE_D16(d, i), NIBBLE_D16(d, i + 16)
#define NIBBLE_D64(d, i) NIBBLE_D32(d, i), NIBBLE_D32(d, i + 32)
#define NIBBLE_D96(d, i) NIBBLE_D64(d, i), NIBBLE_D32(d, i + 64)
#define NIBBLE_D128(d, i) NIBBLE_D64(d, i), NIBBLE_D64(d, i + 64)
#define NIBBLE_R8 "{%0,%1,%2,%3,%4,%5,%6,%7"
#define NIBBLE_R16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NIBBLE_R32 NIBBLE_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NIBBLE_R64 NIBBLE_R32 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NIBBLE_R96 NIBBLE_R64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NIBBLE_R128 NIBBLE_R96 \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define NIBBLE_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 "
#define NIBBLE_SS(n, regs, a, b, p, ta, tb)                                             \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n" NIBBLE_WGMMA(n) regs "}, " a ", " b    \
  ", p, 1, 1, " ta ", " tb ";\n}"
#define NIBBLE_RS(n, regs, a, b, p, tb)                                                 \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n" NIBBLE_WGMMA(n) regs "}, {" a "}, " b  \
  ", p, 1, 1, " tb ";\n}"
// clang-format on

// d (+)= a b^T, 16 deep: 64 rows of a, 2 kSize of b, both in shared memory. accumulate = 0: d is
// set.
template <Stored kA, Stored kB, int kSize>
__device__ inline void product(float (&d)[kSize], std::uint64_t a, std::uint64_t b,
                               int accumulate) {
  static_assert(kSize == 8 || kSize == 16 || kSize == 32 || kSize == 64 || kSize == 96 ||
                kSize == 128);
  if constexpr (kSize == 8) {
    asm volatile(NIBBLE_SS("16", NIBBLE_R8, "%8", "%9", "%10", "%11", "%12")
                 : NIBBLE_D8(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int{kA}), "n"(int{kB}));
  } else if constexpr (kSize == 16) {
    asm volatile(NIBBLE_SS("32", NIBBLE_R16, "%16", "%17", "%18", "%19", "%20")
                 : NIBBLE_D16(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int{kA}), "n"(int{kB}));
  } else if constexpr (kSize == 32) {
    asm volatile(NIBBLE_SS("64", NIBBLE_R32, "%32", "%33", "%34", "%35", "%36")
                 : NIBBLE_D32(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int{kA}), "n"(int{kB}));
  } else if constexpr (kSize == 64) {
    asm volatile(NIBBLE_SS("128", NIBBLE_R64, "%64", "%65", "%66", "%67", "%68")
                 : NIBBLE_D64(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int{kA}), "n"(int{kB}));
  } else if constexpr (kSize == 96) {
    asm volatile(NIBBLE_SS("192", NIBBLE_R96, "%96", "%97", "%98", "%99", "%100")
                 : NIBBLE_D96(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int{kA}), "n"(int{kB}));
  } else {
    asm volatile(NIBBLE_SS("256", NIBBLE_R128, "%128", "%129", "%130", "%131", "%132")
                 : NIBBLE_D128(d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int{kA}), "n"(int{kB}));
  }
}
// The same with a in registers, in the order of accumulators rounded in pairs.
template <Stored kB, int kSize>
__device__ inline void product(float (&d)[kSize], const std::uint32_t (&a)[4], std::uint64_t b,
                               int accumulate) {
  static_assert(kSize == 32 || kSize == 64);
  if constexpr (kSize == 32) {
    asm volatile(NIBBLE_RS("64", NIBBLE_R32, "%32, %33, %34, %35", "%36", "%37", "%38")
                 : NIBBLE_D32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),
                   "n"(int{kB}));
  } else {
    asm volatile(NIBBLE_RS("128", NIBBLE_R64, "%64, %65, %66, %67", "%68", "%69", "%70")
                 : NIBBLE_D64(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),
                   "n"(int{kB}));
  }
}

#undef NIBBLE_D8
#undef NIBBLE_D16
#undef NIBBLE_D32
#undef NIBBLE_D64
#undef NIBBLE_D96
#undef NIBBLE_D128
#undef NIBBLE_R8
#undef NIBBLE_R16
#undef NIBBLE_R32
#undef NIBBLE_R64
#undef NIBBLE_R96
#undef NIBBLE_R128
#undef NIBBLE_WGMMA
#undef NIBBLE_SS
#undef NIBBLE_RS

// Registers 8 g to 8 g + 7 rounded in pairs: one operand of depth 16.
template <int kSize>
__device__ inline void round_fragments(const float (&d)[kSize],
                                       std::uint32_t (&words)[kSize / 8][4]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) words[i / 4][i % 4] = pack_pair(d[2 * i], d[2 * i + 1]);
}

}  // namespace nibble::cuda::hopper
