// y[m, out] = scale * x[m, in] W^T + low_scale * u[m, r] b^T for at most 8 rows of x: decoding
// token by token. The weight is streamed once, in its storage type, so the time is that of its
// bytes.
//
// Two routes, chosen by the weight's format and dtype alone:
//
// codebook (NF4 and FP4 in BF16 graphs). A memory at 3 TB/s delivers about 25 such elements per
// cycle and multiprocessor, so that a weight may cost 5 instructions of a lane. The products
// therefore run on the tensor cores (mma m16n8k16, x as the rows, 8 rows of W as the columns),
// which take the decoded pair of bf16 as it is, and a byte of codes is looked up whole: a table of
// 256 pairs of floats, copied for each lane of a half warp so that no two lanes share a bank; a
// byte dot product makes the address. A tile is 8 rows of W; its 8 warps take chunks of 128
// channels in turn, a lane 32 consecutive channels of one row in each. Partial sums meet in shared
// memory and are added in warp order. Measured on an H100 with m = 1: half of that memory's rate
// for [44032, 4096]; a launch of its own costs about 3 us besides.
//
// rows (every other format, and F32 graphs). A warp takes one row of W for m = 1, four otherwise; a
// lane decodes 8 consecutive channels at a time and multiplies in F32.
//
// In BF16 graphs decoded weights are rounded to bf16 first, as the dense route does. Each row of x
// is summed in the same order whatever m is.
#include "backends/cuda/decode.h"
#include "backends/cuda/decode/decoders.cuh"

namespace nibble::cuda {
namespace {

constexpr int kMaxCalls = 4;
constexpr int kMaxRows = 8;  // of x
constexpr int kSector = 32;  // bytes that memory delivers at once

// The adapter's part, and where results go.
struct Result {
  std::int64_t outputs;
  float scale, low_scale;
  std::int64_t rank;
  const void* u;
  const void* b;
  void* y;
  bool b_is_bf16, y_is_bf16;

  __device__ void store(int token, std::int64_t row, float sum, float low) const {
    float value = __fmul_rn(scale, sum);
    if (rank > 0) value = fmaf(low_scale, low, value);
    const std::int64_t at = token * outputs + row;
    if (y_is_bf16) {
      static_cast<bf16*>(y)[at] = from_float<bf16>(value);
    } else {
      static_cast<float*>(y)[at] = value;
    }
  }
};

// A value as the products of a graph of T see it.
template <class T>
__device__ inline float rounded(float x) {
  return to_float(from_float<T>(x));
}

// sum_j u[token, j] b[row, j] for each token, by a warp; the sums are in every lane.
template <class T, int kTokens>
__device__ inline void low_rank(const Result& result, std::int64_t row, int m, int lane,
                                float (&sums)[kTokens]) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = 0;
  if (result.rank == 0) return;
  const auto* u = static_cast<const T*>(result.u);
#pragma unroll 1
  for (std::int64_t j = lane; j < result.rank; j += kWarp) {
    const std::int64_t at = row * result.rank + j;
    const float b = result.b_is_bf16 ? to_float(static_cast<const bf16*>(result.b)[at])
                                     : rounded<T>(static_cast<const float*>(result.b)[at]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < m) sums[t] = fmaf(to_float(u[t * result.rank + j]), b, sums[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t < m) sums[t] = warp_sum(sums[t]);
  }
}

// Brings row `row` of b nearer, for low_rank to find it later.
__device__ inline void prefetch_low_rank(const Result& result, std::int64_t row, int lane) {
  const std::int64_t bytes = result.rank * (result.b_is_bf16 ? 2 : 4);
  if (row >= result.outputs || lane * kSector >= bytes) return;
  const auto* at = static_cast<const std::uint8_t*>(result.b) + row * bytes + lane * kSector;
  asm volatile("prefetch.global.L2 [%0];" : : "l"(at));
}

// Calls of one kernel; call c has the tiles (or blocks) from first[c] on.
template <class Decoder>
struct Calls {
  struct Call {
    Decoder decoder;
    Result result;
  };
  // What every thread reads first comes first: it is one line of the constant cache.
  int count;
  int m;
  int first[kMaxCalls + 1];
  std::int64_t cols;
  const void* x;
  Call calls[kMaxCalls];

  __device__ int call_of(int tile) const {
    int c = 0;
    while (c + 1 < count && tile >= first[c + 1]) ++c;
    return c;
  }
};

// ---- rows

constexpr int kRowThreads = 256;

__device__ inline void load_unit(const bf16* from, float (&out)[kUnit]) {
  const Pack<bf16> pack = load_pack(from);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) out[i] = to_float(pack.values[i]);
}
__device__ inline void load_unit(const float* from, float (&out)[kUnit]) {
  const Pack<float> low = load_pack(from), high = load_pack(from + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = low.values[i];
    out[4 + i] = high.values[i];
  }
}

template <class Decoder, class T, int kTokens>
__global__ void __launch_bounds__(kRowThreads)
    rows_kernel(const __grid_constant__ Calls<Decoder> p,
                const __grid_constant__ typename Decoder::Tables tables) {
  constexpr int kRows = kTokens == 1 ? 1 : 4;
  constexpr int kAhead = kTokens == 1 ? 4 : 1;  // units of a row in flight
  static_assert(kRows * kTokens <= kWarp);
  __shared__ typename Decoder::Tables shared;
  share_tables<kRowThreads>(tables, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int c = p.call_of(static_cast<int>(blockIdx.x));
  const auto& call = p.calls[c];
  const Decoder decoder = call.decoder;
  const std::int64_t outputs = call.result.outputs;
  const std::int64_t row0 =
      ((static_cast<std::int64_t>(blockIdx.x) - p.first[c]) * (kRowThreads / kWarp) + warp) * kRows;
  if (row0 >= outputs) return;

  const std::int64_t units = p.cols / kUnit;
  const auto* x = static_cast<const T*>(p.x);
  float acc[kRows][kTokens] = {};
  for (std::int64_t base = lane; base < units; base += kAhead * kWarp) {
    typename Decoder::Raw raw[kAhead][kRows];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Past the end the last unit and the last row are read again, and not used.
        const std::int64_t row = min(row0 + r, outputs - 1);
        raw[a][r] = decoder.load(row * units + min(base + a * kWarp, units - 1));
      }
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const std::int64_t unit = base + a * kWarp;
      if (unit >= units) break;
      float w[kRows][kUnit];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        decoder.decode(raw[a][r], min(row0 + r, outputs - 1) * units + unit, shared, w[r]);
        if constexpr (!Decoder::kBf16) {
#pragma unroll
          for (int i = 0; i < kUnit; ++i) w[r][i] = rounded<T>(w[r][i]);
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= p.m) break;
        float values[kUnit];
        load_unit(x + t * p.cols + unit * kUnit, values);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kUnit; ++i) acc[r][t] = fmaf(w[r][i], values[i], acc[r][t]);
        }
      }
    }
  }
  // Lane r * kTokens + t keeps the result of row r and token t.
  float sum = 0, low = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float lows[kTokens];
    low_rank<T>(call.result, min(row0 + r, outputs - 1), p.m, lane, lows);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float total = warp_sum(acc[r][t]);
      if (lane == r * kTokens + t) {
        sum = total;
        low = lows[t];
      }
    }
  }
  const int token = lane % kTokens;
  const std::int64_t row = row0 + lane / kTokens;
  if (lane < kRows * kTokens && token < p.m && row < outputs) {
    call.result.store(token, row, sum, low);
  }
}

// ---- codebook

constexpr int kTileRows = 8, kTileWarps = 8;
constexpr int kTilesPerBlock = 2, kBlocksPerProcessor = 2;
constexpr int kCodebookThreads = kTilesPerBlock * kTileWarps * kWarp;
// A run is 32 channels of a row, what a lane loads at once; a chunk is the 4 runs of a warp's rows.
constexpr int kRun = 32, kChunkRuns = 4;

struct CodebookShared {
  float2 pairs[256][16];  // of byte b: the values of its high and its low nibble, 16 times
  float maps[kMaxCalls][256];
  // Two sets in turn, so that one barrier a tile is enough.
  float partial[2][kTilesPerBlock][kTileWarps][kMaxRows][kTileRows];
};
static_assert(sizeof(CodebookShared) <= kSharedLimit);

// Read once: kept out of L1, where x stays.
__device__ inline uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
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

// A run as stored.
struct CodebookRun {
  uint4 codes;
  std::uint32_t absmax;  // the 8-bit code, or the float's bits
  float scale;           // of the code's group
};

// The runs that a lane loads, one after another: its warp's chunks of a tile, then those of its
// next tile.
template <bool kDoubleQuant>
struct CodebookCursor {
  const Calls<CodebookDecoder>& p;
  int tiles, row_runs, stride, warp, line, quarter;
  int tile, run, call, first_run;

  __device__ void enter(int next_tile) {
    tile = next_tile;
    run = warp * kChunkRuns + quarter;
    if (warp * kChunkRuns >= row_runs) tile = tiles;
    if (tile >= tiles) return;
    call = p.call_of(tile);
    // Past the last row it is read again, and not stored.
    const int row = min((tile - p.first[call]) * kTileRows + line,
                        static_cast<int>(p.calls[call].result.outputs) - 1);
    first_run = row * row_runs;
  }
  __device__ void load(CodebookRun& to) {
    if (tile >= tiles) return;
    const CodebookDecoder& decoder = p.calls[call].decoder;
    // Past the last channel a lane reads the row's last run; see `inside` in the kernel.
    const int at = first_run + min(run, row_runs - 1);
    const int block = at >> (decoder.absmax.block_shift - 5);
    if constexpr (kDoubleQuant) {
      to.absmax = load_u8(decoder.absmax.absmax + block);
      to.scale = __ldg(decoder.absmax.scale + (block >> 8));
    } else {
      to.absmax = __ldg(reinterpret_cast<const std::uint32_t*>(decoder.absmax.absmax) + block);
    }
    to.codes = load_once(reinterpret_cast<const uint4*>(decoder.codes) + at);
    run += kTileWarps * kChunkRuns;
    if (run - quarter >= row_runs) enter(tile + stride);
  }
};

template <bool kDoubleQuant>
__global__ void __launch_bounds__(kCodebookThreads, kBlocksPerProcessor)
    codebook_kernel(const __grid_constant__ Calls<CodebookDecoder> p,
                    const __grid_constant__ CodebookTables tables) {
  extern __shared__ __align__(256) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<CodebookShared*>(memory);
  const int lane = threadIdx.x % kWarp;
  const int group = threadIdx.x / (kTileWarps * kWarp);
  const int warp = threadIdx.x / kWarp % kTileWarps;
  const int line = lane / 4, quarter = lane % 4;
  const int row_runs = static_cast<int>(p.cols / kRun);
  const int tiles = p.first[p.count], stride = static_cast<int>(gridDim.x) * kTilesPerBlock;
  const int first_tile = static_cast<int>(blockIdx.x + gridDim.x * group);
  CodebookCursor<kDoubleQuant> cursor{p, tiles, row_runs, stride, warp, line, quarter, 0, 0, 0, 0};
  cursor.enter(first_tile);

  // Two chunks are under way at any time, also while the tables are built. They are used in turn,
  // not moved from one place to the other, since a move would wait for its load.
  CodebookRun even{}, odd{};
  cursor.load(even);
  cursor.load(odd);
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
  }
  __syncthreads();
  auto lane_pairs =
      static_cast<std::uint32_t>(__cvta_generic_to_shared(&shared.pairs[0][lane % 16]));
  static_assert(sizeof(shared.pairs[0]) == 128);
  // Lines past m have no token, and load none: a load costs by the lanes that take part.
  const bool has_token = line < p.m;
  const auto* x = static_cast<const bf16*>(p.x) + (has_token ? line : 0) * p.cols;
  // Kept in registers: left alone the compiler works them out again in the loop. It also keeps the
  // loads from the table behind the barrier.
  asm volatile("" : "+r"(lane_pairs), "+l"(x));

  // The tile in work.
  int tile = first_tile, turn = 0, c = 0, row = 0, i = 0;
  float offset = 0;
  // A register quad of x, channels 0 to 7, is an operand a as it is: channels {0, 1, 4, 5} lie in
  // its rows 0 to 7 and {2, 3, 6, 7} in its rows 8 to 15. The weights of the former meet it in
  // `upper`, whose rows 0 to 7 are wanted, those of the latter in `lower`, whose rows 8 to 15 are;
  // the other halves are never read.
  float upper[4], lower[4];

  const auto begin_tile = [&] {
    c = p.call_of(tile);
    const auto& call = p.calls[c];
    row = (tile - p.first[c]) * kTileRows + warp;
    i = warp * kChunkRuns + quarter;
    if constexpr (kDoubleQuant) offset = __ldg(call.decoder.absmax.offset);
    prefetch_low_rank(call.result, row, lane);
#pragma unroll
    for (int k = 0; k < 4; ++k) upper[k] = lower[k] = 0;
  };
  const auto end_tile = [&] {
    const Result& result = p.calls[c].result;
    auto& partial = shared.partial[turn][group];
    partial[warp][line][2 * quarter] = upper[0] + lower[2];
    partial[warp][line][2 * quarter + 1] = upper[1] + lower[3];
    // The two tiles of a block go their own ways.
    asm volatile("bar.sync %0, %1;" : : "r"(1 + group), "r"(kTileWarps * kWarp) : "memory");
    if (row < result.outputs) {
      // Warp w has row w of the tile, lane t token t.
      float low = 0;
      if (result.rank > 0) {
        float lows[kMaxRows];
        low_rank<bf16>(result, row, p.m, lane, lows);
#pragma unroll
        for (int t = 0; t < kMaxRows; ++t) low = lane == t ? lows[t] : low;
      }
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kTileWarps; ++w) sum += partial[w][lane % kMaxRows][warp];
      if (lane < p.m) result.store(lane, row, sum, low);
    }
    tile += stride;
    turn ^= 1;
  };
  const auto multiply = [&](CodebookRun& slot) {
    const CodebookRun run = slot;
    cursor.load(slot);
    const float absmax = kDoubleQuant
                             ? __fadd_rn(__fmul_rn(shared.maps[c][run.absmax], run.scale), offset)
                             : __uint_as_float(run.absmax);
    const bool inside = i < row_runs;
    const float scale = inside ? absmax : 0;
    const auto* channels = reinterpret_cast<const uint4*>(x) + 4 * min(i, row_runs - 1);
    const std::uint32_t words[4] = {run.codes.x, run.codes.y, run.codes.z, run.codes.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 a = make_uint4(0, 0, 0, 0);
      if (has_token) a = __ldg(channels + j);
      std::uint32_t b[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = load_pair(__dp4a(words[j], 128u << 8 * k, lane_pairs));
        const __nv_bfloat162 w =
            __floats2bfloat162_rn(__fmul_rn(pair.x, scale), __fmul_rn(pair.y, scale));
        b[k] = *reinterpret_cast<const std::uint32_t*>(&w);
      }
      mma(upper, a, b[0], b[2]);
      mma(lower, a, b[1], b[3]);
    }
    i += kTileWarps * kChunkRuns;
  };
  // A chunk, when this warp has one left, and what follows the tile's last.
  const auto step = [&](CodebookRun& slot) {
    if (i - quarter < row_runs) multiply(slot);
    if (i - quarter < row_runs) return true;
    end_tile();
    if (tile >= tiles) return false;
    begin_tile();
    return true;
  };
  if (tile >= tiles) return;
  begin_tile();
  while (step(even) && step(odd)) {
  }
}

// ---- launchers

Result result_of(const MatVec& call) {
  Result r{};
  r.outputs = call.weight.shape.rows();
  r.scale = call.scale;
  r.low_scale = call.low_scale;
  r.rank = call.rank;
  r.u = call.u;
  r.b = call.b;
  r.b_is_bf16 = call.b_type.dtype == DType::BF16;
  r.y = call.y;
  r.y_is_bf16 = call.y_dtype == DType::BF16;
  return r;
}

// The calls of `calls` whose bit is set in `chosen`, which share dtype, m, x and storage type, with
// `tile_rows` rows of W a tile.
template <class Decoder>
Calls<Decoder> collect(const MatVec* calls, int count, unsigned chosen, std::int64_t tile_rows) {
  Calls<Decoder> p{};
  for (int i = 0; i < count; ++i) {
    if ((chosen >> i & 1) == 0) continue;
    const MatVec& call = calls[i];
    with_decoder(call.weight, call.w, [&](auto decoder) {
      if constexpr (std::is_same_v<decltype(decoder), Decoder>) {
        p.calls[p.count].decoder = decoder;
      }
    });
    p.calls[p.count].result = result_of(call);
    const std::int64_t call_tiles = ceil_div(call.weight.shape.rows(), tile_rows);
    p.first[p.count + 1] = p.first[p.count] + static_cast<int>(call_tiles);
    ++p.count;
    p.m = static_cast<int>(call.m);
    p.cols = call.weight.shape.cols();
    p.x = call.x;
  }
  return p;
}

template <class Decoder, class T, int kTokens>
void launch_rows(const MatVec* calls, int count, unsigned chosen, DType dtype,
                 const Launch& launch) {
  constexpr int kRows = kRowThreads / kWarp * (kTokens == 1 ? 1 : 4);
  const auto p = collect<Decoder>(calls, count, chosen, kRows);
  const auto blocks = static_cast<unsigned>(p.first[p.count]);
  if (blocks == 0) return;
  rows_kernel<Decoder, T, kTokens>
      <<<blocks, kRowThreads, 0, launch.stream>>>(p, tables_of<typename Decoder::Tables>(dtype));
  launched("matvec");
}

void launch_codebook(const MatVec* calls, int count, unsigned chosen, DType dtype,
                     const Launch& launch) {
  const auto p = collect<CodebookDecoder>(calls, count, chosen, kTileRows);
  const bool double_quant = calls[std::countr_zero(chosen)].weight.quant.double_quant;
  const auto kernel = double_quant ? codebook_kernel<true> : codebook_kernel<false>;
  const int tiles = p.first[p.count];
  if (tiles == 0) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             sizeof(CodebookShared)),
        "matvec");
  const int blocks = std::min(tiles, kBlocksPerProcessor * launch.card->multiprocessors);
  kernel<<<blocks, kCodebookThreads, sizeof(CodebookShared), launch.stream>>>(
      p, tables_of<CodebookTables>(dtype));
  launched("matvec");
}

// The chosen calls: one storage type.
void run_alike(const MatVec* calls, int count, unsigned chosen, const Launch& launch) {
  const MatVec& first = calls[std::countr_zero(chosen)];
  const DType stored = first.weight.dtype;
  if (is_codebook(stored) && first.dtype == DType::BF16) {
    return launch_codebook(calls, count, chosen, stored, launch);
  }
  with_decoder(first.weight, first.w, [&](auto decoder) {
    using Decoder = decltype(decoder);
    with_type(first.dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (!(std::is_same_v<Decoder, CodebookDecoder> && std::is_same_v<T, bf16>)) {
        if (first.m == 1) {
          launch_rows<Decoder, T, 1>(calls, count, chosen, stored, launch);
        } else {
          launch_rows<Decoder, T, kMaxRows>(calls, count, chosen, stored, launch);
        }
      }
    });
  });
}

}  // namespace

bool matvec_supports(const TensorType& weight, std::int64_t m, DType dtype) {
  if (m < 1 || m > kMaxRows || !is_computable(dtype) || !can_decode(weight.dtype)) return false;
  // Numbers of tiles, channels and runs are 32 bits.
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max() / 2;
  const std::int64_t rows = weight.shape.rows(), cols = weight.shape.cols();
  if (rows > kLargest || cols > kLargest || rows * (cols / kRun) > kLargest) return false;
  // Rows of whole units, and of whole 16-byte loads of codes.
  return cols % (is_codebook(weight.dtype) ? kRun : kUnit) == 0;
}

void matvec(const MatVec& call, const Launch& launch) { matvec_group(&call, 1, launch); }

void matvec_group(const MatVec* calls, int count, const Launch& launch) {
  unsigned left = (1u << count) - 1;
  while (left != 0) {
    const int first = std::countr_zero(left);
    unsigned alike = 0;
    for (int i = first; i < count; ++i) {
      const TensorType &weight = calls[i].weight, &other = calls[first].weight;
      const bool same =
          weight.dtype == other.dtype &&
          (!is_codebook(weight.dtype) || weight.quant.double_quant == other.quant.double_quant);
      if (same && (left >> i & 1) != 0) alike |= 1u << i;
    }
    run_alike(calls, count, alike, launch);
    left &= ~alike;
  }
}

}  // namespace nibble::cuda
