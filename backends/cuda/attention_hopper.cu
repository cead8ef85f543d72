// Causal attention within documents on Hopper, BF16, head dimensions 64 and 128 (FlashAttention-3,
// arXiv 2407.08608). Formulas: engine/ops/attention.cpp.
//
// One block per multiprocessor takes tiles of 64 kConsumers query rows of one head from a shared
// counter, the last rows first: they see the most keys. A tile visits its keys in tiles of 128 from
// the diagonal down to the first one that its first row sees; scores and probabilities stay in
// registers, with the running maximum m and sum of the usual online softmax:
//   s = q k^T,  p = exp2(c s - c m),  o = exp2(c m_old - c m) o + p v,  c = scale log2(e)
// Probabilities are rounded to BF16 before p v; sums are F32.
//
// Warpgroup 0 loads (one thread: tensor copies into two-stage rings of query, key and value tiles),
// the others compute 64 rows each. Two overlaps keep the tensor cores busy: a warpgroup starts the
// scores of the next key tile before p v of this one and computes the softmax under p v; and the
// warpgroups start their products in turns, so that the softmax of one runs under those of the
// other. The output leaves through shared memory while the next tile is already being loaded.
//
// Rows past the end read as zero and are not stored. Which block computes a tile depends on timing,
// what it computes does not.
#include <algorithm>

#include "backends/cuda/attention.h"
#include "backends/cuda/hopper_attention.cuh"

namespace nibble::cuda {
namespace {

using namespace hopper;

template <int kHeadDim, int kConsumers>
struct Shared {
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  static constexpr int kRows = 64 * kConsumers;
  alignas(1024) bf16 q[kStages][kBoxes][kRows][kBoxColumns];
  bf16 o[kBoxes][kRows][kBoxColumns];
  bf16 k[kStages][kBoxes][kKeys][kBoxColumns];
  bf16 v[kStages][kBoxes][kKeys][kBoxColumns];
  Barrier q_full[kStages], q_empty[kStages];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  int tile[kStages];  // under q_full; -1: no more
};

struct Args {
  CUtensorMap q, k, v, o;
  const std::int32_t* span_begin;
  float* lse;
  int* next_tile;
  int rows, heads, group;  // group: query heads per key-value head
  float scale;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kHeadDim, int kConsumers>
__device__ void load_tiles(const Args& args, Shared<kHeadDim, kConsumers>& shared) {
  using S = Shared<kHeadDim, kConsumers>;
  Ring q, k, v;
  int number = static_cast<int>(blockIdx.x);
  while (number < QueryTile<S::kRows>::count(args.rows, args.heads)) {
    const int next = static_cast<int>(gridDim.x) + atomicAdd(args.next_tile, 1);
    const QueryTile<S::kRows> tile(number, args.rows, args.heads, args.span_begin);
    const int column = tile.head / args.group * kHeadDim;
    const auto load_keys = [&](int key_tile) {
      shared.k_empty[k.stage].wait(k.parity ^ 1);
      shared.k_full[k.stage].arrive_expecting(static_cast<int>(sizeof(shared.k[0])));
      load_tile<kKeys>(shared.k[k.stage], args.k, column, key_tile * kKeys, shared.k_full[k.stage]);
      k.advance();
    };
    const auto load_values = [&](int key_tile) {
      shared.v_empty[v.stage].wait(v.parity ^ 1);
      shared.v_full[v.stage].arrive_expecting(static_cast<int>(sizeof(shared.v[0])));
      load_tile<kKeys>(shared.v[v.stage], args.v, column, key_tile * kKeys, shared.v_full[v.stage]);
      v.advance();
    };
    load_keys(tile.last_key_tile);
    shared.q_empty[q.stage].wait(q.parity ^ 1);
    shared.tile[q.stage] = number;
    shared.q_full[q.stage].arrive_expecting(static_cast<int>(sizeof(shared.q[0])));
    load_tile<64>(shared.q[q.stage], args.q, tile.head * kHeadDim, tile.first_row,
                  shared.q_full[q.stage]);
    q.advance();
    for (int key_tile = tile.last_key_tile - 1; key_tile >= tile.first_key_tile; --key_tile) {
      load_keys(key_tile);
      load_values(key_tile + 1);
    }
    load_values(tile.first_key_tile);
    number = next;
  }
  shared.q_empty[q.stage].wait(q.parity ^ 1);
  shared.tile[q.stage] = -1;
  shared.q_full[q.stage].arrive();
}

// Two rows of a thread: row and row + 8.
struct Softmax {
  float most[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};     // of this thread's columns
  float shrink[2] = {1, 1};  // of earlier sums and outputs, by the last step

  // s becomes p. c > 0.
  template <int kSize>
  __device__ void step(float (&s)[kSize], float c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float now = most[h];
#pragma unroll
      for (int i = 0; i < kSize; i += 4) now = fmaxf(now, fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
      // A row that has seen no key yet keeps zeros.
      const float shift = now == -INFINITY ? 0 : now * c;
      shrink[h] = exp2_approx(fmaf(most[h], c, -shift));
      most[h] = now;
      float total = 0;
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        s[i + 2 * h] = exp2_approx(fmaf(s[i + 2 * h], c, -shift));
        s[i + 2 * h + 1] = exp2_approx(fmaf(s[i + 2 * h + 1], c, -shift));
        total += s[i + 2 * h] + s[i + 2 * h + 1];
      }
      sum[h] = fmaf(sum[h], shrink[h], total);
    }
  }
  template <int kSize>
  __device__ void shrink_rows(float (&o)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) o[i] *= shrink[(i / 2) % 2];
  }
};

template <int kHeadDim, int kConsumers>
__device__ void compute_tiles(const Args& args, Shared<kHeadDim, kConsumers>& shared,
                              int consumer) {
  using S = Shared<kHeadDim, kConsumers>;
  constexpr int kTurns = 1, kWarpgroupOnly = kTurns + kConsumers;  // named barriers
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % kWarp;
  const float c = args.scale * kLog2E;
  const Turns<kConsumers> turns{kTurns, consumer};
  turns.begin();

  for (Ring q, k, v;; q.advance()) {
    shared.q_full[q.stage].wait(q.parity);
    // Read by the lane that will release it.
    const int number = __shfl_sync(~0u, lane == 0 ? shared.tile[q.stage] : 0, 0);
    if (number < 0) break;
    const QueryTile<S::kRows> tile(number, args.rows, args.heads, args.span_begin);
    const int first_row = tile.first_row + 64 * consumer;
    const int row = first_row + 16 * (thread / kWarp) + lane / 4;
    const int begin[2] = {args.span_begin[min(row, args.rows - 1)],
                          args.span_begin[min(row + 8, args.rows - 1)]};
    const int last_begin = args.span_begin[min(first_row + 63, args.rows - 1)];

    float s[kKeys / 2], o[kHeadDim / 2] = {};
    std::uint32_t p[kKeys / 16][4];
    Softmax softmax;

    const auto start_scores = [&] {
      products_along<kHeadDim>(s, shared.q[q.stage][0][64 * consumer], S::kRows, shared.k[k.stage],
                               kKeys);
    };
    const auto start_output = [&] { products_across(o, p, shared.v[v.stage]); };
    const auto mask = [&](int key_tile) {
      const int first_key = key_tile * kKeys;
      if (first_key + kKeys - 1 <= first_row && first_key >= last_begin) return;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2, h = i / 2 % 2;
        if (key > row + 8 * h || key < begin[h]) s[i] = -INFINITY;
      }
    };

    shared.k_full[k.stage].wait(k.parity);
    start_scores();
    products_wait<0>();
    hold(s);
    release(shared.k_empty[k.stage]);
    k.advance();
    mask(tile.last_key_tile);
    softmax.step(s, c);
    round_fragments(s, p);

    for (int key_tile = tile.last_key_tile - 1; key_tile >= tile.first_key_tile; --key_tile) {
      shared.k_full[k.stage].wait(k.parity);
      turns.take();
      start_scores();
      shared.v_full[v.stage].wait(v.parity);
      start_output();
      turns.pass();
      products_wait<1>();
      hold(s);
      release(shared.k_empty[k.stage]);
      k.advance();
      mask(key_tile);
      softmax.step(s, c);
      products_wait<0>();
      hold(o);
      hold(p);
      release(shared.v_empty[v.stage]);
      v.advance();
      softmax.shrink_rows(o);
      round_fragments(s, p);
    }
    release(shared.q_empty[q.stage]);
    shared.v_full[v.stage].wait(v.parity);
    start_output();
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = softmax.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[h] = 1 / sum;
      if (lane % 4 == 0 && row + 8 * h < args.rows) {
        args.lse[static_cast<std::int64_t>(row + 8 * h) * args.heads + tile.head] =
            softmax.most[h] * args.scale + logf(sum);
      }
    }
    // The stores of the tile before have left shared memory.
    if (thread == 0) wait_stores_read();
    named_sync(kWarpgroupOnly + consumer, kWarpgroup);
    products_wait<0>();
    hold(o);
    hold(p);
    release(shared.v_empty[v.stage]);
    v.advance();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= inverse[(i / 2) % 2];
    store_rows(shared.o, 64 * consumer, o);
    fence_async();
    named_sync(kWarpgroupOnly + consumer, kWarpgroup);
    if (thread == 0) {
      for (int box = 0; box < S::kBoxes; ++box) {
        store_box(args.o, tile.head * kHeadDim + box * kBoxColumns, first_row,
                  shared.o[box][64 * consumer]);
      }
      commit_stores();
    }
  }
  if (thread == 0) wait_stores();
}

#endif

template <int kHeadDim, int kConsumers>
__global__ void __launch_bounds__((kConsumers + 1) * kWarpgroup, 1)
    attention_tiles(const __grid_constant__ Args args) {
  begin_kernel();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  using S = Shared<kHeadDim, kConsumers>;
  auto& shared = *reinterpret_cast<S*>(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      shared.q_full[stage].init(1);
      shared.q_empty[stage].init(4 * kConsumers);
      shared.k_full[stage].init(1);
      shared.v_full[stage].init(1);
      shared.k_empty[stage].init(4 * kConsumers);
      shared.v_empty[stage].init(4 * kConsumers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  constexpr int kFew = kConsumers == 2 ? 40 : 32, kMany = kConsumers == 2 ? 232 : 160;
  static_assert(registers_fit(kConsumers, kFew, kMany));
  if (warpgroup == 0) {
    registers_shrink<kFew>();
    if (threadIdx.x == 0) load_tiles(args, shared);
  } else {
    registers_grow<kMany>();
    compute_tiles(args, shared, warpgroup - 1);
  }
#endif
}

template <int kHeadDim, int kConsumers>
void run(const Args& args, const Launch& launch) {
  using S = Shared<kHeadDim, kConsumers>;
  constexpr int kBytes = static_cast<int>(sizeof(S));
  static_assert(kBytes <= kSharedBytes);
  const auto kernel = attention_tiles<kHeadDim, kConsumers>;
  check(cudaMemsetAsync(args.next_tile, 0, sizeof(int), launch.stream), "attention: tile counter");
  const int blocks =
      std::min(QueryTile<S::kRows>::count(args.rows, args.heads), launch.card->multiprocessors);
  start_kernel("attention", kernel, static_cast<unsigned>(blocks), (kConsumers + 1) * kWarpgroup,
               kBytes, launch, args);
}

}  // namespace

bool attention_hopper_supports(const OpCall& call, const Card& card) {
  return card.hopper && card.shared_bytes >= kSharedBytes && attention_on_tensor_cores(call) &&
         call.in_types[0].shape[0] < (1 << 24);
}

std::int64_t attention_hopper_scratch_bytes(const OpCall&, const Card&) { return sizeof(int); }

void attention_hopper(const OpCall& call, const Launch& launch) {
  const AttentionShape shape(call);
  const auto queries = [&](const void* address) {
    return tensor_map(address, shape.rows, shape.heads * shape.head_dim, 64);
  };
  const auto keys = [&](const void* address) {
    return tensor_map(address, shape.rows, shape.kv_heads * shape.head_dim, kKeys);
  };
  const Args args{queries(call.in[0]),
                  keys(call.in[1]),
                  keys(call.in[2]),
                  queries(call.out[0]),
                  call.input<std::int32_t>(3),
                  call.output<float>(1),
                  static_cast<int*>(call.scratch),
                  static_cast<int>(shape.rows),
                  static_cast<int>(shape.heads),
                  static_cast<int>(shape.heads / shape.kv_heads),
                  shape.params.scale};
  if (shape.head_dim == 128) {
    run<128, 2>(args, launch);
  } else if (ceil_div(shape.rows, 192) * shape.heads >= 8 * launch.card->multiprocessors) {
    run<64, 3>(args, launch);
  } else {
    // Tiles of 192 rows do more per load, but here they would be too few to go around evenly.
    run<64, 2>(args, launch);
  }
}

}  // namespace nibble::cuda
