// y[m, out] = scale * x[m, in] W^T + low_scale * u[m, r] b^T for more rows than matvec.cu takes and
// fewer than pay for a decoded copy of W: short prompts, the tails of batches. W is read once, in
// its storage type, and decoded into the left operand of mma.sync (m16n8k16): rows of W are the
// rows of a product, rows of x its columns.
//
// A block takes 128 rows of W (16 a warp) and a slice of the channels, 64 at a time: x comes
// through shared memory, the codes of the next two steps are in registers on their way. A product
// may sum its channels in any order that both operands share: lane (g, q) decodes channels 16 q to
// 16 q + 15 of rows g and g + 8, as stored, and takes the same channels of row g of x. A second
// kernel adds the slices up in order, and the adapter's part, and rounds.
//
// The slices depend on W's shape and the card alone, and so does the order of a row's sum: its bits
// are the same whatever other rows there are. Decoded weights are rounded to bf16, as in the dense
// product.
//
// Measured on an H100, NF4, 64 rows: [4096, 4096] 31 us, against 41 for decoding W and a product;
// [11008, 4096] 68 and 85. From twice as many rows on the decoded copy wins.
#include "backends/cuda/decode.h"
#include "backends/cuda/decode/decoders.cuh"
#include "backends/cuda/mma.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlockRows = 16 * kWarps;  // of W
constexpr int kStep = 64;                // channels
constexpr int kPitch = kStep + 8;        // of x in shared memory: no two lanes share a bank
constexpr int kStages = 4;
constexpr int kAhead = 2;  // steps whose codes are in registers
constexpr int kUnits = 2;  // of a lane, row and step
static_assert(kUnits * kUnit * 4 == kStep);

template <class Decoder>
struct Args {
  Decoder decoder;
  const bf16* x;
  int m, outputs, steps, slice_steps;
  float* sums;  // [slices, m, outputs]
};

template <class Decoder, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    few_rows_kernel(const __grid_constant__ Args<Decoder> p,
                    const __grid_constant__ typename Decoder::Tables tables) {
  begin_kernel();
  extern __shared__ __align__(16) bf16 stages[];
  __shared__ typename Decoder::Tables shared;
  share_tables<kThreads>(tables, shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int line = lane / 4, quarter = lane % 4;
  const int begin = static_cast<int>(blockIdx.y) * p.slice_steps;
  const int count = min(p.slice_steps, p.steps - begin);
  const int row0 = static_cast<int>(blockIdx.x) * kBlockRows + 16 * warp + line;
  const std::int64_t row_units = static_cast<std::int64_t>(p.steps) * (kStep / kUnit);
  // Past the last row it is read again, and not stored.
  const std::int64_t first_unit[2] = {
      min(row0, p.outputs - 1) * row_units + begin * (kStep / kUnit) + quarter * kUnits,
      min(row0 + 8, p.outputs - 1) * row_units + begin * (kStep / kUnit) + quarter * kUnits};

  const auto fill = [&](int step) {
    bf16* const to = stages + step % kStages * (kTokens * kPitch);
    constexpr int kChunks = kStep / 8;
    for (int i = thread; i < kTokens * kChunks; i += kThreads) {
      const int token = i / kChunks, chunk = i % kChunks;
      const bool real = token < p.m;
      const std::int64_t row = real ? token : 0;
      copy_async(shared_address(to + token * kPitch + chunk * 8),
                 p.x + (row * p.steps + begin + step) * kStep + chunk * 8, real);
    }
  };
  typename Decoder::Raw raw[kAhead][2][kUnits];
  const auto load = [&](int step, auto& to) {
    const int at = min(step, count - 1) * (kStep / kUnit);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) to[r][i] = p.decoder.load(first_unit[r] + at + i);
    }
  };

  float sums[kTokens / 8][4]{};
  const auto multiply = [&](int step, const auto& codes) {
    std::uint32_t w[2][kUnits * kUnit / 2];  // pairs of neighbours
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        float values[kUnit];
        p.decoder.decode(codes[r][i], first_unit[r] + step * (kStep / kUnit) + i, shared, values);
#pragma unroll
        for (int k = 0; k < kUnit / 2; ++k) {
          w[r][i * kUnit / 2 + k] = pack_bf16(values[2 * k], values[2 * k + 1]);
        }
      }
    }
    const bf16* const x =
        stages + step % kStages * (kTokens * kPitch) + line * kPitch + quarter * kUnits * kUnit;
#pragma unroll
    for (int t = 0; t < kTokens / 8; ++t) {
      const uint4 low = *reinterpret_cast<const uint4*>(x + t * 8 * kPitch);
      const uint4 high = *reinterpret_cast<const uint4*>(x + t * 8 * kPitch + 8);
      const std::uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int k = 0; k < 8; k += 2) {
        const std::uint32_t a[4] = {w[0][k], w[1][k], w[0][k + 1], w[1][k + 1]};
        mma(sums[t], a, b[k], b[k + 1]);
      }
    }
  };

  for (int step = 0; step < kStages - 1; ++step) {
    if (step < count) fill(step);
    commit_copies();
  }
#pragma unroll
  for (int a = 0; a < kAhead; ++a) load(a, raw[a]);
#pragma unroll 1
  for (int first = 0; first < count; first += kAhead) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int step = first + a;
      if (step >= count) break;
      wait_copies<kStages - 2>();
      __syncthreads();  // the step is there, and the stage before it has been read
      if (step + kStages - 1 < count) fill(step + kStages - 1);
      commit_copies();
      multiply(step, raw[a]);
      load(step + kAhead, raw[a]);
    }
  }

#pragma unroll
  for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = t * 8 + quarter * 2 + e % 2, row = row0 + e / 2 * 8;
      if (token < p.m && row < p.outputs) {
        p.sums[(static_cast<std::int64_t>(blockIdx.y) * p.m + token) * p.outputs + row] =
            sums[t][e];
      }
    }
  }
}

// -- The slices and the adapter ------------------------------------------------------------------

constexpr int kFinishTokens = 4;

struct Finish {
  const float* sums;  // [slices, m, outputs]
  int slices, m, outputs, rank;
  const bf16* u;
  const void* b;
  float scale, low_scale;
  void* y;
};

// A thread: one row of W, kFinishTokens rows of x.
template <class B, class Y>
__global__ void __launch_bounds__(kThreads) finish_few_rows(const Finish p) {
  begin_kernel();
  const int row = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int token0 = static_cast<int>(blockIdx.y) * kFinishTokens;
  if (row >= p.outputs) return;
  float low[kFinishTokens]{};
  const auto* b = static_cast<const B*>(p.b) + static_cast<std::int64_t>(row) * p.rank;
  for (int j = 0; j < p.rank; ++j) {
    const float value = to_float(from_float<bf16>(to_float(b[j])));
#pragma unroll
    for (int t = 0; t < kFinishTokens; ++t) {
      const std::int64_t token = min(token0 + t, p.m - 1);
      low[t] = fmaf(to_float(p.u[token * p.rank + j]), value, low[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kFinishTokens; ++t) {
    const std::int64_t token = token0 + t, count = static_cast<std::int64_t>(p.m) * p.outputs;
    if (token >= p.m) break;
    const std::int64_t at = token * p.outputs + row;
    float sum = 0;
    for (int s = 0; s < p.slices; ++s) sum += p.sums[s * count + at];
    float value = __fmul_rn(p.scale, sum);
    if (p.rank > 0) value = fmaf(p.low_scale, low[t], value);
    static_cast<Y*>(p.y)[at] = from_float<Y>(value);
  }
}

// -- Host ----------------------------------------------------------------------------------------

struct Slices {
  int steps, count;
};
// Enough blocks for the card, but not slices so short that filling their pipeline is most of them.
Slices slices_of(const TensorType& weight, const Card& card) {
  const std::int64_t steps = weight.shape.cols() / kStep;
  const std::int64_t blocks = ceil_div(weight.shape.rows(), kBlockRows);
  const std::int64_t wanted =
      std::min(ceil_div(2 * card.multiprocessors, blocks), ceil_div(steps, 8));
  const std::int64_t slice = ceil_div(steps, wanted);
  return {static_cast<int>(slice), static_cast<int>(ceil_div(steps, slice))};
}

template <class Decoder, int kTokens>
void start(const Args<Decoder>& args, int slices, DType stored, const Launch& launch) {
  constexpr int kBytes = kStages * kTokens * kPitch * static_cast<int>(sizeof(bf16));
  static_assert(kBytes + 2048 <= kSharedLimit);
  const dim3 blocks(static_cast<unsigned>(ceil_div(args.outputs, kBlockRows)),
                    static_cast<unsigned>(slices));
  start_kernel("few_rows", few_rows_kernel<Decoder, kTokens>, blocks, kThreads, kBytes, launch,
               args, tables_of<typename Decoder::Tables>(stored));
}

}  // namespace

bool few_rows_supports(const TensorType& weight, std::int64_t m, DType dtype) {
  constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max() / 2;
  return dtype == DType::BF16 && m >= 1 && m <= kFewRows && can_decode(weight.dtype) &&
         weight.dtype != DType::BF16 && weight.shape.cols() % kStep == 0 &&
         weight.shape.rows() <= kLargest && weight.shape.cols() <= kLargest;
}

std::int64_t few_rows_scratch_bytes(const MatVec& call, const Card& card) {
  return slices_of(call.weight, card).count * call.m * call.weight.shape.rows() * 4;
}

void few_rows(const MatVec& call, void* scratch, const Launch& launch) {
  const Slices slices = slices_of(call.weight, *launch.card);
  const auto outputs = static_cast<int>(call.weight.shape.rows());
  const auto m = static_cast<int>(call.m);
  with_decoder(call.weight, call.w, [&](auto decoder) {
    using Decoder = decltype(decoder);
    const Args<Decoder> args{decoder,
                             static_cast<const bf16*>(call.x),
                             m,
                             outputs,
                             static_cast<int>(call.weight.shape.cols() / kStep),
                             slices.steps,
                             static_cast<float*>(scratch)};
    const auto start_with = m <= 32 ? start<Decoder, 32> : start<Decoder, 64>;
    start_with(args, slices.count, call.weight.dtype, launch);
  });
  const Finish finish{static_cast<const float*>(scratch),
                      slices.count,
                      m,
                      outputs,
                      static_cast<int>(call.rank),
                      static_cast<const bf16*>(call.u),
                      call.b,
                      call.scale,
                      call.low_scale,
                      call.y};
  const dim3 blocks(static_cast<unsigned>(ceil_div(outputs, kThreads)),
                    static_cast<unsigned>(ceil_div(m, kFinishTokens)));
  with_type(call.b_type.dtype, [&](auto b) {
    with_type(call.y_dtype, [&](auto y) {
      start_kernel("few_rows", finish_few_rows<decltype(b), decltype(y)>, blocks, kThreads, 0,
                   launch, finish);
    });
  });
}

}  // namespace nibble::cuda
