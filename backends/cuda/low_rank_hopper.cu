// The thin products of an adapter on Hopper (sm_90a): one wide operand W, streamed once, against a
// narrow one R, of 64 kGroups channels a block.
//
//   tokens  acc[r, w] (or [w, r]) += scale * sum_t R[t, r] W[t, w]     both stored across
//   down    u[w, r]  = scale * sum_c R[r, c] W[w, c]                   both stored along
//   up      du[w, r] = scale * sum_n R[n, r] W[w, n]                   R across, W along
//
// A block owns kN rows of the output's wide side and all of the depth, so that nothing is left to
// add up afterwards: no scratch and no second kernel. It computes the transposed product, R's side
// in the rows of wgmma (m64 kN k16): the wide side can then be cut into enough blocks for every
// multiprocessor. The blocks of a cluster read the same R: each copies a part of it, and the copy
// engine delivers that to all of them, so that L2 hardly sees more than W.
//
// A sum over tokens goes in tiles of 512 rows, in order: acc = acc + scale * tile. A thin product
// is one sum, whose order does not depend on the number of rows.
#include "backends/cuda/low_rank_hopper.h"

#include <algorithm>

#include "backends/cuda/hopper.cuh"

namespace nibble::cuda {
namespace {

using namespace hopper;

constexpr int kDepth = 64;  // of a stage

struct Job {
  CUtensorMap wide, narrow;
  std::int64_t width;  // of the wide side
  int rank;
  int steps;       // stages of the whole depth ...
  int tile_steps;  // ... and of a tile of the sum
  float scale;
  bool adds;         // a sum over tokens: out is F32 and is added to; else it is BF16 and set
  bool wide_is_row;  // out is [width, rank]; else [rank, width]
  void* out;
};

template <int kN, int kGroups>
struct Shared {
  static constexpr int kNarrow = kGroups * 64 * kDepth * 2, kWide = kN * kDepth * 2;
  static constexpr int kStage = kNarrow + kWide;
  static constexpr int kStages = std::min(8, 96 * 1024 / kStage);
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kBytes = kBarriers + kStages * 2 * static_cast<int>(sizeof(Barrier)) + 1024;
  static_assert(kBytes <= kSharedBytes);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kN, int kGroups, Stored kWideStored, Stored kNarrowStored>
__device__ inline void produce(const Job& job, unsigned char* stages, Barrier* full, Barrier* empty,
                               int cluster, int rank) {
  using S = Shared<kN, kGroups>;
  const int first = static_cast<int>(blockIdx.x) * kN;
  const int narrow0 = static_cast<int>(blockIdx.y) * kGroups * 64;
  const auto everyone = static_cast<std::uint16_t>((1 << cluster) - 1);
  // Lines of R that this block copies for the cluster; a line is a row of R when stored along, one
  // of the depth when stored across.
  const int lines = (kNarrowStored == along ? kGroups * 64 : kDepth) / cluster;
  for (int step = 0; step < job.steps; ++step) {
    const int stage = step % S::kStages, depth = step * kDepth;
    empty[stage].wait(step / S::kStages % 2 ^ 1);
    unsigned char* const narrow = stages + stage * S::kStage;
    full[stage].arrive_expecting(S::kStage);
    if constexpr (kWideStored == along) {
      load_box(narrow + S::kNarrow, job.wide, depth, first, full[stage]);
    } else {
      load_box(narrow + S::kNarrow, job.wide, first, depth, full[stage]);
    }
    if constexpr (kNarrowStored == along) {
      load_box_everywhere(narrow + rank * lines * kBoxRowBytes, job.narrow, depth,
                          narrow0 + rank * lines, full[stage], everyone);
    } else {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        load_box_everywhere(narrow + (g * kDepth + rank * lines) * kBoxRowBytes, job.narrow,
                            narrow0 + 64 * g, depth + rank * lines, full[stage], everyone);
      }
    }
  }
}

template <int kN, int kGroups, Stored kWideStored, Stored kNarrowStored>
__device__ inline void consume(const Job& job, unsigned char* stages, Barrier* full, Barrier* empty,
                               int cluster) {
  using S = Shared<kN, kGroups>;
  constexpr int kSize = kN / 2, kWideRow = kWideStored == along ? kBoxRowBytes : 2 * kN;
  constexpr std::uint64_t kNarrowSlice = (kNarrowStored == along ? 32 : 16 * kBoxRowBytes) / 16;
  constexpr std::uint64_t kWideSlice = (kWideStored == along ? 32 : 16 * kWideRow) / 16;
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int warp = static_cast<int>(threadIdx.x) / kWarp % 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::uint64_t narrow0 = operand(stages + group * 64 * kDepth * 2);
  const std::uint64_t wide0 = operand<kWideRow>(stages + S::kNarrow);

  // Calls f(i, r, w) for the elements this thread holds.
  const int row = (static_cast<int>(blockIdx.y) * kGroups + group) * 64 + 16 * warp + lane / 4;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kN + lane % 4 * 2;
  const auto for_each = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int r = row + i / 2 % 2 * 8;
      const std::int64_t w = column + i / 4 * 8 + i % 2;
      if (r < job.rank && w < job.width) {
        f(i, job.wide_is_row ? w * job.rank + r : r * job.width + w);
      }
    }
  };
  float total[kSize], d[kSize];
#pragma unroll
  for (float& sum : total) sum = 0;
  if (job.adds) {
    for_each([&](int i, std::int64_t at) { total[i] = static_cast<float*>(job.out)[at]; });
  }

  const auto multiply = [&](int step, int accumulate) {
    const int stage = step % S::kStages;
    full[stage].wait(step / S::kStages % 2);
    const std::uint64_t narrow = narrow0 + static_cast<std::uint64_t>(stage * (S::kStage / 16));
    const std::uint64_t wide = wide0 + static_cast<std::uint64_t>(stage * (S::kStage / 16));
    products_begin();
    product<kNarrowStored, kWideStored>(d, narrow, wide, accumulate);
#pragma unroll
    for (int slice = 1; slice < kDepth / 16; ++slice) {
      product<kNarrowStored, kWideStored>(d, narrow + slice * kNarrowSlice,
                                          wide + slice * kWideSlice, 1);
    }
    products_commit();
  };
  const auto release = [&](int step) {
    if (lane < cluster) empty[step % S::kStages].arrive_at(lane);
  };
  for (int begin = 0; begin < job.steps; begin += job.tile_steps) {
    const int end = min(begin + job.tile_steps, job.steps);
    multiply(begin, 0);
    for (int step = begin + 1; step < end; ++step) {
      multiply(step, 1);
      products_wait<1>();  // the step before this one is done
      release(step - 1);
    }
    products_wait<0>();
    release(end - 1);
    hold(d);
#pragma unroll
    for (int i = 0; i < kSize; ++i) total[i] = fmaf(job.scale, d[i], total[i]);
    hold(d);
  }
  for_each([&](int i, std::int64_t at) {
    if (job.adds) {
      static_cast<float*>(job.out)[at] = total[i];
    } else {
      static_cast<bf16*>(job.out)[at] = from_float<bf16>(total[i]);
    }
  });
}

#endif

template <int kN, int kGroups, Stored kWideStored, Stored kNarrowStored>
__global__ __launch_bounds__((kGroups + 1) *
                             kWarpgroup) void thin_hopper_kernel(const __grid_constant__ Job job,
                                                                 int cluster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shared<kN, kGroups>;
  extern __shared__ unsigned char unaligned[];
  unsigned char* const stages = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  auto* const full = reinterpret_cast<Barrier*>(stages + S::kBarriers);
  Barrier* const empty = full + S::kStages;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      full[i].init(1);
      empty[i].init(kGroups * 4 * cluster);
    }
    fence_barrier_init();
  }
  __syncthreads();
  cluster_sync();
  begin_kernel();
  if (thread >= kGroups * kWarpgroup) {
    if (thread == kGroups * kWarpgroup) {
      produce<kN, kGroups, kWideStored, kNarrowStored>(job, stages, full, empty, cluster,
                                                       cluster_rank());
    }
    __syncwarp();
  } else {
    consume<kN, kGroups, kWideStored, kNarrowStored>(job, stages, full, empty, cluster);
  }
  cluster_sync();  // other blocks may still write here, and arrive at these barriers
#endif
}

// -- Host ----------------------------------------------------------------------------------------

template <int kN, int kGroups, Stored kWideStored, Stored kNarrowStored>
void start(const Job& job, int cluster, const Launch& launch) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(ceil_div(job.width, kN), cluster) * cluster),
                    static_cast<unsigned>(ceil_div(job.rank, 64 * kGroups)));
  start_clusters("thin_hopper", thin_hopper_kernel<kN, kGroups, kWideStored, kNarrowStored>,
                 cluster, blocks, (kGroups + 1) * kWarpgroup, Shared<kN, kGroups>::kBytes, launch,
                 job, cluster);
}

struct Cut {
  int n, groups, cluster;
};

// A sum over tokens wider than the card takes blocks of 64, and then so many of them share R that
// it is worth more to read it once. us on an H100, 8192 tokens, rank 64: [4096] 30.5 with blocks of
// 32 in pairs, 39 with blocks of 64 in eights; [11008] 79 and 69.5, of 69.4 that its bytes take.
Cut choose(std::int64_t width, std::int64_t rank, bool sums_tokens, const Card& card) {
  const bool many = sums_tokens && ceil_div(width, 64) >= card.multiprocessors;
  Cut cut{many ? 64 : 32, rank <= 64 ? 1 : 2, many ? 8 : 2};
  while (cut.cluster > 1 && cut.cluster > ceil_div(width, cut.n)) cut.cluster /= 2;
  return cut;
}

template <Stored kWideStored, Stored kNarrowStored>
void run(Job& job, const void* wide, std::int64_t wide_stride, const void* narrow,
         std::int64_t narrow_stride, std::int64_t depth, const Launch& launch) {
  const Cut s = choose(job.width, job.rank, job.adds, *launch.card);
  job.steps = static_cast<int>(ceil_div(depth, kDepth));
  if constexpr (kWideStored == along) {
    job.wide = strided_map(wide, job.width, depth, wide_stride, s.n, kDepth);
  } else {
    job.wide = strided_map(wide, depth, job.width, wide_stride, kDepth, s.n);
  }
  if constexpr (kNarrowStored == along) {
    job.narrow =
        strided_map(narrow, job.rank, depth, narrow_stride, s.groups * 64 / s.cluster, kDepth);
  } else {
    job.narrow = strided_map(narrow, depth, job.rank, narrow_stride, kDepth / s.cluster, 64);
  }
  const auto start_with = s.n == 32 ? (s.groups == 1 ? start<32, 1, kWideStored, kNarrowStored>
                                                     : start<32, 2, kWideStored, kNarrowStored>)
                                    : (s.groups == 1 ? start<64, 1, kWideStored, kNarrowStored>
                                                     : start<64, 2, kWideStored, kNarrowStored>);
  start_with(job, s.cluster, launch);
}

constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
// A narrower R leaves most of wgmma's 64 rows empty, which costs where they are copied as zeros,
// and a wider one is an ordinary product. (With W's side in those rows and the depth split over a
// cluster, ranks up to 32 take as long as the kernels of low_rank_mma.cuh.)
constexpr std::int64_t kLeastSumRank = 32, kLeastThinRank = 33, kMostRank = 256;

bool can_copy(std::int64_t stride) { return stride % 8 == 0; }  // rows of whole 16 bytes

}  // namespace

bool token_sum_hopper_supports(const TokenSum& p, const Card& card) {
  const std::int64_t rank = std::min(p.left_cols, p.right_cols);
  const std::int64_t width = std::max(p.left_cols, p.right_cols);
  return card.hopper && p.left_dtype == DType::BF16 && p.right_dtype == DType::BF16 &&
         p.drop.p == 0 && can_copy(p.left_pitch()) && can_copy(p.right_cols) &&
         rank >= kLeastSumRank && rank <= kMostRank && p.rows >= 1 && p.rows <= kMost &&
         width <= kMost && (width >= 2048 || p.rows <= 2048);
}

void token_sum_hopper(const TokenSum& p, const Launch& launch) {
  const bool left_is_wide = p.left_cols >= p.right_cols;
  Job job{};
  job.width = left_is_wide ? p.left_cols : p.right_cols;
  job.rank = static_cast<int>(left_is_wide ? p.right_cols : p.left_cols);
  job.tile_steps = kTokenTile / kDepth;
  job.scale = p.scale;
  job.adds = true;
  job.wide_is_row = left_is_wide;
  job.out = p.acc;
  const void *wide = left_is_wide ? p.left : p.right, *narrow = left_is_wide ? p.right : p.left;
  run<across, across>(job, wide, left_is_wide ? p.left_pitch() : p.right_cols, narrow,
                      left_is_wide ? p.right_cols : p.left_pitch(), p.rows, launch);
}

bool thin_hopper_supports(const Thin& p, const Card& card) {
  return card.hopper && p.dtype == DType::BF16 && p.drop.p == 0 && p.m >= 2048 && p.m <= kMost &&
         p.cols >= 1 && p.cols <= kMost && p.rank >= kLeastThinRank && p.rank <= kMostRank &&
         can_copy(p.cols) && (!p.narrow_by_cols || can_copy(p.rank));
}

void thin_hopper(const Thin& p, const Launch& launch) {
  Job job{};
  job.width = p.m;
  job.rank = static_cast<int>(p.rank);
  job.tile_steps = std::numeric_limits<int>::max() / 2;
  job.scale = p.scale;
  job.wide_is_row = true;
  job.out = p.out;
  if (p.narrow_by_cols) {
    run<along, across>(job, p.wide, p.cols, p.narrow, p.rank, p.cols, launch);
  } else {
    run<along, along>(job, p.wide, p.cols, p.narrow, p.cols, p.cols, launch);
  }
}

}  // namespace nibble::cuda
