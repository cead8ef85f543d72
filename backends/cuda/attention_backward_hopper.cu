// The gradient of causal attention within documents on Hopper, BF16, head dimensions 64 and 128
// (FlashAttention-2 and -3, arXiv 2307.08691 and 2407.08608). Formulas: engine/ops/attention.cpp.
//
// Three kernels:
//   prepare  D = rowsum(dy o) in F32; lse in base 2, D and span_begin padded to whole tiles (a row
//            past the end gets lse = infinity: probability 0); the last query tile of each key tile
//   queries  dq: blocks take tiles of 128 query rows of one head and visit their key tiles,
//              s = q k^T   p = exp2(c s - lse)   dp = dy v^T   ds = p (dp - D)   dq += ds k
//   keys     dk and dv: one block per (key tile of 128 rows, key-value head) visits the query heads
//            of its group in ascending order and for each the query tiles of 64 rows that see its
//            keys, in ascending order, transposed so that weights come out as operands in
//            registers:
//              s^T = k q^T   p^T, dp^T = v dy^T, ds^T   dv += p^T dy   dk += ds^T q
// p and ds are rounded to BF16 before their products; sums are F32 and stay in registers.
//
// Computing s and dp twice makes 7 products of 5. The usual single kernel adds its parts of dq to
// an F32 copy in global memory, for the same bytes every time in a fixed order of key tiles. It was
// built first and was slower: on an H100 with 16384 tokens and 32 query heads of 128 it ran at 330
// TFLOP/s and, with those additions left out altogether, at 430; these kernels reach 500. It also
// needs scratch of twice the size of q, a kernel to round dq, and blocks that wait for each other.
//
// In both kernels warpgroup 0 loads (one thread) and two warpgroups compute 64 rows each. A
// warpgroup starts the scores of its next tile before the last products of this one have ended, and
// the two start their products in turns.
#include <algorithm>
#include <type_traits>

#include "backends/cuda/attention.h"
#include "backends/cuda/hopper_attention.cuh"

namespace nibble::cuda {
namespace {

using namespace hopper;

constexpr int kQueries = 64;  // rows of a query tile of `keys`
constexpr int kRows = 128;    // rows of a query tile of `queries`
constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;

struct Args {
  CUtensorMap q, k, v, dy, dq, dk, dv;
  const std::int32_t* span_begin;
  const float* lse;
  const bf16 *o, *dy_rows;
  int rows, heads, kv_heads, query_tiles, key_tiles;
  float scale;
  // Scratch.
  int* next_tile;           // of `queries`
  int* last_query_tile;     // [key_tiles]
  int* order;               // [key_tiles]: in which `keys` takes them
  int* begins;              // [query_tiles * 64], an even number of tiles
  float *lse_base2, *sums;  // [heads, query_tiles * 64]: lse / ln 2 and D
};

// Scratch as consecutive arrays; returns the bytes used.
std::int64_t place(Args& args, void* scratch) {
  std::int64_t used = 0;
  const auto take = [&](auto*& array, std::int64_t count) {
    using T = std::remove_reference_t<decltype(*array)>;
    array = reinterpret_cast<T*>(static_cast<char*>(scratch) + used);
    used += ceil_div(count * static_cast<std::int64_t>(sizeof(T)), 256) * 256;
  };
  const std::int64_t padded_rows = static_cast<std::int64_t>(args.query_tiles) * kQueries;
  take(args.next_tile, 1);
  take(args.last_query_tile, args.key_tiles);
  take(args.order, args.key_tiles);
  take(args.begins, padded_rows);
  take(args.lse_base2, padded_rows * args.heads);
  take(args.sums, padded_rows * args.heads);
  return used;
}

// One block per (query tile, head); a row is read by kHeadDim / 8 lanes.
template <int kHeadDim>
__global__ void __launch_bounds__(256) prepare(const __grid_constant__ Args args) {
  begin_kernel();
  constexpr int kLanes = kHeadDim / 8, kRowsAtOnce = 256 / kLanes;
  const int tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_row = tile * kQueries;
  __shared__ float sums[kQueries];
#pragma unroll
  for (int r = thread / kLanes; r < kQueries; r += kRowsAtOnce) {
    const int row = first_row + r;
    float sum = 0;
    if (row < args.rows) {
      const std::int64_t at =
          (static_cast<std::int64_t>(row) * args.heads + head) * kHeadDim + thread % kLanes * 8;
      const auto o = load_pack(args.o + at), dy = load_pack(args.dy_rows + at);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(to_float(o.values[i]), to_float(dy.values[i]), sum);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
    }
    if (thread % kLanes == 0) sums[r] = sum;
  }
  __syncthreads();
  if (thread < kQueries) {
    const int row = first_row + thread;
    const std::int64_t at =
        (static_cast<std::int64_t>(head) * args.query_tiles + tile) * kQueries + thread;
    args.sums[at] = sums[thread];
    args.lse_base2[at] = row < args.rows
                             ? args.lse[static_cast<std::int64_t>(row) * args.heads + head] * kLog2E
                             : INFINITY;
    if (head == 0) args.begins[first_row + thread] = args.span_begin[min(row, args.rows - 1)];
  }
  if (head != 0) return;
  if (tile == 0 && thread == 0) *args.next_tile = 0;
  // The key tiles that this query tile sees and the next one does not.
  const auto first_key_tile = [&](int t) {
    return args.span_begin[min(t * kQueries, args.rows - 1)] / kKeys;
  };
  const int end = tile + 1 < args.query_tiles ? first_key_tile(tile + 1) : args.key_tiles;
  for (int key_tile = first_key_tile(tile) + thread; key_tile < end; key_tile += 256) {
    args.last_query_tile[key_tile] = tile;
  }
  // Key tiles are taken by their distance from the start of their document: of documents of about
  // the same length, the tiles that are seen most come first.
  if (tile % (kKeys / kQueries) != 0) return;
  const auto distance = [&](int key_tile) {
    return key_tile - args.span_begin[key_tile * kKeys] / kKeys;
  };
  const int mine = tile / (kKeys / kQueries), my_distance = distance(mine);
  float before = 0;
  for (int other = thread; other < args.key_tiles; other += 256) {
    const int d = distance(other);
    before += d < my_distance || (d == my_distance && other < mine) ? 1 : 0;
  }
  before = block_sum<256>(before);
  if (thread == 0) args.order[static_cast<int>(before)] = mine;
}

template <int kHeadDim>
struct QueriesShared {
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  alignas(1024) bf16 q[kBoxes][kRows][kBoxColumns];
  bf16 dy[kBoxes][kRows][kBoxColumns];
  bf16 dq[kBoxes][kRows][kBoxColumns];
  bf16 k[kStages][kBoxes][kKeys][kBoxColumns];
  bf16 v[kStages][kBoxes][kKeys][kBoxColumns];
  float lse[kRows], sums[kRows];
  // Of the rows of one warpgroup each, so that the warpgroups need not go from tile to tile
  // together: q, dy, lse, sums and the number of the tile, -1: no more.
  Barrier q_full[kConsumers], q_empty[kConsumers];
  int tile[kConsumers];
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

template <int kHeadDim>
struct KeysShared {
  static constexpr int kBoxes = kHeadDim / kBoxColumns;
  alignas(1024) bf16 k[kBoxes][kKeys][kBoxColumns];
  bf16 v[kBoxes][kKeys][kBoxColumns];
  bf16 q[kStages][kBoxes][kQueries][kBoxColumns];
  bf16 dy[kStages][kBoxes][kQueries][kBoxColumns];
  float lse[kStages][kQueries];
  float sums[kStages][kQueries];
  int begins[kStages][kQueries];
  Barrier kv_full, q_full[kStages], q_empty[kStages], dy_full[kStages], dy_empty[kStages];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kTurns = 1, kWarpgroupOnly = kTurns + kConsumers;  // named barriers

template <int kHeadDim>
__device__ void load_for_queries(const Args& args, QueriesShared<kHeadDim>& shared) {
  Ring ring;
  int q_parity = 1;
  const int group = args.heads / args.kv_heads;
  const auto load_rows = [&](const QueryTile<kRows>& tile, int number, int consumer) {
    const int column = tile.head * kHeadDim, r = consumer * 64, row = tile.first_row + r;
    const std::int64_t at =
        static_cast<std::int64_t>(tile.head) * args.query_tiles * kQueries + row;
    Barrier& full = shared.q_full[consumer];
    shared.q_empty[consumer].wait(q_parity);
    shared.tile[consumer] = number;
    full.arrive_expecting(64 * (2 * kHeadDim * 2 + 2 * 4));
    for (int box = 0; box < kHeadDim / kBoxColumns; ++box) {
      load_box(shared.q[box][r], args.q, column + box * kBoxColumns, row, full);
      load_box(shared.dy[box][r], args.dy, column + box * kBoxColumns, row, full);
    }
    load_bytes(shared.lse + r, args.lse_base2 + at, 64 * 4, full);
    load_bytes(shared.sums + r, args.sums + at, 64 * 4, full);
  };
  int number = static_cast<int>(blockIdx.x);
  while (number < QueryTile<kRows>::count(args.rows, args.heads)) {
    const int next = static_cast<int>(gridDim.x) + atomicAdd(args.next_tile, 1);
    const QueryTile<kRows> tile(number, args.rows, args.heads, args.span_begin);
    const int column = tile.head / group * kHeadDim;
    load_rows(tile, number, 0);
    for (int key_tile = tile.last_key_tile; key_tile >= tile.first_key_tile; --key_tile) {
      const int s = ring.stage, row = key_tile * kKeys;
      shared.k_empty[s].wait(ring.parity ^ 1);
      shared.k_full[s].arrive_expecting(static_cast<int>(sizeof(shared.k[s])));
      load_tile<kKeys>(shared.k[s], args.k, column, row, shared.k_full[s]);
      shared.v_empty[s].wait(ring.parity ^ 1);
      shared.v_full[s].arrive_expecting(static_cast<int>(sizeof(shared.v[s])));
      load_tile<kKeys>(shared.v[s], args.v, column, row, shared.v_full[s]);
      ring.advance();
      if (key_tile == tile.last_key_tile) load_rows(tile, number, 1);
    }
    q_parity ^= 1;
    number = next;
  }
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    shared.q_empty[consumer].wait(q_parity);
    shared.tile[consumer] = -1;
    shared.q_full[consumer].arrive();
  }
}

template <int kHeadDim>
__device__ void compute_queries(const Args& args, QueriesShared<kHeadDim>& shared, int consumer) {
  using S = QueriesShared<kHeadDim>;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % kWarp;
  const float c = args.scale * kLog2E;
  const Turns<kConsumers> turns{kTurns, consumer};
  turns.begin();

  Ring ring;
  for (int q_parity = 0;; q_parity ^= 1) {
    shared.q_full[consumer].wait(q_parity);
    // Read by the lane that will release it.
    const int number = __shfl_sync(~0u, lane == 0 ? shared.tile[consumer] : 0, 0);
    if (number < 0) break;
    const QueryTile<kRows> tile(number, args.rows, args.heads, args.span_begin);
    const int first_row = tile.first_row + 64 * consumer;
    const int row = first_row + 16 * (thread / kWarp) + lane / 4;  // and row + 8
    const int last_begin = args.span_begin[min(first_row + 63, args.rows - 1)];
    const int r = row - tile.first_row;
    float s[kKeys / 2], dp[kKeys / 2], dq[kHeadDim / 2] = {};
    std::uint32_t ds[kKeys / 16][4];
    hold(dq);
    const auto start_scores = [&] {
      shared.k_full[ring.stage].wait(ring.parity);
      products_along<kHeadDim>(s, shared.q[0][64 * consumer], kRows, shared.k[ring.stage], kKeys);
    };
    // From started scores to ds.
    const auto weigh = [&](int key_tile) {
      const int stage = ring.stage;
      shared.v_full[stage].wait(ring.parity);
      products_along<kHeadDim>(dp, shared.dy[0][64 * consumer], kRows, shared.v[stage], kKeys);
      turns.pass();
      products_wait<1>();
      hold(s);
      const float lse[2] = {shared.lse[r], shared.lse[r + 8]};
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = exp2_approx(fmaf(s[i], c, -lse[i / 2 % 2]));
      const int first_key = key_tile * kKeys;
      if (first_key + kKeys - 1 > first_row || first_key < last_begin) {
        const int begin[2] = {args.span_begin[min(row, args.rows - 1)],
                              args.span_begin[min(row + 8, args.rows - 1)]};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2, h = i / 2 % 2;
          if (key > row + 8 * h || key < begin[h]) s[i] = 0;
        }
      }
      products_wait<0>();
      hold(dp);
      release(shared.v_empty[stage]);
      const float sum[2] = {shared.sums[r], shared.sums[r + 8]};
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2) {
        const float total = sum[i / 2 % 2];
        ds[i / 8][i / 2 % 4] = pack_pair(s[i] * (dp[i] - total), s[i + 1] * (dp[i + 1] - total));
      }
    };

    turns.take();
    start_scores();
    weigh(tile.last_key_tile);
    for (int key_tile = tile.last_key_tile - 1; key_tile >= tile.first_key_tile; --key_tile) {
      const int stage = ring.stage;
      turns.take();
      products_across(dq, ds, shared.k[stage]);
      ring.advance();
      start_scores();
      products_wait<1>();
      hold(dq);
      hold(ds);
      release(shared.k_empty[stage]);
      weigh(key_tile);
    }
    release(shared.q_empty[consumer]);
    products_across(dq, ds, shared.k[ring.stage]);
    // The stores of the tile before have left shared memory.
    if (thread == 0) wait_stores_read();
    named_sync(kWarpgroupOnly + consumer, kWarpgroup);
    products_wait<0>();
    hold(dq);
    hold(ds);
    release(shared.k_empty[ring.stage]);
    ring.advance();
#pragma unroll
    for (float& x : dq) x *= args.scale;
    store_rows(shared.dq, 64 * consumer, dq);
    fence_async();
    named_sync(kWarpgroupOnly + consumer, kWarpgroup);
    if (thread == 0) {
      for (int box = 0; box < S::kBoxes; ++box) {
        store_box(args.dq, tile.head * kHeadDim + box * kBoxColumns, first_row,
                  shared.dq[box][64 * consumer]);
      }
      commit_stores();
    }
  }
  if (thread == 0) wait_stores();
}

// What a block of `keys` does.
struct KeyTile {
  __device__ explicit KeyTile(const Args& args) {
    const int number = static_cast<int>(blockIdx.x);
    tile = args.order[number / args.kv_heads];
    kv_head = number % args.kv_heads;
    group = args.heads / args.kv_heads;
    first_query_tile = tile * (kKeys / kQueries);
    query_tiles = args.last_query_tile[tile] - first_query_tile + 1;
  }
  int tile, kv_head, group, first_query_tile, query_tiles;
};

template <int kHeadDim>
__device__ void load_for_keys(const Args& args, KeysShared<kHeadDim>& shared, const KeyTile& work) {
  shared.kv_full.arrive_expecting(static_cast<int>(sizeof(shared.k) + sizeof(shared.v)));
  load_tile<kKeys>(shared.k, args.k, work.kv_head * kHeadDim, work.tile * kKeys, shared.kv_full);
  load_tile<kKeys>(shared.v, args.v, work.kv_head * kHeadDim, work.tile * kKeys, shared.kv_full);
  constexpr int kTileBytes = static_cast<int>(sizeof(shared.q[0]));
  constexpr int kRowBytes = kQueries * 4;
  Ring ring;
  for (int head = work.kv_head * work.group; head < (work.kv_head + 1) * work.group; ++head) {
    for (int t = 0; t < work.query_tiles; ++t) {
      const int s = ring.stage, row = (work.first_query_tile + t) * kQueries;
      const std::int64_t at = static_cast<std::int64_t>(head) * args.query_tiles * kQueries + row;
      shared.q_empty[s].wait(ring.parity ^ 1);
      shared.q_full[s].arrive_expecting(kTileBytes + 2 * kRowBytes);
      load_tile<kQueries>(shared.q[s], args.q, head * kHeadDim, row, shared.q_full[s]);
      load_bytes(shared.lse[s], args.lse_base2 + at, kRowBytes, shared.q_full[s]);
      load_bytes(shared.begins[s], args.begins + row, kRowBytes, shared.q_full[s]);
      shared.dy_empty[s].wait(ring.parity ^ 1);
      shared.dy_full[s].arrive_expecting(kTileBytes + kRowBytes);
      load_tile<kQueries>(shared.dy[s], args.dy, head * kHeadDim, row, shared.dy_full[s]);
      load_bytes(shared.sums[s], args.sums + at, kRowBytes, shared.dy_full[s]);
      ring.advance();
    }
  }
}

template <int kHeadDim>
__device__ void compute_keys(const Args& args, KeysShared<kHeadDim>& shared, const KeyTile& work,
                             int consumer) {
  using S = KeysShared<kHeadDim>;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % kWarp;
  const float c = args.scale * kLog2E;
  const int first_key = work.tile * kKeys + 64 * consumer;
  const int key = first_key + 16 * (thread / kWarp) + lane / 4;  // and key + 8
  const Turns<kConsumers> turns{kTurns, consumer};
  turns.begin();

  float s[kQueries / 2], dp[kQueries / 2], dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
  std::uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
  Ring ring;
  int query_tile = 0;  // of the started scores
  hold(dk);
  hold(dv);
  const auto start_scores = [&] {
    shared.q_full[ring.stage].wait(ring.parity);
    products_along<kHeadDim>(s, shared.k[0][64 * consumer], kKeys, shared.q[ring.stage], kQueries);
  };
  // From started scores to p and ds. Register 4 g + 2 h + e: key + 8 h, query 8 g + e of the tile.
  const auto weigh = [&] {
    const int stage = ring.stage;
    shared.dy_full[stage].wait(ring.parity);
    products_along<kHeadDim>(dp, shared.v[0][64 * consumer], kKeys, shared.dy[stage], kQueries);
    turns.pass();
    products_wait<1>();
    hold(s);
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const auto lse = *reinterpret_cast<const float2*>(&shared.lse[stage][2 * i + lane % 4 * 2]);
      s[i] = exp2_approx(fmaf(s[i], c, -lse.x));
      s[i + 1] = exp2_approx(fmaf(s[i + 1], c, -lse.y));
      s[i + 2] = exp2_approx(fmaf(s[i + 2], c, -lse.x));
      s[i + 3] = exp2_approx(fmaf(s[i + 3], c, -lse.y));
    }
    const int first_query = (work.first_query_tile + query_tile) * kQueries;
    if (first_query < first_key + 63 || shared.begins[stage][kQueries - 1] > first_key) {
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        const int at = i / 4 * 8 + lane % 4 * 2 + i % 2, k = key + i / 2 % 2 * 8;
        if (k > first_query + at || k < shared.begins[stage][at]) s[i] = 0;
      }
    }
    round_fragments(s, p);
    products_wait<0>();
    hold(dp);
#pragma unroll
    for (int i = 0; i < kQueries / 2; i += 4) {
      const auto sum = *reinterpret_cast<const float2*>(&shared.sums[stage][2 * i + lane % 4 * 2]);
      dp[i] = s[i] * (dp[i] - sum.x);
      dp[i + 1] = s[i + 1] * (dp[i + 1] - sum.y);
      dp[i + 2] = s[i + 2] * (dp[i + 2] - sum.x);
      dp[i + 3] = s[i + 3] * (dp[i + 3] - sum.y);
    }
    round_fragments(dp, ds);
    if (++query_tile == work.query_tiles) query_tile = 0;
  };

  shared.kv_full.wait(0);
  turns.take();
  start_scores();
  weigh();
  for (int left = work.query_tiles * work.group - 1; left > 0; --left) {
    const int stage = ring.stage;
    turns.take();
    products_across(dv, p, shared.dy[stage]);
    products_across(dk, ds, shared.q[stage]);
    ring.advance();
    start_scores();
    products_wait<1>();
    hold(dv);
    hold(dk);
    hold(p);
    hold(ds);
    release(shared.dy_empty[stage]);
    release(shared.q_empty[stage]);
    weigh();
  }
  products_across(dv, p, shared.dy[ring.stage]);
  products_across(dk, ds, shared.q[ring.stage]);
  products_wait<0>();
  hold(dv);
  hold(dk);
  hold(p);
  hold(ds);

  // Only this warpgroup reads these rows of k and v, and it is done.
#pragma unroll
  for (float& x : dk) x *= args.scale;
  store_rows(shared.k, 64 * consumer, dk);
  store_rows(shared.v, 64 * consumer, dv);
  fence_async();
  named_sync(kWarpgroupOnly + consumer, kWarpgroup);
  if (thread == 0) {
    for (int box = 0; box < S::kBoxes; ++box) {
      const int column = work.kv_head * kHeadDim + box * kBoxColumns;
      store_box(args.dk, column, first_key, shared.k[box][64 * consumer]);
      store_box(args.dv, column, first_key, shared.v[box][64 * consumer]);
    }
    commit_stores();
    wait_stores();
  }
}

#endif

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) queries(const __grid_constant__ Args args) {
  begin_kernel();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<QueriesShared<kHeadDim>*>(memory);
  if (threadIdx.x == 0) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      shared.q_full[consumer].init(1);
      shared.q_empty[consumer].init(4);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      shared.k_full[stage].init(1);
      shared.v_full[stage].init(1);
      shared.k_empty[stage].init(4 * kConsumers);
      shared.v_empty[stage].init(4 * kConsumers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    static_assert(registers_fit(kConsumers, 40, 232));
    registers_shrink<40>();
    if (threadIdx.x == 0) load_for_queries(args, shared);
  } else {
    registers_grow<232>();
    compute_queries(args, shared, warpgroup - 1);
  }
#endif
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) keys(const __grid_constant__ Args args) {
  begin_kernel();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<KeysShared<kHeadDim>*>(memory);
  if (threadIdx.x == 0) {
    shared.kv_full.init(1);
    for (int stage = 0; stage < kStages; ++stage) {
      shared.q_full[stage].init(1);
      shared.dy_full[stage].init(1);
      shared.q_empty[stage].init(4 * kConsumers);
      shared.dy_empty[stage].init(4 * kConsumers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const KeyTile work(args);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    static_assert(registers_fit(kConsumers, 24, 240));
    registers_shrink<24>();
    if (threadIdx.x == 0) load_for_keys(args, shared, work);
  } else {
    registers_grow<240>();
    compute_keys(args, shared, work, warpgroup - 1);
  }
#endif
}

template <class Shared, class Kernel>
void start(Kernel kernel, std::int64_t blocks, const Args& args, const Launch& launch,
           const char* name) {
  constexpr int kBytes = static_cast<int>(sizeof(Shared));
  static_assert(kBytes <= kSharedBytes);
  start_kernel(name, kernel, static_cast<unsigned>(blocks), kThreads, kBytes, launch, args);
}

template <int kHeadDim>
void run(const Args& args, const Launch& launch) {
  const dim3 tiles(static_cast<unsigned>(args.query_tiles), static_cast<unsigned>(args.heads));
  start_kernel("attention_backward: prepare", prepare<kHeadDim>, tiles, 256, 0, launch, args);
  start<QueriesShared<kHeadDim>>(
      queries<kHeadDim>,
      std::min(QueryTile<kRows>::count(args.rows, args.heads), launch.card->multiprocessors), args,
      launch, "attention_backward: queries");
  start<KeysShared<kHeadDim>>(keys<kHeadDim>,
                              static_cast<std::int64_t>(args.key_tiles) * args.kv_heads, args,
                              launch, "attention_backward: keys");
}

// Sizes, and scratch in its place.
Args describe_call(const OpCall& call, std::int64_t* scratch_bytes = nullptr) {
  const AttentionShape shape(call);
  Args args{};
  args.rows = static_cast<int>(shape.rows);
  args.heads = static_cast<int>(shape.heads);
  args.kv_heads = static_cast<int>(shape.kv_heads);
  args.key_tiles = static_cast<int>(ceil_div(shape.rows, kKeys));
  args.query_tiles = args.key_tiles * (kKeys / kQueries);
  args.scale = shape.params.scale;
  const std::int64_t bytes = place(args, call.scratch);
  if (scratch_bytes) *scratch_bytes = bytes;
  return args;
}

}  // namespace

bool attention_backward_hopper_supports(const OpCall& call, const Card& card) {
  return card.hopper && card.shared_bytes >= kSharedBytes && attention_on_tensor_cores(call) &&
         call.in_types[0].shape[0] < (1 << 24);
}

std::int64_t attention_backward_hopper_scratch_bytes(const OpCall& call, const Card&) {
  std::int64_t bytes = 0;
  describe_call(call, &bytes);
  return bytes;
}

void attention_backward_hopper(const OpCall& call, const Launch& launch) {
  const AttentionShape shape(call);
  Args args = describe_call(call);
  const auto query_rows = [&](const void* address) {
    return tensor_map(address, shape.rows, shape.heads * shape.head_dim, kQueries);
  };
  const auto key_rows = [&](const void* address, int box_rows) {
    return tensor_map(address, shape.rows, shape.kv_heads * shape.head_dim, box_rows);
  };
  args.q = query_rows(call.in[0]);
  args.k = key_rows(call.in[1], kKeys);
  args.v = key_rows(call.in[2], kKeys);
  args.dy = query_rows(call.in[5]);
  args.dq = query_rows(call.out[0]);
  args.dk = key_rows(call.out[1], 64);
  args.dv = key_rows(call.out[2], 64);
  args.o = call.input<bf16>(3);
  args.dy_rows = call.input<bf16>(5);
  args.lse = call.input<float>(4);
  args.span_begin = call.input<std::int32_t>(6);
  if (shape.head_dim == 128) {
    run<128>(args, launch);
  } else {
    run<64>(args, launch);
  }
}

}  // namespace nibble::cuda
