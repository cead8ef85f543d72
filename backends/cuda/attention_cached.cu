// Appending to the key-value cache, and attention over it (formulas:
// engine/ops/attention_cached.cpp).
//
// Keys are cut into chunks of 256, whatever the position: a block takes one chunk of one key-value
// head and 16 (row, query head of the group) pairs, and writes the pairs' largest score, sum of
// exponentials and weighted values of its chunk to scratch, in F32. A second kernel weighs the
// chunks that a row sees and adds them in a fixed order. Generating one token thus uses the whole
// card, and since neither the cut nor any sum depends on the other rows, a row's bytes are the same
// whether it runs alone or in a chunk of a prompt. The grid covers the whole context and blocks
// behind the position, which is read on the device, exit at once: a captured graph serves every
// step.
//
// BF16 with a head_dim of 64 or 128 runs on tensor cores: for scores the four warps split the keys,
// for values the channels; probabilities are rounded to BF16 between. Everything else runs in F32
// (attention_rows.cuh).
//
// Limits: head_dim up to 256. Rows that would lie past the context are not appended, and see the
// whole cache.
#include <algorithm>

#include "backends/cuda/attention.h"
#include "backends/cuda/attention_mma.cuh"
#include "backends/cuda/attention_rows.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kChunk = 256, kPairs = 16;
static_assert(kPairs == kOwned && kThreads == kRowThreads);

struct Args {
  const void *q, *k, *v;
  const std::int32_t* position;
  void* o;
  int rows, heads, kv_heads, context, head_dim, chunks;
  int out_width;  // head_dim rounded up to whole float4
  float scale, soft_cap;
  // Scratch, per chunk and (row, head).
  float* outs;    // [chunks, rows * heads, out_width]
  float2* terms;  // largest score (times log2 e on tensor cores), sum of exponentials
};

// What a block works on: pairs of a key-value head, by row and then by head of the group.
struct Work {
  int chunk, first_pair, kv_head, group, pairs, position;
  __device__ explicit Work(const Args& a)
      : chunk(static_cast<int>(blockIdx.x)),
        first_pair(static_cast<int>(blockIdx.y) * kPairs),
        kv_head(static_cast<int>(blockIdx.z)),
        group(a.heads / a.kv_heads),
        pairs(min(a.rows * group - first_pair, kPairs)),
        position(*a.position) {}
  __device__ int row(int pair) const { return (first_pair + pair) / group; }
  // The place among the rows times heads of the queries.
  __device__ std::int64_t place(const Args& a, int pair) const {
    return static_cast<std::int64_t>(row(pair)) * a.heads + kv_head * group +
           (first_pair + pair) % group;
  }
  // The last key that a pair sees, counted from the start of the chunk.
  __device__ int last_key(const Args& a, int pair) const {
    return min(position + row(pair), a.context - 1) - chunk * kChunk;
  }
  __device__ std::int64_t partial(const Args& a, int pair) const {
    return static_cast<std::int64_t>(chunk) * a.rows * a.heads + place(a, pair);
  }
};

// -- Tensor cores ------------------------------------------------------------------------------

constexpr int kHalf = kChunk / 2;  // keys in a buffer

template <int kDim>
struct Shared {
  static constexpr std::uint32_t kBuffer = kHalf * kDim * 2;  // twice: keys, then values
  static constexpr std::uint32_t kQuery = 2 * kBuffer;
  static constexpr std::uint32_t kProbability = kQuery;  // once the queries have been read
  static constexpr std::uint32_t kBytes = kProbability + kPairs * kChunk * 2;
  static_assert(kDim <= kChunk && kBytes + 1024 <= kSharedLimit);
};

template <int kDim>
__device__ void copy_queries(std::uint32_t tile, const Args& a, const Work& work) {
  constexpr int kChunks = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kPairs * kChunks; i += kThreads) {
    const int pair = i / kChunks, chunk = i % kChunks;
    const bool valid = pair < work.pairs;
    copy_async(tile + tile_offset<kDim>(pair, chunk),
               static_cast<const bf16*>(a.q) + work.place(a, valid ? pair : 0) * kDim + chunk * 8,
               valid);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) attend_chunk_mma(const Args a) {
  begin_kernel();
  using S = Shared<kDim>;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ float warp_largest[kWarps][kPairs], warp_sums[kWarps][kPairs];
  const Work work(a);
  const int keys = min(work.last_key(a, work.pairs - 1) + 1, kChunk);
  if (keys <= 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::uint32_t shared = shared_address(memory);
  const std::int64_t at =
      (static_cast<std::int64_t>(work.kv_head) * a.context + work.chunk * kChunk) * kDim;
  // Rows past the last visible one become zeros: they may hold anything, even NaN.
  const auto copy_half = [&](const void* from, int half) {
    copy_tile<kDim, kHalf, kThreads>(shared + half * S::kBuffer,
                                     static_cast<const bf16*>(from) + at + half * kHalf * kDim,
                                     kDim, keys - half * kHalf);
    commit_copies();
  };
  copy_queries<kDim>(shared + S::kQuery, a, work);
  copy_half(a.k, 0);
  copy_half(a.k, 1);

  // Rows g and g + 8 of 16 pairs, and of each half the warp's 32 keys.
  float scores[2][4][4];
  const std::uint32_t q_lane = rows_first<kDim>(shared + S::kQuery, 0, lane);
  const auto score_half = [&](int half) {
    const std::uint32_t k_lane = columns_first<kDim>(shared + half * S::kBuffer, warp * 32, lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      for (int e = 0; e < 4; ++e) scores[half][n][e] = 0;
    }
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      std::uint32_t left[4];
      load_matrices(left, q_lane ^ 32 * c);
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        std::uint32_t right[4];
        load_matrices(right, (k_lane ^ 32 * c) + n * 8 * kDim * 2);
        mma(scores[half][n], left, right[0], right[1]);
        mma(scores[half][n + 1], left, right[2], right[3]);
      }
    }
  };
  wait_copies<1>();
  __syncthreads();
  score_half(0);
  __syncthreads();
  copy_half(a.v, 0);
  wait_copies<1>();
  __syncthreads();
  score_half(1);
  __syncthreads();
  copy_half(a.v, 1);

  const float scale = a.scale * kLog2E;
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int pair = lane / 4 + r * 8;
    const int last = pair < work.pairs ? work.last_key(a, pair) : -1;
    float largest = -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          const int key = half * kHalf + warp * 32 + n * 8 + lane % 4 * 2 + e % 2;
          float& s = scores[half][n][e];
          s = key <= last ? s * scale : -INFINITY;
          largest = fmaxf(largest, s);
        }
      }
    }
    largest = quad_max(largest);
    if (lane % 4 == 0) warp_largest[warp][pair] = largest;
  }
  __syncthreads();
  const std::uint32_t p_tile = shared + S::kProbability;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int pair = lane / 4 + r * 8;
    float largest = warp_largest[0][pair], sum = 0;
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, warp_largest[w][pair]);
    base[r] = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float p0 = exp2_flushed(scores[half][n][2 * r] - base[r]);
        const float p1 = exp2_flushed(scores[half][n][2 * r + 1] - base[r]);
        sum += p0;
        sum += p1;
        const int chunk = half * (kHalf / 8) + warp * 4 + n;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(p_tile + tile_offset<kChunk>(pair, chunk) +
                                                     lane % 4 * 4),
                     "r"(pack_bf16(p0, p1))
                     : "memory");
      }
    }
    sum = quad_sum(sum);
    if (lane % 4 == 0) warp_sums[warp][pair] = sum;
  }
  wait_copies<0>();
  __syncthreads();

  constexpr int kBlocks = kDim / 32;  // of 8 channels, per warp
  float out[kBlocks][4];
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    for (int e = 0; e < 4; ++e) out[n][e] = 0;
  }
  const std::uint32_t p_lane = rows_first<kChunk>(p_tile, 0, lane);
  for (int c = 0; c * 16 < keys; ++c) {
    const std::uint32_t v_lane = rows_first<kDim>(shared, c * 16, lane) ^ warp * (kDim / 2);
    std::uint32_t left[4];
    load_matrices(left, p_lane ^ 32 * c);
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      std::uint32_t right[4];
      load_matrices_transposed(right, v_lane ^ 16 * n);
      mma(out[n], left, right[0], right[1]);
      mma(out[n + 1], left, right[2], right[3]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int pair = lane / 4 + r * 8;
    if (pair >= work.pairs) continue;
    const std::int64_t partial = work.partial(a, pair);
    float* to = a.outs + partial * kDim + warp * (kDim / 4) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      *reinterpret_cast<float2*>(to + n * 8) = make_float2(out[n][2 * r], out[n][2 * r + 1]);
    }
    if (warp != 0 || lane % 4 != 0) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w][pair];
    a.terms[partial] = make_float2(base[r], sum);
  }
}

// -- Any head_dim ------------------------------------------------------------------------------

template <class T, int kPasses>
__global__ void __launch_bounds__(kThreads, 1) attend_chunk_rows(const Args a) {
  begin_kernel();
  extern __shared__ __align__(16) float floats[];
  const Work work(a);
  const int keys = min(work.last_key(a, work.pairs - 1) + 1, kChunk);
  if (keys <= 0) return;
  const int d = a.head_dim, width = row_stride(d);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float *q = floats + warp * kRowsPerWarp * width, *k = floats + kOwned * width,
        *v = k + kStreamed * width;
  const std::int64_t at =
      (static_cast<std::int64_t>(work.kv_head) * a.context + work.chunk * kChunk) * d;
  int last[kRowsPerWarp];
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int pair = warp * kRowsPerWarp + r;
    const bool valid = pair < work.pairs;
    last[r] = valid ? work.last_key(a, pair) : -1;
    const T* from = static_cast<const T*>(a.q) + work.place(a, valid ? pair : 0) * d;
    for (int c = lane; c < width; c += kWarp) {
      q[r * width + c] = valid && c < d ? to_float(from[c]) : 0.0f;
    }
  }
  const Score score{a.scale, a.soft_cap};
  OnlineSoftmax<kPasses> softmax;
  softmax.clear();
  for (int j = 0; j < keys; j += kStreamed) {
    __syncthreads();
    load_rows(k, static_cast<const T*>(a.k) + at + static_cast<std::int64_t>(j) * d, d, kStreamed,
              keys - j, d);
    load_rows(v, static_cast<const T*>(a.v) + at + static_cast<std::int64_t>(j) * d, d, kStreamed,
              keys - j, d);
    __syncthreads();
    float scores[kRowsPerWarp];
    dot_rows(scores, q, k + lane * width, d);
    for (int r = 0; r < kRowsPerWarp; ++r) {
      scores[r] = j + lane <= last[r] ? score.of(scores[r]) : -INFINITY;
    }
    softmax.add(scores, v, d);
  }
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const float sum = warp_sum(softmax.sum[r]);
    const int pair = warp * kRowsPerWarp + r;
    if (pair >= work.pairs) continue;
    const std::int64_t partial = work.partial(a, pair);
    if (lane == 0) a.terms[partial] = make_float2(softmax.largest[r], sum);
    for (int i = 0; i < kPasses; ++i) {
      if (const int c = lane + i * kWarp; c < d)
        a.outs[partial * a.out_width + c] = softmax.out[r][i];
    }
  }
}

// -- The chunks of a row -----------------------------------------------------------------------

constexpr int kCombineThreads = 512;

// A block per row and head. A thread adds up four channels of every n-th chunk, n being what the
// threads suffice for; then these sums are added in order.
template <class T, bool kBase2>
__global__ void __launch_bounds__(kCombineThreads) combine(const Args a) {
  begin_kernel();
  extern __shared__ __align__(16) float weights[];
  __shared__ float4 parts[kCombineThreads];
  const std::int64_t place = blockIdx.x, places = static_cast<std::int64_t>(a.rows) * a.heads;
  const int t = static_cast<int>(place / a.heads), thread = static_cast<int>(threadIdx.x);
  const int chunks = min(*a.position + t, a.context - 1) / kChunk + 1;
  float largest = -INFINITY, sum = 0;
  for (int c = thread; c < chunks; c += kCombineThreads) {
    largest = fmaxf(largest, a.terms[c * places + place].x);
  }
  largest = block_max<kCombineThreads>(largest);
  for (int c = thread; c < chunks; c += kCombineThreads) {
    const float2 terms = a.terms[c * places + place];
    const float x = terms.x - largest, weight = kBase2 ? exp2_flushed(x) : expf(x);
    weights[c] = weight;
    sum = fmaf(weight, terms.y, sum);
  }
  const float factor = 1 / block_sum<kCombineThreads>(sum);

  const int quads = a.out_width / 4, groups = kCombineThreads / quads;
  const int quad = thread % quads, group = thread / quads;
  const auto* outs = reinterpret_cast<const float4*>(a.outs) + place * quads + quad;
  float4 out = make_float4(0, 0, 0, 0);
  if (group < groups) {
#pragma unroll 8
    for (int c = group; c < chunks; c += groups) {
      const float4 x = outs[c * places * quads];
      const float weight = weights[c];
      out.x = fmaf(weight, x.x, out.x);
      out.y = fmaf(weight, x.y, out.y);
      out.z = fmaf(weight, x.z, out.z);
      out.w = fmaf(weight, x.w, out.w);
    }
    parts[thread] = out;
  }
  __syncthreads();
  const auto* sums = reinterpret_cast<const float*>(parts);
  for (int channel = thread; channel < a.head_dim; channel += kCombineThreads) {
    float total = 0;
    for (int g = 0; g < min(groups, chunks); ++g) total += sums[g * a.out_width + channel];
    static_cast<T*>(a.o)[place * a.head_dim + channel] = from_float<T>(total * factor);
  }
}

// -- Launchers ---------------------------------------------------------------------------------

bool supports(const OpCall& call) {
  return is_computable(call.out_types[0].dtype) &&
         call.node->get<AttentionParams>().head_dim <= kMaxHeadDim;
}

// The arguments, with scratch as consecutive arrays whose bytes are returned in *used.
Args arguments(const OpCall& call, std::int64_t* used) {
  const auto params = call.node->get<AttentionParams>();
  const Shape q = call.in_types[0].shape, cache = call.in_types[1].shape;
  Args a{};
  a.q = call.in[0], a.k = call.in[1], a.v = call.in[2];
  a.position = call.input<std::int32_t>(3);
  a.o = call.out[0];
  a.rows = static_cast<int>(q[0]);
  a.heads = static_cast<int>(q[1] / params.head_dim);
  a.kv_heads = static_cast<int>(cache[0]);
  a.context = static_cast<int>(cache[1]);
  a.head_dim = params.head_dim;
  a.chunks = static_cast<int>(ceil_div(cache[1], kChunk));
  a.out_width = static_cast<int>(round_up(a.head_dim, 4));
  a.scale = params.scale;
  a.soft_cap = params.soft_cap;
  const std::int64_t partials = static_cast<std::int64_t>(a.chunks) * a.rows * a.heads;
  const std::int64_t outs_bytes = round_up(partials * a.out_width * 4, 256);
  auto* const scratch = static_cast<std::byte*>(call.scratch);
  a.outs = reinterpret_cast<float*>(scratch);
  if (scratch != nullptr) a.terms = reinterpret_cast<float2*>(scratch + outs_bytes);
  *used = outs_bytes + round_up(partials * static_cast<std::int64_t>(sizeof(float2)), 256);
  return a;
}

std::int64_t scratch_bytes(const OpCall& call, const Card&) {
  std::int64_t used = 0;
  arguments(call, &used);
  return used;
}

template <class Kernel>
void launch_chunks(Kernel kernel, const Args& a, int bytes, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(a.chunks),
                  static_cast<unsigned>(
                      ceil_div(static_cast<std::int64_t>(a.rows) * (a.heads / a.kv_heads), kPairs)),
                  static_cast<unsigned>(a.kv_heads));
  start_kernel("attention_cached", kernel, grid, kThreads, static_cast<std::size_t>(bytes), launch,
               a);
}

constexpr int row_bytes(int d) {
  return (kOwned + 2 * kStreamed) * row_stride(d) * static_cast<int>(sizeof(float));
}
static_assert(row_bytes(kMaxHeadDim) <= kSharedLimit);

// The weights of a row's chunks lie in shared memory, enough for a context of five million.
template <class T, bool kBase2>
void launch_combine(const Args& a, const Launch& launch) {
  const int bytes = a.chunks * static_cast<int>(sizeof(float));
  start_kernel("attention_cached", combine<T, kBase2>,
               static_cast<unsigned>(a.rows) * static_cast<unsigned>(a.heads), kCombineThreads,
               static_cast<std::size_t>(bytes), launch, a);
}

void run(const OpCall& call, const Launch& launch) {
  std::int64_t used = 0;
  const Args a = arguments(call, &used);
  if (a.rows == 0) return;
  if (attention_on_tensor_cores(call)) {
    if (a.head_dim == 64) {
      launch_chunks(attend_chunk_mma<64>, a, Shared<64>::kBytes, launch);
    } else {
      launch_chunks(attend_chunk_mma<128>, a, Shared<128>::kBytes, launch);
    }
    return launch_combine<bf16, true>(a, launch);
  }
  with_type(call.out_types[0].dtype, [&](auto element) {
    using T = decltype(element);
    with_passes(a.head_dim, [&](auto passes) {
      constexpr int kPasses = decltype(passes)::value;
      launch_chunks(attend_chunk_rows<T, kPasses>, a, row_bytes(a.head_dim), launch);
    });
    launch_combine<T, false>(a, launch);
  });
}

// -- kv_append ---------------------------------------------------------------------------------

// Copies rows of `width` units U: blockIdx.x is a row of x, y a head.
template <class U>
__global__ void __launch_bounds__(kThreads)
    append(U* cache, const U* x, const std::int32_t* position, int context, int width) {
  begin_kernel();
  const std::int64_t t = *position + static_cast<std::int64_t>(blockIdx.x), head = blockIdx.y;
  if (t < 0 || t >= context) return;
  const U* from = x + (static_cast<std::int64_t>(blockIdx.x) * gridDim.y + head) * width;
  U* to = cache + (head * context + t) * width;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    to[i] = from[i];
}

bool supports_append(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

void run_append(const OpCall& call, const Launch& launch) {
  const Shape cache = call.out_types[0].shape;
  const std::int64_t rows = call.in_types[1].shape[0];
  if (rows == 0) return;
  const std::int64_t bytes = cache[2] * info(call.out_types[0].dtype).block_bytes;
  const auto append_units = [&](auto unit) {
    using U = decltype(unit);
    const auto width = static_cast<int>(bytes / static_cast<std::int64_t>(sizeof(U)));
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(cache[0]));
    const int threads = static_cast<int>(std::min<std::int64_t>(kThreads, round_up(width, kWarp)));
    start_kernel("kv_append", append<U>, grid, threads, 0, launch, call.output<U>(0),
                 call.input<U>(1), call.input<std::int32_t>(2), static_cast<int>(cache[1]), width);
  };
  if (bytes % 16 == 0) return append_units(uint4{});
  append_units(std::uint16_t{});
}

}  // namespace

extern const Kernel kv_append_kernel{supports_append, nullptr, run_append};
extern const Kernel attention_cached_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cuda
