// The dense BF16 product on Hopper's tensor cores (sm_90a), with an adapter's part fused in.
//
//   y[m, n] = alpha * sum_k x[m, k] W + low_scale * keep * (u b)      accumulated in F32
//
// One block per multiprocessor walks over tiles of 128 x N outputs. A producer warp copies steps of
// 64 K-columns into a ring of shared-memory stages (bulk tensor copies, 128-byte swizzle); two
// consumer warpgroups, 64 rows each, multiply them (wgmma, m64nNk16) into registers, round, and
// send their rows through shared memory to y while the producer already fills the stages of the
// next tile. Two blocks that work on the same columns form a cluster: each copies half of W's step
// and the copy engine delivers it to both.
//
// The adapter's part goes first through the same ring, as steps of 64 rank-columns of u and b; the
// accumulators are then scaled (and masked), and the main sum continues on top. The copy engine
// fills with zeros what lies beyond rank, k, m or n, and drops what would be stored outside.
// With dropout, the consumers draw the mask of their next tile, a bit per output in a few
// registers, between issuing a step's products and waiting for them.
//
// W as [n, k] has its K contiguous in a stage, W as [k, n] its N: panels of 64 columns by 64 K-rows
// that wgmma reads through its transpose bit.
//
// A row's sum runs in K order in one thread, whatever the other rows are: with the same N of a tile
// its value depends neither on m nor on the grid. N is chosen from the shape and the number of
// multiprocessors alone.
#include <cuda.h>

#include <algorithm>
#include <limits>
#include <string>

#include "backends/cuda/gemm.h"
#include "backends/cuda/gemm_hopper_mask.cuh"
#include "backends/cuda/hopper.cuh"

namespace nibble::cuda {
namespace {

using namespace hopper;

constexpr int kTileM = 128, kTileK = 64;
constexpr int kConsumers = 2;  // warpgroups, 64 rows each
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kThreads = 128 * kConsumers + 128;

enum class Low { plain, dropout };

// Bytes of a block's shared memory, in the order in which they lie.
template <int kN>
struct Shared {
  static constexpr int kStageA = kTileM * kTileK * 2, kStageB = kN * kTileK * 2;
  static constexpr int kStages = kN == 256 ? 4 : kN == 192 ? 5 : kN == 128 ? 6 : 8;
  // A warp stages 16 rows by 64 columns of y at a time.
  static constexpr int kSlab = 16 * 128;
  static constexpr int kSlabs = kN == 192 ? 1 : 2;

  static constexpr int kB = kStages * kStageA;
  static constexpr int kY = kB + kStages * kStageB;
  static constexpr int kBarriers = kY + kConsumerWarps * kSlabs * kSlab;
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
  static constexpr int kAllocated = kBytes + 1024;  // the base is rounded up to 1024
  static_assert(kAllocated <= 227 * 1024);
};

struct Problem {
  CUtensorMap x, w, u, b, y;
  int rank;
  int k_steps, low_steps;
  // Tiles are numbered along groups of `group` cluster rows, down the rows first, so that the
  // blocks at work share rows of x and columns of W in L2.
  int cluster_rows, tiles_n, tiles, group;
  float alpha, low_scale;
  // The result without a map: F32, or BF16 rows that are no multiple of 16 bytes.
  std::int64_t m, n;
  void* y_address;
  std::int64_t y_stride;
  bool y_f32, y_map;
  DropoutArgs keep;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of the 168 a thread starts with: producers give theirs to the accumulators.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

struct Place {
  int cluster_row, column;
};
__device__ inline Place place_of(const Problem& p, int tile) {
  const int per_group = p.group * p.tiles_n;
  const int group = tile / per_group, within = tile - group * per_group;
  const int rows = min(p.group, p.cluster_rows - group * p.group);
  return {group * p.group + within % rows, within / rows};
}

// A position in a ring of kCount barriers and the parity of its current round.
template <int kCount>
struct Ring {
  int index = 0;
  std::uint32_t parity = 0;
  __device__ void advance() {
    if (++index == kCount) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The barriers' addresses.
template <int kN>
struct Barriers {
  std::uint32_t base;
  __device__ std::uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ std::uint32_t empty(int stage) const {
    return base + 8 * (Shared<kN>::kStages + stage);
  }
};

// Copies one step of both operands into the stage at `a` and `b`. In a cluster of two each block
// sends its half of the right operand to both; alone it takes both halves.
template <int kN, WeightLayout kLayout>
__device__ inline void load_step(std::uint32_t a, std::uint32_t b, std::uint32_t full,
                                 const CUtensorMap& left, const CUtensorMap& right, int row,
                                 int column, int k, int cluster, int rank) {
  load_box(a, left, k, row, full);
  const int first = cluster == 2 ? rank : 0, last = cluster == 2 ? rank : 1;
  for (int half = first; half <= last; ++half) {
    if constexpr (kLayout == WeightLayout::n_by_k) {
      const std::uint32_t to = b + half * (kN / 2 * 128);
      if (cluster == 2) {
        load_box_everywhere(to, right, k, column + half * (kN / 2), full, 3);
      } else {
        load_box(to, right, k, column + half * (kN / 2), full);
      }
    } else {
#pragma unroll
      for (int panel = 0; panel < kN / 64; ++panel) {
        const std::uint32_t to = b + panel * (kTileK * 128) + half * (kTileK / 2 * 128);
        const int outer = k + half * (kTileK / 2);
        if (cluster == 2) {
          load_box_everywhere(to, right, column + 64 * panel, outer, full, 3);
        } else {
          load_box(to, right, column + 64 * panel, outer, full);
        }
      }
    }
  }
}

// A thread's share of 64 x kN outputs, straight to memory: two neighbours per store where they
// are aligned.
template <int kN, class T>
__device__ inline void store_plain(const Problem& p, const float (&d)[kN / 2], std::int64_t row0,
                                   std::int64_t column0, int lane) {
  const bool pairs = p.y_stride % 2 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t row = row0 + lane / 4 + 8 * half;
    if (row >= p.m) continue;
    T* const y = static_cast<T*>(p.y_address) + row * p.y_stride;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const std::int64_t column = column0 + 8 * j + 2 * (lane % 4);
      const float low = d[4 * j + 2 * half], high = d[4 * j + 2 * half + 1];
      if (pairs && column + 1 < p.n) {
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<float2*>(y + column) = make_float2(low, high);
        } else {
          *reinterpret_cast<__nv_bfloat162*>(y + column) = __floats2bfloat162_rn(low, high);
        }
      } else {
        if (column < p.n) y[column] = from_float<T>(low);
        if (column + 1 < p.n) y[column + 1] = from_float<T>(high);
      }
    }
  }
}

template <int kN, WeightLayout kLayout>
__device__ inline void produce(const Problem& p, std::uint32_t base, int cluster, int rank) {
  using S = Shared<kN>;
  const Barriers<kN> barriers{base + S::kBarriers};
  Ring<S::kStages> ring;
  for (int tile = blockIdx.x / cluster; tile < p.tiles; tile += gridDim.x / cluster) {
    const Place place = place_of(p, tile);
    const int row = (place.cluster_row * cluster + rank) * kTileM, column = place.column * kN;
    for (int step = -p.low_steps; step < p.k_steps; ++step) {
      barrier_wait(barriers.empty(ring.index), ring.parity ^ 1);
      const std::uint32_t full = barriers.full(ring.index);
      barrier_arrive_expecting(full, S::kStageA + S::kStageB);
      const std::uint32_t a = base + ring.index * S::kStageA;
      const std::uint32_t b = base + S::kB + ring.index * S::kStageB;
      if (step < 0) {
        load_step<kN, kLayout>(a, b, full, p.u, p.b, row, column, (step + p.low_steps) * kTileK,
                               cluster, rank);
      } else {
        load_step<kN, kLayout>(a, b, full, p.x, p.w, row, column, step * kTileK, cluster, rank);
      }
      ring.advance();
    }
  }
}

template <int kN, WeightLayout kLayout, Low kLow>
__device__ inline void consume(const Problem& p, std::uint32_t base, int cluster, int rank) {
  using S = Shared<kN>;
  constexpr Stored kStored = kLayout == WeightLayout::k_by_n ? across : along;
  // From one 16-wide K slice of an operand to the next, in the descriptor's unit of 16 bytes.
  constexpr std::uint64_t kSliceA = 32 / 16, kSliceB = kStored == across ? 16 * 128 / 16 : 32 / 16;
  const Barriers<kN> barriers{base + S::kBarriers};
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::uint64_t first_a = operand(base + warp / 4 * (64 * 128));
  const std::uint64_t first_b = operand(base + S::kB, kTileK * 128);
  const std::uint32_t slabs = base + S::kY + warp * (S::kSlabs * S::kSlab);
  int slab = 0;

  float d[kN / 2];
  Ring<S::kStages> ring;
  // Every warp tells both blocks of its cluster: each writes into the other's stages.
  const auto release = [&](int stage) {
    if (lane < cluster) barrier_arrive_at(barriers.empty(stage), lane);
  };

  const auto multiply = [&](int accumulate) {
    const std::uint64_t a = first_a + ring.index * (S::kStageA / 16);
    const std::uint64_t b = first_b + ring.index * (S::kStageB / 16);
    products_begin();
    product<along, kStored>(d, a, b, accumulate);
#pragma unroll
    for (int slice = 1; slice < kTileK / 16; ++slice) {
      product<along, kStored>(d, a + slice * kSliceA, b + slice * kSliceB, 1);
    }
    products_commit();
  };

  const auto first_row = [&](const Place& place) {  // of the warp
    return static_cast<std::int64_t>(place.cluster_row * cluster + rank) * kTileM + 16 * warp;
  };
  const int first_tile = blockIdx.x / cluster, tile_stride = gridDim.x / cluster;
  [[maybe_unused]] MaskOf<kN, kLow == Low::dropout> mask(p.keep, p.m, lane);
  // Draws are spread over the steps, and the two warpgroups take turns, so that one can multiply
  // while the other draws. Measured on an H100 this hides little: a 4096^3 product with rank 16
  // takes 2 % more than without an adapter, with dropout 13 % (4 % when nothing is drawn).
  [[maybe_unused]] const int steps = max(1, p.k_steps - 1);
  [[maybe_unused]] const int period = max(1, steps / (kN / 32));
  [[maybe_unused]] const int draws = (kN / 32 + steps - 1) / steps;
  if constexpr (kLow == Low::dropout) {
    const Place place = place_of(p, first_tile);
    mask.begin(first_row(place), place.column * kN);
    mask.finish();
  }

  for (int tile = first_tile; tile < p.tiles; tile += tile_stride) {
    const Place place = place_of(p, tile);
    const std::int64_t row0 = first_row(place);
    const int column0 = place.column * kN;

    int accumulate = 0;
    [[maybe_unused]] int until_draw = 1 + warp / 4 * (period / 2);
    for (int step = 0; step < p.low_steps; ++step) {
      barrier_wait(barriers.full(ring.index), ring.parity);
      const std::uint64_t a = first_a + ring.index * (S::kStageA / 16);
      const std::uint64_t b = first_b + ring.index * (S::kStageB / 16);
      const int slices = min(4, (p.rank - step * kTileK + 15) / 16);
      // One at a time: a run-time number of products in flight makes ptxas serialize the kernel's
      // other products too.
      for (int slice = 0; slice < slices; ++slice) {
        products_begin();
        product<along, kStored>(d, a + slice * kSliceA, b + slice * kSliceB, accumulate);
        products_commit();
        products_wait<0>();
        accumulate = 1;
      }
      release(ring.index);
      ring.advance();
    }
    if (p.low_steps > 0) {
      hold(d);
      if constexpr (kLow == Low::dropout) {
        mask.apply(d, p.low_scale);
        if (tile + tile_stride < p.tiles) {
          const Place next = place_of(p, tile + tile_stride);
          mask.begin(first_row(next), next.column * kN);
        }
      } else if (p.low_scale != 1) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] *= p.low_scale;
      }
      hold(d);
    }

    barrier_wait(barriers.full(ring.index), ring.parity);
    multiply(accumulate);
    ring.advance();
    for (int step = 1; step < p.k_steps; ++step) {
      barrier_wait(barriers.full(ring.index), ring.parity);
      multiply(1);
      if constexpr (kLow == Low::dropout) {
        if (--until_draw == 0) {
          for (int i = 0; i < draws; ++i) mask.draw_four();
          until_draw = period;
        }
      }
      // The step before this one is done: its stage may be filled again.
      products_wait<1>();
      release(ring.index == 0 ? S::kStages - 1 : ring.index - 1);
      ring.advance();
    }
    if constexpr (kLow == Low::dropout) mask.finish();
    products_wait<0>();
    release(ring.index == 0 ? S::kStages - 1 : ring.index - 1);
    hold(d);

    if (p.alpha != 1) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) d[i] *= p.alpha;
    }
    if (p.y_map) {
      // 64 columns at a time; a row of a slab is 128 bytes, its 16-byte chunks swizzled as the
      // map says. Lanes 8 i ... 8 i + 7 give the rows of the i-th 8 x 8 matrix.
      const int matrix_row = lane % 16, chunk = lane / 16;
#pragma unroll
      for (int part = 0; part < kN / 64; ++part) {
        const std::uint32_t to = slabs + slab * S::kSlab;
        if (lane == 0) wait_stores_read<S::kSlabs - 1>();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const v = d + part * 32 + i * 8;
          store_matrices(to + matrix_row * 128 + ((2 * i + chunk) ^ (matrix_row % 8)) * 16,
                         pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]),
                         pack_pair(v[6], v[7]));
        }
        fence_async_shared();
        __syncwarp();
        if (lane == 0) {
          store_box(p.y, column0 + 64 * part, static_cast<int>(row0), to);
          commit_stores();
        }
        slab = slab + 1 == S::kSlabs ? 0 : slab + 1;
      }
    } else if (p.y_f32) {
      store_plain<kN, float>(p, d, row0, column0, lane);
    } else {
      store_plain<kN, bf16>(p, d, row0, column0, lane);
    }
  }
  if (p.y_map && lane == 0) wait_stores_read<0>();
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <int kN, WeightLayout kLayout, Low kLow>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_hopper_kernel(const __grid_constant__ Problem p, int cluster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shared<kN>;
  extern __shared__ std::uint8_t unaligned[];
  const std::uint32_t base = (shared_address(unaligned) + 1023) / 1024 * 1024;
  const int rank = static_cast<int>(cluster_rank());

  if (threadIdx.x == 128 * kConsumers) {
    prefetch_map(p.x);
    prefetch_map(p.w);
    if (p.low_steps > 0) {
      prefetch_map(p.u);
      prefetch_map(p.b);
    }
    if (p.y_map) prefetch_map(p.y);
  }
  if (threadIdx.x == 0) {
    const Barriers<kN> barriers{base + S::kBarriers};
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(barriers.full(i), 1);
      barrier_init(barriers.empty(i), kConsumerWarps * cluster);
    }
    fence_barrier_init();
  }
  __syncthreads();
  cluster_sync();
  begin_kernel();

  if (threadIdx.x >= 128 * kConsumers) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 128 * kConsumers) produce<kN, kLayout>(p, base, cluster, rank);
    __syncwarp();
  } else {
    registers_grow<kConsumerRegisters>();
    consume<kN, kLayout, kLow>(p, base, cluster, rank);
  }
  // The other block may still arrive at this one's barriers.
  cluster_sync();
#endif
}

// -- Host side -----------------------------------------------------------------------------------

struct Config {
  int n;        // columns of a tile: 256, 192, 128 or 64
  int cluster;  // blocks that share columns: 2, or 1 when there is a single row of tiles
};

// The configuration with the least estimated time: the rounds that the busiest block makes times
// the cost of a tile. Per product a narrow tile moves more bytes through shared memory. Costs of a
// step from 4096^3 on an H100, scaled to 1024 for N = 256; `rest` is an estimate.
Config choose(std::int64_t m, std::int64_t n, std::int64_t k, int multiprocessors) {
  const int cluster = m > kTileM && multiprocessors >= 2 ? 2 : 1;
  const std::int64_t steps = ceil_div(k, kTileK), slots = multiprocessors / cluster;
  const std::int64_t rows = ceil_div(m, kTileM * cluster);
  constexpr struct {
    int n, step, rest;  // cycles per K step, and per tile beside them
  } kCosts[] = {{256, 1024, 1600}, {192, 775, 1500}, {128, 590, 1400}, {64, 440, 1300}};
  Config best{256, cluster};
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (const auto& cost : kCosts) {
    const std::int64_t rounds = ceil_div(rows * ceil_div(n, cost.n), slots);
    const std::int64_t time = rounds * (steps * cost.step + cost.rest);
    if (time < least) {
      least = time;
      best.n = cost.n;
    }
  }
  return best;
}

Problem problem_of(const Gemm& gemm, const Config& config) {
  const bool by_k = gemm.layout == WeightLayout::n_by_k;
  const auto right_map = [&](const void* address, std::int64_t depth, std::int64_t stride) {
    return by_k ? strided_map(address, gemm.n, depth, stride, config.n / 2, kBoxColumns)
                : strided_map(address, depth, gemm.n, stride, kTileK / 2, kBoxColumns);
  };
  Problem p{};
  p.x = strided_map(gemm.x, gemm.m, gemm.k, gemm.x_stride, kTileM, kBoxColumns);
  p.w = right_map(gemm.w, gemm.k, gemm.w_stride);
  p.rank = static_cast<int>(gemm.rank);
  if (gemm.rank > 0) {
    p.u = strided_map(gemm.u, gemm.m, gemm.rank, gemm.rank, kTileM, kBoxColumns);
    p.b = right_map(gemm.b, gemm.rank, by_k ? gemm.rank : gemm.n);
  }
  p.k_steps = static_cast<int>(ceil_div(gemm.k, kTileK));
  p.low_steps = static_cast<int>(ceil_div(gemm.rank, kTileK));
  p.cluster_rows = static_cast<int>(ceil_div(gemm.m, kTileM * config.cluster));
  p.tiles_n = static_cast<int>(ceil_div(gemm.n, config.n));
  p.tiles = p.cluster_rows * p.tiles_n;
  p.group = 16 / config.cluster;
  p.alpha = gemm.alpha;
  p.low_scale = gemm.low_scale;
  p.m = gemm.m;
  p.n = gemm.n;
  p.y_address = gemm.y;
  p.y_stride = gemm.y_stride;
  p.y_f32 = gemm.y_dtype == DType::F32;
  // The copy engine stores whole 16-byte chunks: it would write past a row that ends within one.
  p.y_map = !p.y_f32 && gemm.y_stride % 8 == 0 && gemm.n % 8 == 0;
  if (p.y_map) p.y = strided_map(gemm.y, gemm.m, gemm.n, gemm.y_stride, 16, kBoxColumns);
  p.keep = gemm.keep;
  return p;
}

template <int kN, WeightLayout kLayout, Low kLow>
void start(const Problem& p, const Config& config, const Launch& launch) {
  const int clusters = std::min(p.tiles, launch.card->multiprocessors / config.cluster);
  // Blocks set themselves up while the kernel before is ending.
  start_clusters("gemm_hopper", gemm_hopper_kernel<kN, kLayout, kLow>, config.cluster,
                 static_cast<unsigned>(clusters * config.cluster), kThreads, Shared<kN>::kAllocated,
                 launch, p, config.cluster);
}

template <int kN>
void start(const Gemm& gemm, const Problem& p, const Config& config, const Launch& launch) {
  if (gemm.layout == WeightLayout::n_by_k) {
    start<kN, WeightLayout::n_by_k, Low::plain>(p, config, launch);
  } else if (gemm.rank > 0 && gemm.keep.p > 0) {
    start<kN, WeightLayout::k_by_n, Low::dropout>(p, config, launch);
  } else {
    start<kN, WeightLayout::k_by_n, Low::plain>(p, config, launch);
  }
}

void run_with(const Gemm& gemm, const Config& config, const Launch& launch) {
  const Problem p = problem_of(gemm, config);
  if (config.n == 256) {
    start<256>(gemm, p, config, launch);
  } else if (config.n == 192) {
    start<192>(gemm, p, config, launch);
  } else if (config.n == 128) {
    start<128>(gemm, p, config, launch);
  } else {
    start<64>(gemm, p, config, launch);
  }
}

}  // namespace

bool gemm_hopper_supports(const Gemm& gemm, const Card& card) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
  if (!card.hopper || gemm.dtype != DType::BF16) return false;
  if (gemm.y_dtype != DType::BF16 && gemm.y_dtype != DType::F32) return false;
  if (gemm.m < 1 || gemm.n < 1 || gemm.k < 1) return false;
  if (gemm.m > kMost || gemm.n > kMost || gemm.k > kMost) return false;
  if (ceil_div(gemm.m, kTileM) * ceil_div(gemm.n, 64) > kMost) return false;
  // The copy engine wants rows that are multiples of 16 bytes apart.
  if (gemm.x_stride % 8 != 0 || gemm.w_stride % 8 != 0) return false;
  if (gemm.rank == 0) return true;
  // alpha would have to divide the adapter's part again: no caller has both.
  if (gemm.rank % 8 != 0 || gemm.rank > 256 || gemm.alpha != 1) return false;
  if (gemm.layout == WeightLayout::k_by_n) return gemm.n % 8 == 0;
  return gemm.keep.p == 0;
}

void gemm_hopper(const Gemm& gemm, const Launch& launch) {
  run_with(gemm, choose(gemm.m, gemm.n, gemm.k, launch.card->multiprocessors), launch);
}

}  // namespace nibble::cuda
