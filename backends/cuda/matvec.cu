// y[m, out] = scale * x[m, in] W^T + low_scale * u[m, r] b^T for at most 8 rows of x: decoding
// token by token. The weight is streamed once, in its storage type, so the time is that of its
// bytes.
//
// Two routes, chosen by the weight's type and the graph's dtype alone:
//
// codebook (NF4 and FP4 in BF16 graphs): matvec_codebook.cuh. Blocks of 32, rows of an odd number
// of half blocks and very long rows take the other route.
//
// rows (what is left). A warp takes one row of W for m = 1, four otherwise; a lane decodes 8
// consecutive channels at a time and multiplies in F32.
//
// In BF16 graphs decoded weights are rounded to bf16 first, as the dense route does. Each row of x
// is summed in the same order whatever m is.
#include "backends/cuda/matvec_codebook.cuh"

namespace nibble::cuda {
namespace {

using namespace matvec_kernels;

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
  begin_kernel();
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
  for (int c = p.count; c < kMaxCalls; ++c) p.first[c + 1] = p.first[p.count];
  return p;
}

template <class Decoder, class T, int kTokens>
void launch_rows(const MatVec* calls, int count, unsigned chosen, DType dtype,
                 const Launch& launch) {
  constexpr int kRows = kRowThreads / kWarp * (kTokens == 1 ? 1 : 4);
  const auto p = collect<Decoder>(calls, count, chosen, kRows);
  const auto blocks = static_cast<unsigned>(p.first[p.count]);
  if (blocks == 0) return;
  start_kernel("matvec", rows_kernel<Decoder, T, kTokens>, blocks, kRowThreads, 0, launch, p,
               tables_of<typename Decoder::Tables>(dtype));
}

template <bool kDoubleQuant, int kTokens>
void launch_codebook(const MatVec* calls, int count, unsigned chosen, DType dtype,
                     const Launch& launch) {
  const auto p = collect<CodebookDecoder>(calls, count, chosen, kTileRows);
  const int tiles = p.first[p.count];
  if (tiles == 0) return;
  constexpr int kCodebookWarps = codebook_warps(kTokens);
  CodebookPlan plan{};
  plan.row_runs = static_cast<int>(p.cols / kRun);
  plan.row_pieces = static_cast<int>(ceil_div(plan.row_runs, kPieceRuns));
  plan.step_tiles = kCodebookWarps / plan.row_pieces;
  plan.step_pieces = kCodebookWarps % plan.row_pieces;
  plan.round_tiles = kPartials / ((plan.row_pieces + 1) * p.m * kTileRows);
  const auto blocks = static_cast<unsigned>(
      std::min(tiles, blocks_per_processor(kTokens) * launch.card->multiprocessors));
  start_kernel("matvec", codebook_kernel<kDoubleQuant, kTokens>, blocks, kCodebookWarps * kWarp,
               sizeof(CodebookShared), launch, p, plan, tables_of<CodebookTables>(dtype));
}

// Calls of one weight dtype and one route share a launch.
enum class Route { rows, codebook, codebook_double_quant };

Route route(const MatVec& call) {
  constexpr int kPieces = kPartials / (kMaxRows * kTileRows) - 1;
  const TensorType& weight = call.weight;
  const std::int64_t cols = weight.shape.cols();
  // 64 channels, the share of a lane in a step, have one absmax.
  const bool fits = weight.quant.block >= 2 * kRun && cols % (2 * kRun) == 0 &&
                    cols <= kRun * kPieceRuns * kPieces;
  if (!is_codebook(weight.dtype) || call.dtype != DType::BF16 || !fits) return Route::rows;
  return weight.quant.double_quant ? Route::codebook_double_quant : Route::codebook;
}

// The chosen calls: one dtype and route.
void run_alike(const MatVec* calls, int count, unsigned chosen, const Launch& launch) {
  const MatVec& first = calls[std::countr_zero(chosen)];
  const DType stored = first.weight.dtype;
  if (const Route taken = route(first); taken != Route::rows) {
    const bool double_quant = taken == Route::codebook_double_quant;
    const auto start =
        first.m == 1   ? (double_quant ? launch_codebook<true, 1> : launch_codebook<false, 1>)
        : first.m <= 4 ? (double_quant ? launch_codebook<true, 4> : launch_codebook<false, 4>)
                       : (double_quant ? launch_codebook<true, 8> : launch_codebook<false, 8>);
    return start(calls, count, chosen, stored, launch);
  }
  with_decoder(first.weight, first.w, [&](auto decoder) {
    using Decoder = decltype(decoder);
    with_type(first.dtype, [&](auto zero) {
      using T = decltype(zero);
      if (first.m == 1) {
        launch_rows<Decoder, T, 1>(calls, count, chosen, stored, launch);
      } else {
        launch_rows<Decoder, T, kMaxRows>(calls, count, chosen, stored, launch);
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
      const bool same = weight.dtype == other.dtype && route(calls[i]) == route(calls[first]);
      if (same && (left >> i & 1) != 0) alike |= 1u << i;
    }
    run_alike(calls, count, alike, launch);
    left &= ~alike;
  }
}

}  // namespace nibble::cuda
