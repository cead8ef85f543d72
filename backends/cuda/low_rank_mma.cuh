// The BF16 kernel behind low_rank.h: out[M, N] = sum over k of A(m, k) B(k, n) on the tensor cores
// (mma.sync m16n8k16, F32 sums), for one wide operand A that is streamed once and one narrow B.
//
// The k range is cut into slices (channels of a thin product, 512 tokens of a sum over tokens); the
// sums of the slices are added in ascending order. A block owns a kM x kN tile of the output and a
// slice. It stages 64 or 128 k at a time in shared memory, three or four stages deep; an operand
// lies there as in memory, k along its rows or down its columns, and ldmatrix transposes where
// needed. Warps that the tile has no rows for share the k of a stage.
//
// Where slices meet:
//   scratch  each slice writes its F32 sums out; another kernel adds them (finish_*, low_rank.cu)
//   alone    one block takes all slices of its tile in turn; there is no second kernel
// Both add the same numbers in the same order. Clusters that add up each other's shared memory
// were tried on an H100 and were slower than scratch in nearly every shape.
//
// Dropout: rows of A's stage are tokens in either layout. The thread that copied 8 channels of a
// token draws their numbers (each philox block once) when they have arrived, and clears what is
// dropped before the barrier that publishes the stage; the copies of later stages go on meanwhile.
#pragma once

#include "backends/cuda/mma.cuh"

namespace nibble::cuda::low_rank {

// How an operand lies in memory: k along the rows, or one row per k.
enum class Order { k_along_rows, k_down_rows };
enum class Finish { round, add, scratch };

struct Operand {
  const bf16* data;
  std::int64_t stride;  // elements
  bool packed;          // rows start at multiples of 16 bytes
};

struct Product {
  Operand a, b;
  std::int64_t m, n, k;
  std::int64_t slice;  // k of one slice, a multiple of 128
  int slice_blocks;    // per output tile: 1, or one for every slice (Finish::scratch)
  DropoutArgs drop;    // of A; only in tiles less than 128 wide
  float scale;
  bool n_is_row;  // the output is [N, M] instead of [M, N]
  Finish finish;
  // round: bf16 = rounded scale * sum of the only slice. add: float += scale * slice, in order.
  // scratch: float [slices, output], unscaled.
  void* out;
};

constexpr int kThreads = 256;

template <int kM, int kN>
struct Config {
  static_assert(kM == 32 || kM == 64 || kM == 128);
  static constexpr int kStageK = kM == 128 ? 64 : 128;
  static constexpr int kWarpsM = kM / 32;  // a warp takes 32 rows
  static constexpr int kWarpsN = kN < 64 ? 1 : kN / 64;
  static constexpr int kWarpsK = kThreads / kWarp / kWarpsM / kWarpsN;  // they share a stage's k
  static constexpr int kPairs = kN / kWarpsN / 16;  // pairs of n8 tiles a warp takes
  static constexpr int kStageElements = (kM + kN) * kStageK;
  static constexpr int kStages = kStageElements > 12 * 1024 ? 3 : 4;
  static constexpr int kSumFloats = kM * (kN + 4) > kN*(kM + 4) ? kM*(kN + 4) : kN*(kM + 4);
  static constexpr int kStageBytes = kStages * kStageElements * static_cast<int>(sizeof(bf16));
  static constexpr int kSumBytes = kWarpsK * kSumFloats * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kStageBytes > kSumBytes ? kStageBytes : kSumBytes;
  static_assert(kSharedBytes <= kSharedLimit);
  static_assert(kStageK % (16 * kWarpsK) == 0);
};

template <bool kTranspose>
__device__ inline void load_tile(unsigned (&to)[4], const bf16* row) {
  if constexpr (kTranspose) {
    load_matrices_transposed(to, shared_address(row));
  } else {
    load_matrices(to, shared_address(row));
  }
}

// A kRows x kCols tile in shared memory, in chunks of 8 elements whose order within a row changes
// from row to row, so that ldmatrix finds 8 rows of one chunk column in different banks.
template <int kRows, int kCols>
struct Tile {
  static constexpr int kPerRow = kCols / 8;
  static constexpr int kChunks = kRows * kPerRow;
  __device__ static int at(int row, int chunk) {
    constexpr int kMixed = kPerRow < 8 ? kPerRow : 8;
    return (row * kPerRow + (chunk ^ (row * kMixed / 8 % kMixed))) * 8;
  }

  // A thread's chunks lie in one column of chunks, kRowStep rows apart, where the order repeats.
  struct Own {
    static constexpr int kCount = kChunks < kThreads ? 1 : kChunks / kThreads;
    static constexpr int kRowStep = kThreads / kPerRow;
    static_assert(kCount == 1 || kRowStep % 8 == 0);
    static_assert(kChunks % kThreads == 0 || kChunks < kThreads);
    __device__ static bool any() { return kChunks >= kThreads || threadIdx.x < kChunks; }
    __device__ static int row() { return static_cast<int>(threadIdx.x) / kPerRow; }
    __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kPerRow; }
    __device__ static bf16* at(bf16* tile, int i) {
      return tile + Tile::at(row(), chunk()) + i * kRowStep * kCols;
    }
  };

  // Copies from row `row` and column `col` of `from` on; zeros from row_end and col_end on, except
  // that a packed row's last chunk comes whole (its rows are padded, and nothing reads the excess).
  __device__ static void fill(bf16* tile, const Operand& from, std::int64_t row, std::int64_t col,
                              std::int64_t row_end, std::int64_t col_end) {
    if (!Own::any()) return;
    row += Own::row();
    col += Own::chunk() * 8;
    const bf16* source = from.data + row * from.stride + col;
    const std::int64_t rows_left = col < col_end ? row_end - row : 0;
    const int rows = rows_left < kRows ? static_cast<int>(rows_left) : kRows;
    const std::int64_t cols = col_end - col;
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      const bool real = i * Own::kRowStep < rows;
      if (from.packed) {
        copy_async(shared_address(Own::at(tile, i)), real ? source : from.data, real);
      } else {
        Pack<bf16> pack;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          pack.values[j] = real && j < cols ? source[j] : from_float<bf16>(0.0f);
        }
        store_pack(Own::at(tile, i), pack);
      }
      source += Own::kRowStep * from.stride;
    }
  }
};

// The numbers of one call, read once.
struct Draw {
  std::int64_t seed, step;
};

// All ones in the half of a pair of bf16 whose word keeps its channel. threshold: of whole words.
__device__ inline unsigned pair_mask(unsigned low, unsigned high, unsigned threshold) {
  unsigned mask = low >= threshold ? 0xFFFFu : 0u;
  if (high >= threshold) mask |= 0xFFFF0000u;
  return mask;
}
// Clears what is dropped of channels [col, col + 8) of a token, in shared memory.
__device__ inline void drop_chunk(bf16* chunk, const DropoutArgs& drop, const Draw& draw,
                                  std::int32_t ordinal, std::int64_t col) {
  const auto group = static_cast<std::uint32_t>(col / 4);
  const unsigned threshold = drop.threshold << 8;
  const uint4 a = dropout_words(draw.seed, draw.step, drop.adapter, ordinal, group);
  const uint4 b = dropout_words(draw.seed, draw.step, drop.adapter, ordinal, group + 1);
  auto* const at = reinterpret_cast<uint4*>(chunk);
  uint4 v = *at;
  v.x &= pair_mask(a.x, a.y, threshold);
  v.y &= pair_mask(a.z, a.w, threshold);
  v.z &= pair_mask(b.x, b.y, threshold);
  v.w &= pair_mask(b.z, b.w, threshold);
  *at = v;
}

template <int kM, int kN, Order kOrderA, Order kOrderB>
struct Block {
  using C = Config<kM, kN>;
  static constexpr int kStageK = C::kStageK;
  static constexpr bool kDownA = kOrderA == Order::k_down_rows;
  static constexpr bool kDownB = kOrderB == Order::k_down_rows;
  static constexpr bool kMayDrop = kN < 128;
  using TileA = Tile<kDownA ? kStageK : kM, kDownA ? kM : kStageK>;
  using TileB = Tile<kDownB ? kStageK : kN, kDownB ? kN : kStageK>;
  using Own = typename TileA::Own;

  const Product& p;
  bf16* const stages;
  const std::int64_t m0, n0;
  Draw draw;
  int warp_m, warp_n, warp_k, lane;
  float sums[2][2 * C::kPairs][4];

  __device__ Block(const Product& product, bf16* shared, std::int64_t m, std::int64_t n)
      : p(product), stages(shared), m0(m), n0(n), draw{} {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = static_cast<int>(threadIdx.x) % kWarp;
    warp_m = warp % C::kWarpsM;
    warp_n = warp / C::kWarpsM % C::kWarpsN;
    warp_k = warp / C::kWarpsM / C::kWarpsN;
    if (kMayDrop && p.drop.p > 0) draw = {p.drop.rng[0], p.drop.rng[1]};
  }

  __device__ bf16* stage_a(int stage) const { return stages + stage * C::kStageElements; }
  __device__ bf16* stage_b(int stage) const { return stage_a(stage) + kM * kStageK; }

  __device__ void fill(int stage, std::int64_t k, std::int64_t k_end) const {
    if constexpr (kDownA) {
      TileA::fill(stage_a(stage), p.a, k, m0, k_end, p.m);
    } else {
      TileA::fill(stage_a(stage), p.a, m0, k, p.m, k_end);
    }
    if constexpr (kDownB) {
      TileB::fill(stage_b(stage), p.b, k, n0, k_end, p.n);
    } else {
      TileB::fill(stage_b(stage), p.b, n0, k, p.n, k_end);
    }
  }

  // Dropout on the chunks of A's stage at k that this thread copied.
  __device__ void drop(int stage, std::int64_t k, std::int64_t k_end) const {
    const std::int64_t row = (kDownA ? k : m0) + Own::row();
    const std::int64_t last = (kDownA ? k_end : p.m) - 1;
    const std::int64_t col = (kDownA ? m0 : k) + Own::chunk() * 8;
    Draw fresh = draw;
    // Keeps the compiler from holding all ten round keys in registers throughout.
    asm volatile("" : "+l"(fresh.seed));
    std::int32_t ordinal[Own::kCount];
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      const std::int64_t token = row + i * Own::kRowStep;
      ordinal[i] = p.drop.ordinal[token < last ? token : last];  // rows of zeros take any
    }
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i) {
      drop_chunk(Own::at(stage_a(stage), i), p.drop, fresh, ordinal[i], col);
    }
  }

  __device__ void load_a(unsigned (&to)[4], const bf16* tile, int m, int k) const {
    const int q = lane / 8, r = lane % 8;
    if constexpr (kDownA) {
      load_tile<true>(to, tile + TileA::at(k + q / 2 * 8 + r, m / 8 + q % 2));
    } else {
      load_tile<false>(to, tile + TileA::at(m + q % 2 * 8 + r, k / 8 + q / 2));
    }
  }
  // Two n8 tiles: registers 0 and 1 are the first's.
  __device__ void load_b(unsigned (&to)[4], const bf16* tile, int n, int k) const {
    const int q = lane / 8, r = lane % 8;
    if constexpr (kDownB) {
      load_tile<true>(to, tile + TileB::at(k + q % 2 * 8 + r, n / 8 + q / 2));
    } else {
      load_tile<false>(to, tile + TileB::at(n + q / 2 * 8 + r, k / 8 + q % 2));
    }
  }

  __device__ void multiply_stage(int stage) {
    constexpr int kSteps = kStageK / 16 / C::kWarpsK;
    const int n_left = p.n - n0 < kN ? static_cast<int>(p.n - n0) : kN;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int k = (warp_k * kSteps + step) * 16;
      unsigned a[2][4];
      load_a(a[0], stage_a(stage), warp_m * 32, k);
      load_a(a[1], stage_a(stage), warp_m * 32 + 16, k);
#pragma unroll
      for (int pair = 0; pair < C::kPairs; ++pair) {
        const int n = warp_n * C::kPairs * 16 + pair * 16;
        if (n >= n_left) continue;
        unsigned b[4];
        load_b(b, stage_b(stage), n, k);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma(sums[i][2 * pair], a[i], b[0], b[1]);
          mma(sums[i][2 * pair + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // The sums over k in [begin, end).
  __device__ void sum_slice(std::int64_t begin, std::int64_t end) {
#pragma unroll
    for (auto& rows : sums) {
      for (auto& tile : rows) {
        for (float& sum : tile) sum = 0;
      }
    }
    const int steps = begin < end ? static_cast<int>(ceil_div(end - begin, kStageK)) : 0;
    for (int s = 0; s < C::kStages - 1; ++s) {
      if (s < steps) fill(s, begin + s * kStageK, end);
      commit_copies();
    }
    for (int s = 0; s < steps; ++s) {
      const std::int64_t k = begin + static_cast<std::int64_t>(s) * kStageK;
      wait_copies<C::kStages - 2>();
      if (kMayDrop && p.drop.p > 0) drop(s % C::kStages, k, end);
      __syncthreads();
      const int next = s + C::kStages - 1;
      if (next < steps) {
        fill(next % C::kStages, begin + static_cast<std::int64_t>(next) * kStageK, end);
      }
      commit_copies();
      multiply_stage(s % C::kStages);
    }
    wait_copies<0>();
    __syncthreads();  // shared memory is free
  }

  // Calls f(to + place, sum): the tile's sums lie in the order of the output, rows of kN or kM
  // padded by 4.
  template <bool kNIsRow, class F>
  __device__ void for_each_sum(float* to, F&& f) {
    constexpr int kStepM = kNIsRow ? 1 : kN + 4, kStepN = kNIsRow ? kM + 4 : 1;
    to += (warp_m * 32 + lane / 4) * kStepM + (warp_n * C::kPairs * 16 + lane % 4 * 2) * kStepN;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * C::kPairs; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(to + (i * 16 + e / 2 * 8) * kStepM + (j * 8 + e % 2) * kStepN, sums[i][j][e]);
        }
      }
    }
  }
  // The tile's sums of this slice, in shared memory.
  __device__ void gather_sums(float* to) {
    const auto store = [](float* at, float sum) { *at = sum; };
    if (p.n_is_row) {
      for_each_sum<true>(to + warp_k * C::kSumFloats, store);
    } else {
      for_each_sum<false>(to + warp_k * C::kSumFloats, store);
    }
    __syncthreads();
    if constexpr (C::kWarpsK > 1) {
      for (int i = static_cast<int>(threadIdx.x); i < kM * kN / 4; i += kThreads) {
        auto* const at = reinterpret_cast<float4*>(to + quad(i).at);
        float4 sum = *at;
#pragma unroll
        for (int k = 1; k < C::kWarpsK; ++k) {
          add(sum, *reinterpret_cast<const float4*>(to + k * C::kSumFloats + quad(i).at));
        }
        *at = sum;
      }
      __syncthreads();
    }
  }
  __device__ static void add(float4& sum, const float4& v) {
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }

  // Four neighbours in a row of the output: where they lie in shared memory and in the output, and
  // how many of them exist.
  struct Quad {
    int at, count;
    std::int64_t element;
  };
  __device__ Quad quad(int i) const {
    const int per_row = (p.n_is_row ? kM : kN) / 4, row = i / per_row, col = i % per_row * 4;
    const std::int64_t out_row = row + (p.n_is_row ? n0 : m0),
                       out_col = col + (p.n_is_row ? m0 : n0);
    const std::int64_t rows = p.n_is_row ? p.n : p.m, cols = p.n_is_row ? p.m : p.n;
    const std::int64_t left = out_row < rows ? cols - out_col : 0;
    return {row * (per_row * 4 + 4) + col,
            left < 0   ? 0
            : left < 4 ? static_cast<int>(left)
                       : 4,
            out_row * cols + out_col};
  }

  // Elements are read and written together when rows of the output are whole quads.
  __device__ float4 load_quad(const float* from, int count, bool whole) const {
    if (whole) return count == 0 ? float4{} : *reinterpret_cast<const float4*>(from);
    return {count > 0 ? from[0] : 0, count > 1 ? from[1] : 0, count > 2 ? from[2] : 0,
            count > 3 ? from[3] : 0};
  }
  __device__ void store_quad(float* to, const float4& v, int count, bool whole) const {
    if (whole) {
      if (count > 0) *reinterpret_cast<float4*>(to) = v;
      return;
    }
    if (count > 0) to[0] = v.x;
    if (count > 1) to[1] = v.y;
    if (count > 2) to[2] = v.z;
    if (count > 3) to[3] = v.w;
  }
  __device__ void store_quad(bf16* to, const float4& v, int count, bool whole) const {
    const __nv_bfloat162 low{from_float<bf16>(v.x), from_float<bf16>(v.y)};
    const __nv_bfloat162 high{from_float<bf16>(v.z), from_float<bf16>(v.w)};
    if (whole) {
      if (count == 0) return;
      reinterpret_cast<__nv_bfloat162*>(to)[0] = low;
      reinterpret_cast<__nv_bfloat162*>(to)[1] = high;
      return;
    }
    if (count > 0) to[0] = low.x;
    if (count > 1) to[1] = low.y;
    if (count > 2) to[2] = high.x;
    if (count > 3) to[3] = high.y;
  }

  __device__ void store_scratch(float* to, const float* from) const {
    const bool whole = (p.n_is_row ? p.m : p.n) % 4 == 0;
    for (int i = static_cast<int>(threadIdx.x); i < kM * kN / 4; i += kThreads) {
      const Quad q = quad(i);
      store_quad(to + q.element, *reinterpret_cast<const float4*>(from + q.at), q.count, whole);
    }
  }
  // Adds the slice in shared memory to the output, or stores it. Several quads at a time, so that
  // their loads overlap.
  __device__ void finish(const float* from) const {
    constexpr int kQuads = kM * kN / 4, kBatch = kQuads >= 4 * kThreads ? 4 : 1;
    const bool whole = (p.n_is_row ? p.m : p.n) % 4 == 0;
    for (int first = static_cast<int>(threadIdx.x); first < kQuads; first += kBatch * kThreads) {
      Quad q[kBatch];
      float4 sum[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        q[b] = quad(first + b * kThreads);
        sum[b] = {};
        if (p.finish == Finish::add) {
          sum[b] = load_quad(static_cast<const float*>(p.out) + q[b].element, q[b].count, whole);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float4 v = *reinterpret_cast<const float4*>(from + q[b].at);
        sum[b] = {fmaf(p.scale, v.x, sum[b].x), fmaf(p.scale, v.y, sum[b].y),
                  fmaf(p.scale, v.z, sum[b].z), fmaf(p.scale, v.w, sum[b].w)};
        if (p.finish == Finish::round) {
          store_quad(static_cast<bf16*>(p.out) + q[b].element, sum[b], q[b].count, whole);
        } else {
          store_quad(static_cast<float*>(p.out) + q[b].element, sum[b], q[b].count, whole);
        }
      }
    }
    static_assert(kQuads % kBatch == 0 && (kBatch == 1 || kQuads % (kBatch * kThreads) == 0));
  }
};

// Two blocks share a multiprocessor; before sm_90 shared memory holds one of the largest tiles.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int kN>
inline constexpr int kBlocksAtOnce = kN == 128 ? 1 : 2;
#else
template <int kN>
inline constexpr int kBlocksAtOnce = 2;
#endif

template <int kM, int kN, Order kOrderA, Order kOrderB>
__global__ __launch_bounds__(kThreads, kBlocksAtOnce<kN>) void thin_product(
    const __grid_constant__ Product p) {
  begin_kernel();
  extern __shared__ __align__(128) unsigned char memory[];
  const int tile = static_cast<int>(blockIdx.x) / p.slice_blocks;
  const int first = static_cast<int>(blockIdx.x) % p.slice_blocks;
  Block<kM, kN, kOrderA, kOrderB> block(p, reinterpret_cast<bf16*>(memory),
                                        static_cast<std::int64_t>(tile) * kM,
                                        static_cast<std::int64_t>(blockIdx.y) * kN);
  auto* const sums = reinterpret_cast<float*>(memory);
  for (std::int64_t begin = first * p.slice; begin < p.k; begin += p.slice_blocks * p.slice) {
    block.sum_slice(begin, begin + p.slice < p.k ? begin + p.slice : p.k);
    block.gather_sums(sums);
    if (p.finish == Finish::scratch) {
      block.store_scratch(static_cast<float*>(p.out) + first * p.m * p.n, sums);
    } else {
      block.finish(sums);
    }
    __syncthreads();  // the sums make room for the next slice
  }
}

}  // namespace nibble::cuda::low_rank
