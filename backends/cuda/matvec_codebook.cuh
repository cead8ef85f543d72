// The kernel of matvec.cu for NF4 and FP4 in BF16 graphs.
//
// A memory at 3 TB/s delivers about 25 such elements per cycle and multiprocessor, so that a weight
// may cost 5 instructions of a lane. The products therefore run on the tensor cores (mma m16n8k16),
// which take the decoded pair of bf16 as it is, and a byte of codes is looked up whole: a table of
// 256 pairs of floats, copied for each lane of a half warp so that no two lanes share a bank; a byte
// dot product makes the address.
//
// A tile is 8 rows of W, and 512 channels of it are a piece: the work of a warp, whose next piece
// is on its way from memory meanwhile. The sums of pieces stay in shared memory until all of a
// block's tiles are done, and are then added in the order of channels: there is no barrier inside.
// Where the card has it, a launch starts while the kernel before is ending: the tables and the
// first weights, which no kernel writes, are fetched then, and the rest waits for the kernel
// before. Measured on an H100 with m = 1: 72 % of that memory's rate for [44032, 4096]; the four
// launches of a layer of Llama-2-7B take 59 us, 59 %. L1, where table, codes and x meet, is then
// busiest.
#pragma once

#include "backends/cuda/matvec_calls.cuh"

namespace nibble::cuda::matvec_kernels {

constexpr int kTileRows = 8;
// For one token fewer warps, whose registers hold what comes next while they work.
constexpr int codebook_warps(int tokens) { return tokens == 1 ? 10 : 12; }
// A run is 32 channels of a row, what a lane loads at once. A step is 8 runs of each row of the
// tile: a lane has run q and run 4 + q of row g, where g = lane / 4 and q = lane % 4.
constexpr int kRun = 32, kStepRuns = 8, kPieceSteps = 2;
constexpr int kPieceRuns = kStepRuns * kPieceSteps;
constexpr int kPartials = 8192;

struct CodebookShared {
  float2 pairs[256][16];  // of byte b: the values of its high and its low nibble, 16 times
  float maps[kMaxCalls][256];
  float offsets[kMaxCalls];
  // [tile][piece, then the adapter's part][token][row]
  float partials[kPartials];
};
static_assert(sizeof(CodebookShared) <= kSharedLimit);

constexpr int blocks_per_processor(int tokens) { return tokens > 4 ? 1 : 2; }

// How the work of a launch is cut; see CodebookPlace.
struct CodebookPlan {
  int row_runs, row_pieces;
  int step_tiles, step_pieces;  // the number of warps in pieces further
  int round_tiles;              // tiles of a block whose partial sums fit at once
};

// Read once: kept out of L1, where x stays.
__device__ inline uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Leaves `to` as it is where not `wanted`: a load costs by the lanes that take part.
__device__ inline void load_where(bool wanted, const void* from, uint4& to) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(from), "r"(static_cast<std::uint32_t>(wanted)));
}

__device__ inline float load_float(std::uint32_t shared_address) {
  float value;
  asm("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(shared_address));
  return value;
}
__device__ inline float2 load_pair(std::uint32_t shared_address) {
  float2 pair;
  asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared_address));
  return pair;
}

// d += a b in F32: a [16, 16] and b [16, 8] of bf16.
__device__ inline void mma(float (&d)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// A warp's place in its block's work: tile n of the block (tile blockIdx.x + n gridDim.x of the
// launch) and a piece of its rows. The pieces of all tiles are dealt to the warps in turn.
struct CodebookPlace {
  int n, piece;
  int call;  // of tile n

  __device__ void advance(const CodebookPlan& plan) {
    n += plan.step_tiles;
    piece += plan.step_pieces;
    if (piece >= plan.row_pieces) {
      piece -= plan.row_pieces;
      ++n;
    }
  }
};

// What a lane has of a step, as stored.
struct CodebookStep {
  uint4 codes[2];
  std::uint32_t absmax;  // of the 64 channels at run 2 q: the 8-bit code, or the float's bits
  float scale;           // of the code's group
};

// Where a lane finds its codes of a piece.
template <bool kDoubleQuant>
struct CodebookSource {
  const CodebookDecoder& decoder;
  std::uint32_t first_run;  // of the tensor
  int runs;                 // to the end of the row

  __device__ void load(int step, int quarter, CodebookStep& to) const {
    const AbsmaxReader& absmax = decoder.absmax;
    // Past the end of a row its last codes are read again, and scaled by zero.
    const std::uint32_t block =
        (first_run / 2 +
         static_cast<std::uint32_t>(min(step * kStepRuns / 2 + quarter, runs / 2 - 1))) >>
        (absmax.block_shift - 6);
    if constexpr (kDoubleQuant) {
      to.absmax = load_u8(absmax.absmax + block);
      to.scale = __ldg(absmax.scale + (block >> 8));
    } else {
      to.absmax = __ldg(reinterpret_cast<const std::uint32_t*>(absmax.absmax) + block);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t run =
          first_run + static_cast<std::uint32_t>(min(step * kStepRuns + 4 * h + quarter, runs - 1));
      to.codes[h] = load_once(reinterpret_cast<const uint4*>(decoder.codes) + run);
    }
  }
};

// Brings a tile's rows of b nearer, for low_rank_tile to find them later.
__device__ inline void prefetch_low_rank(const Calls<CodebookDecoder>& p, int tile, int lane) {
  const int c = p.call_of(tile);
  const Result& result = p.calls[c].result;
  const std::int64_t row0 = (tile - p.first[c]) * kTileRows;
  const std::int64_t row_bytes = result.rank * (result.b_is_bf16 ? 2 : 4);
  const std::int64_t bytes = min(result.outputs - row0, std::int64_t{kTileRows}) * row_bytes;
  const auto* at = static_cast<const std::uint8_t*>(result.b) + row0 * row_bytes;
#pragma unroll 1
  for (std::int64_t i = lane * kSector; i < bytes; i += kWarp * kSector) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(at + i));
  }
}

// sum_j u[t, j] b[row, j] to to[t * kTileRows + row] for the rows of a tile, by a warp: 4 lanes a
// row.
template <int kTokens>
__device__ inline void low_rank_tile(const Calls<CodebookDecoder>& p, int tile, int lane,
                                     float* to) {
  const int c = p.call_of(tile), line = lane / 4, quarter = lane % 4;
  const Result& result = p.calls[c].result;
  if (result.rank == 0) return;
  // Past the last row it is read again, and not stored.
  const std::int64_t row =
      min(static_cast<std::int64_t>((tile - p.first[c]) * kTileRows + line), result.outputs - 1);
  const auto* u = static_cast<const bf16*>(result.u);
  float sums[kTokens]{};
#pragma unroll 4
  for (std::int64_t j = quarter; j < result.rank; j += 4) {
    const float b = result.b_value<bf16>(row * result.rank + j);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < p.m) sums[t] = fmaf(to_float(u[t * result.rank + j]), b, sums[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    sums[t] += __shfl_xor_sync(~0u, sums[t], 1);
    sums[t] += __shfl_xor_sync(~0u, sums[t], 2);
    if (quarter == 0 && t < p.m) to[t * kTileRows + line] = sums[t];
  }
}

// kTokens: 1, 4 or 8, the least that m fits in. The left factor of a product has run q of the 8
// rows of W in its rows 0 to 7 and run 4 + q in its rows 8 to 15; they meet different channels of
// x, in different columns of the right factor or in two products. Of a run the four words, 8
// channels each, have sums of their own. For one token the 8 columns are the words of both runs' x,
// so that one load serves a step; 4 tokens have two columns each, 8 have two products. What parts
// that do not belong together give is not read.
template <bool kDoubleQuant, int kTokens>
__global__ void __launch_bounds__(codebook_warps(kTokens) * kWarp, blocks_per_processor(kTokens))
    codebook_kernel(const __grid_constant__ Calls<CodebookDecoder> p, const CodebookPlan plan,
                    const __grid_constant__ CodebookTables tables) {
  constexpr int kCodebookWarps = codebook_warps(kTokens);
  constexpr int kCodebookThreads = kCodebookWarps * kWarp;
  constexpr bool kWide = kTokens > 4;
  constexpr int kProducts = kWide ? 2 : 1;
  extern __shared__ __align__(256) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<CodebookShared*>(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int line = lane / 4, quarter = lane % 4;
  // Kept in registers: left alone the compiler works them out again in the loop.
  asm volatile("" : "+r"(line), "+r"(quarter));
  const int row_runs = plan.row_runs;
  const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int block_tiles = (p.first[kMaxCalls] - block + grid - 1) / grid;

  const auto source_of = [&](CodebookPlace& at) {
    const int tile = block + at.n * grid;
    const int c = at.call = p.call_of(tile);
    // Past the last row it is read again, and not stored. Past the last tile nothing is read.
    const int row = min((tile - p.first[c]) * kTileRows + line,
                        static_cast<int>(p.calls[c].result.outputs) - 1);
    return CodebookSource<kDoubleQuant>{
        p.calls[c].decoder, static_cast<std::uint32_t>(row * row_runs + at.piece * kPieceRuns),
        row_runs - at.piece * kPieceRuns};
  };
  CodebookPlace next{warp / plan.row_pieces, warp % plan.row_pieces, 0};
  CodebookStep steps[kPieceSteps]{};
  if (next.n < block_tiles) {
    const auto source = source_of(next);
#pragma unroll
    for (int s = 0; s < kPieceSteps; ++s) {
      if (s * kStepRuns < source.runs) source.load(s, quarter, steps[s]);
    }
  }
  CodebookPlace now = next;
  admit_successor();

  for (int i = threadIdx.x; i < 256 * 8; i += kCodebookThreads) {
    const float high = tables.values[i / 8 >> 4], low = tables.values[i / 8 & 15];
    reinterpret_cast<float4*>(shared.pairs[i / 8])[i % 8] = make_float4(high, low, high, low);
  }
  if constexpr (kDoubleQuant) {
    const float* usual = argument_address(tables.map);
    for (int i = threadIdx.x; i < p.count * 64; i += kCodebookThreads) {
      const float* custom = p.calls[i / 64].decoder.absmax.custom_map;
      reinterpret_cast<float4*>(shared.maps[i / 64])[i % 64] =
          reinterpret_cast<const float4*>(custom != nullptr ? custom : usual)[i % 64];
    }
    if (threadIdx.x < p.count) {
      shared.offsets[threadIdx.x] = __ldg(p.calls[threadIdx.x].decoder.absmax.offset);
    }
  }
  __syncthreads();
  wait_for_predecessor();

  auto lane_pairs =
      static_cast<std::uint32_t>(__cvta_generic_to_shared(&shared.pairs[0][lane % 16]));
  static_assert(sizeof(shared.pairs[0]) == 128);
  const int token = line % kTokens, column_half = line / 4;
  const bool has_token = kTokens == 1 || token < p.m;
  const uint4* x = reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.x) +
                                                  (has_token ? token : 0) * p.cols) +
                   (kTokens == 1 ? line % 4 : 0);
  auto maps = static_cast<std::uint32_t>(__cvta_generic_to_shared(&shared.maps[0][0]));
  // This also keeps the loads of x and from the tables behind the waits.
  asm volatile("" : "+r"(lane_pairs), "+r"(maps), "+l"(x));

  float sums[kProducts][4][4];  // of each word
  // Two of each in turn.
  constexpr int kTurns = kTokens == 1 ? 1 : 2;
  uint4 factors[kTurns][kProducts]{};
  const auto multiply = [&](const CodebookStep& step, int c, int run0) {
    float absmax = __uint_as_float(step.absmax);
    if constexpr (kDoubleQuant) {
      const float centered =
          load_float(maps + c * sizeof(shared.maps[0]) + step.absmax * sizeof(float));
      absmax = __fadd_rn(__fmul_rn(centered, step.scale), shared.offsets[c]);
    }
    if (run0 + 2 * quarter >= row_runs) absmax = 0;
    const float scale0 = __shfl_sync(~0u, absmax, quarter / 2, 4);
    const float scale1 = __shfl_sync(~0u, absmax, 2 + quarter / 2, 4);
    const uint4* channels[kProducts];
#pragma unroll
    for (int h = 0; h < kProducts; ++h) {
      const int run = run0 + quarter + 4 * (kWide ? h : column_half);
      channels[h] = x + 4 * min(run, row_runs - 1);
      if constexpr (kTokens == 1) {
        factors[0][h] = *channels[h];
      } else {
        load_where(has_token, channels[h], factors[0][h]);
      }
    }
    const std::uint32_t words0[4] = {step.codes[0].x, step.codes[0].y, step.codes[0].z,
                                     step.codes[0].w};
    const std::uint32_t words1[4] = {step.codes[1].x, step.codes[1].y, step.codes[1].z,
                                     step.codes[1].w};
    const auto decoded = [&](std::uint32_t word, int k, float scale) {
      const float2 pair = load_pair(__dp4a(word, 128u << 8 * k, lane_pairs));
      const __nv_bfloat162 w =
          __floats2bfloat162_rn(__fmul_rn(pair.x, scale), __fmul_rn(pair.y, scale));
      return *reinterpret_cast<const std::uint32_t*>(&w);
    };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < kProducts; ++h) {
        if (kTokens > 1 && j < 3)
          load_where(has_token, channels[h] + j + 1, factors[(j + 1) % kTurns][h]);
      }
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint4 a =
            make_uint4(decoded(words0[j], k, scale0), decoded(words1[j], k, scale1),
                       decoded(words0[j], k + 1, scale0), decoded(words1[j], k + 1, scale1));
#pragma unroll
        for (int h = 0; h < kProducts; ++h) {
          const uint4& b = factors[j % kTurns][h];
          mma(sums[h][j], a, k == 0 ? b.x : b.z, k == 0 ? b.y : b.w);
        }
      }
    }
  };
  // Partial sums of piece `piece` of the round's tile n, rows 0 to 7.
  const int tile_partials = (plan.row_pieces + 1) * p.m * kTileRows;
  const auto partial = [&](int n, int piece, int t) {
    return shared.partials + n * tile_partials + (piece * p.m + t) * kTileRows;
  };

#pragma unroll 1
  for (int begin = 0; begin < block_tiles; begin += plan.round_tiles) {
    const int end = min(begin + plan.round_tiles, block_tiles);
#pragma unroll 1
    for (int n = begin + kCodebookWarps - 1 - warp; n < end; n += kCodebookWarps) {
      prefetch_low_rank(p, block + n * grid, lane);
    }
#pragma unroll 1
    while (now.n < end) {
      const int run0 = now.piece * kPieceRuns;
      next.advance(plan);
      const bool more = next.n < block_tiles;
      const auto source = source_of(next);
#pragma unroll
      for (int h = 0; h < kProducts; ++h) {
#pragma unroll
        for (int j = 0; j < 16; ++j) sums[h][j / 4][j % 4] = 0;
      }
#pragma unroll
      for (int s = 0; s < kPieceSteps; ++s) {
        const auto refill = [&] {
          if (more && s * kStepRuns < source.runs) source.load(s, quarter, steps[s]);
        };
        const CodebookStep step = steps[s];
        if constexpr (kTokens == 1) refill();
        if (run0 + s * kStepRuns < row_runs) multiply(step, now.call, run0 + s * kStepRuns);
        if constexpr (kTokens > 1) refill();
      }
      // Lane q has columns 2 q and 2 q + 1 of row `line` (0, 1) and of the row 8 further down.
      // Words 0 and 1, words 2 and 3, these two, and the runs are added in this order.
      const auto total = [&](int h, int k) {
        const auto& of = sums[h];
        return (of[0][k] + of[1][k]) + (of[2][k] + of[3][k]);
      };
      float first, second = 0;
      if constexpr (kTokens == 1) {
        const auto& of = sums[0];
        const float low = quarter < 2 ? of[0][0] + of[1][1] : of[0][2] + of[1][3];
        const float high = quarter < 2 ? of[2][0] + of[3][1] : of[2][2] + of[3][3];
        first = quarter % 2 == 0 ? low : high;
        first += __shfl_xor_sync(~0u, first, 1);
        first += __shfl_xor_sync(~0u, first, 2);
      } else if constexpr (kTokens == 4) {
        first = quarter < 2 ? total(0, 0) : total(0, 2);
        second = quarter < 2 ? total(0, 1) : total(0, 3);
        first += __shfl_xor_sync(~0u, first, 2);
        second += __shfl_xor_sync(~0u, second, 2);
      } else {
        first = total(0, 0) + total(1, 2);
        second = total(0, 1) + total(1, 3);
      }
      if (2 * quarter < kTokens) {
        float* to = partial(now.n - begin, now.piece, 2 * quarter) + line;
        if (2 * quarter < p.m) to[0] = first;
        if (2 * quarter + 1 < p.m) to[kTileRows] = second;
      }
      now = next;
    }
#pragma unroll 1
    for (int n = begin + kCodebookWarps - 1 - warp; n < end; n += kCodebookWarps) {
      low_rank_tile<kTokens>(p, block + n * grid, lane, partial(n - begin, plan.row_pieces, 0));
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - begin) * p.m * kTileRows; i += kCodebookThreads) {
      const int t = i / kTileRows % p.m, n = i / kTileRows / p.m;
      const int tile = block + (begin + n) * grid;
      const int c = p.call_of(tile);
      const int row = (tile - p.first[c]) * kTileRows + i % kTileRows;
      const float* from = partial(n, 0, t) + i % kTileRows;
      const int pitch = p.m * kTileRows;
      float sum = 0;
#pragma unroll 8
      for (int piece = 0; piece < plan.row_pieces; ++piece) sum += from[piece * pitch];
      const Result& result = p.calls[c].result;
      if (row < result.outputs) result.store(t, row, sum, from[plan.row_pieces * pitch]);
    }
    __syncthreads();
  }
}

}  // namespace nibble::cuda::matvec_kernels
