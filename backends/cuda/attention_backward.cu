// dq, dk and dv of attention (formulas: engine/ops/attention.cpp). A first kernel prepares
// D = rowsum(dy o), in F32 from the rounded o, for every row and head.
//
// BF16 with a head_dim of 64 or 128 runs on tensor cores (FlashAttention-2, arXiv 2307.08691). A
// block takes 128 keys of one key-value head, 16 per warp, keeps their dk and dv in registers and
// visits the tiles of 64 queries that see any of them, from the last to the first, and for each
// the query heads of the group in ascending order. Per visit, transposed, so that probabilities
// come out as left operands in registers:
//   s^T = k q^T    p^T = exp(scale s^T - lse)    dp^T = v dy^T    ds^T = p^T (dp^T - D)
//   dv += p^T dy   dk += ds^T q                  and, with ds through shared memory, dq = ds k
// p and ds are rounded to BF16 before their products. Shared memory holds the tile of keys, two of
// q, one of dy and one of ds; the values stay in registers, as left operands.
//
// dq of a tile of queries is a sum over tiles of keys. It is kept in F32 in scratch, in the order
// of the accumulators' registers, and added to by one block at a time in ascending order of keys: a
// turn counter per (head, tile of queries) says whose turn it is, and the last block rounds and
// stores. Five products per pair of tiles suffice that way, where a sweep of its own for dq would
// make it seven. Blocks take their tile from a counter, so whoever a block waits for has started
// before it and no wait is endless; and since every block starts at the last tile of queries, a
// block follows its predecessor one visit behind, finds its turn has come, and ends earlier. The
// longest blocks start first.
//
// Everything else runs in F32 on ordinary cores, in two sweeps (attention_backward_rows.cuh).
//
// Limits: head_dim up to 256. span_begin[t] does not fall as t grows (documents are contiguous),
// and lies in 0 .. t; the turns depend on it.
#include "backends/cuda/attention.h"
#include "backends/cuda/attention_backward_rows.cuh"
#include "backends/cuda/attention_mma.cuh"

namespace nibble::cuda {
namespace {

using Args = AttentionGradient;

constexpr int kKeys = 128, kQueries = 64;
constexpr int kThreads = 256;

// -- Preparation -------------------------------------------------------------------------------

// A block per tile of queries and head, `lanes` lanes per row: a power of two.
template <class T>
__global__ void __launch_bounds__(kThreads) prepare(const Args a, int lanes) {
  begin_kernel();
  const int tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int d = a.head_dim, thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  const bool in_packs = d % Pack<T>::kSize == 0;
  for (int r = thread / lanes; r < kQueries; r += kThreads / lanes) {
    const int t = tile * kQueries + r;
    float sum = 0;
    if (t < a.rows) {
      const std::int64_t at = (static_cast<std::int64_t>(t) * a.heads + head) * d;
      const T *o = static_cast<const T*>(a.o) + at, *dy = static_cast<const T*>(a.dy) + at;
      if (in_packs) {
        for (int c = lane * Pack<T>::kSize; c < d; c += lanes * Pack<T>::kSize) {
          const Pack<T> x = load_pack(o + c), y = load_pack(dy + c);
#pragma unroll
          for (int i = 0; i < Pack<T>::kSize; ++i) {
            sum = fmaf(to_float(x.values[i]), to_float(y.values[i]), sum);
          }
        }
      } else {
        for (int c = lane; c < d; c += lanes) sum = fmaf(to_float(o[c]), to_float(dy[c]), sum);
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
    }
    if (lane != 0) continue;
    const std::int64_t to = static_cast<std::int64_t>(head) * a.padded_rows + t;
    a.sums[to] = sum;
    if (a.lse_base2 == nullptr) continue;
    const std::int64_t from = static_cast<std::int64_t>(t) * a.heads + head;
    a.lse_base2[to] = t < a.rows ? a.lse[from] * kLog2E : INFINITY;
    if (head == 0) a.begins[t] = first_key(a, t);
  }
  if (a.lse_base2 == nullptr || thread != 0) return;
  a.turns[static_cast<std::int64_t>(head) * gridDim.x + tile] = 0;
  if (tile == 0 && head == 0) *a.ticket = 0;
}

// -- Tensor cores ------------------------------------------------------------------------------

// Byte offsets in shared memory.
template <int kDim>
struct Shared {
  static constexpr std::uint32_t kTileBytes = kQueries * kDim * 2;
  static constexpr std::uint32_t kKey = 0;                           // k, [kKeys, kDim]
  static constexpr std::uint32_t kQuery = kKey + 2 * kTileBytes;     // q, twice; at first v
  static constexpr std::uint32_t kDy = kQuery + 2 * kTileBytes;      // dy
  static constexpr std::uint32_t kDs = kDy + kTileBytes;             // ds^T, [kKeys, kQueries]
  static constexpr std::uint32_t kLse = kDs + kKeys * kQueries * 2;  // per query
  static constexpr std::uint32_t kSum = kLse + kQueries * 4;
  static constexpr std::uint32_t kBegin = kSum + kQueries * 4;
  static constexpr std::uint32_t kTurn = kBegin + kQueries * 4;  // int2, of two visits
  static constexpr std::uint32_t kBytes = kTurn + 16;
  static_assert(kBytes <= kSharedLimit && kKeys == 2 * kQueries);
};

// c[n] += left right[n], for the 64 queries of a tile as columns.
template <int kDim>
__device__ inline void mma_queries(float (&c)[kQueries / 8][4], const std::uint32_t (&left)[4],
                                   std::uint32_t right_lane) {
#pragma unroll
  for (int n = 0; n < kQueries / 8; n += 2) {
    std::uint32_t right[4];
    load_matrices(right, right_lane + n * 8 * kDim * 2);
    mma(c[n], left, right[0], right[1]);
    mma(c[n + 1], left, right[2], right[3]);
  }
}

// c += left^T right, summed over the 64 queries of a tile: right is q or dy.
template <int kDim>
__device__ inline void mma_channels(float (&c)[kDim / 8][4],
                                    const std::uint32_t (&left)[kQueries / 16][4],
                                    std::uint32_t right_lane) {
#pragma unroll
  for (int i = 0; i < kQueries / 16; ++i) {
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      std::uint32_t right[4];
      load_matrices_transposed(right, (right_lane ^ 16 * n) + i * 16 * kDim * 2);
      mma(c[n], left[i], right[0], right[1]);
      mma(c[n + 1], left[i], right[2], right[3]);
    }
  }
}

// Accumulators of 16 rows, scaled, as BF16; rows lie `stride` elements apart, `valid` of them.
template <int kBlocks>
__device__ inline void store_rows(bf16* to, std::int64_t stride, int valid,
                                  const float (&c)[kBlocks][4], float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    if (row >= valid) continue;
    bf16* at = to + row * stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      *reinterpret_cast<std::uint32_t*>(at + n * 8) =
          pack_bf16(c[n][2 * r] * scale, c[n][2 * r + 1] * scale);
    }
  }
}

// What a block works on.
struct Work {
  int tile, kv_head, first_key, last_key;  // of the tile of keys
  int first_query_tile, last_query_tile;

  __device__ Work(const Args& a, int ticket)
      : tile(ticket / a.kv_heads),
        kv_head(ticket % a.kv_heads),
        first_key(tile * kKeys),
        last_key(min(first_key + kKeys, a.rows) - 1),
        first_query_tile(first_key / kQueries) {
    // The last tile of queries whose first row sees last_key or a key before it.
    int low = first_query_tile, high = a.padded_rows / kQueries - 1;
    if (last_key / kQueries > low) low = last_key / kQueries;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (a.begins[middle * kQueries] <= last_key) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    last_query_tile = low;
  }
};

template <int kDim>
struct KeyBlock {
  using S = Shared<kDim>;
  static constexpr int kDimBlocks = kDim / 8;
  static constexpr int kDqBlocks = kDim / 32;  // of a warp: 32 queries, a quarter of the channels

  const Args& a;
  const Work& work;
  std::uint32_t shared;
  int lane, warp;
  std::uint32_t v[kDim / 16][4];
  float dk[kDimBlocks][4], dv[kDimBlocks][4];

  __device__ std::int64_t query_row(int tile, int head) const {
    return (static_cast<std::int64_t>(tile) * kQueries * a.heads + head) * kDim;
  }
  __device__ void copy_queries(std::uint32_t to, const void* from, int tile, int head) const {
    copy_tile<kDim, kQueries, kThreads>(shared + to,
                                        static_cast<const bf16*>(from) + query_row(tile, head),
                                        static_cast<std::int64_t>(a.heads) * kDim,
                                        a.rows - tile * kQueries, unhoisted(threadIdx.x));
  }
  __device__ void copy_query_terms(int tile, int head) const {
    const int thread = static_cast<int>(threadIdx.x), part = thread / 16, i = thread % 16 * 4;
    if (part >= 3) return;
    const std::int64_t at = static_cast<std::int64_t>(head) * a.padded_rows + tile * kQueries + i;
    const void* from = a.begins + tile * kQueries + i;
    if (part == 0) from = a.lse_base2 + at;
    if (part == 1) from = a.sums + at;
    copy_async(shared + S::kLse + part * kQueries * 4 + i * 4, from, true);
  }

  // Loads the keys, and the values into registers.
  __device__ void load_keys() {
    const std::int64_t stride = static_cast<std::int64_t>(a.kv_heads) * kDim;
    const std::int64_t at = work.first_key * stride + work.kv_head * kDim;
    const int valid = work.last_key + 1 - work.first_key;
    copy_tile<kDim, kKeys, kThreads>(shared + S::kKey, static_cast<const bf16*>(a.k) + at, stride,
                                     valid);
    copy_tile<kDim, kKeys, kThreads>(shared + S::kQuery, static_cast<const bf16*>(a.v) + at, stride,
                                     valid);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      load_matrices(v[c], rows_first<kDim>(shared + S::kQuery, warp * 16, lane) ^ 32 * c);
    }
    __syncthreads();
  }

  // dv, and ds^T as left operand for dk and in shared memory. query: where the tile of q lies.
  __device__ void differentiate(std::uint32_t query, int t0, bool masked,
                                std::uint32_t (&ds)[kQueries / 16][4]) {
    const unsigned char* const base = shared_base();
    float s[kQueries / 8][4], dp[kQueries / 8][4];
    clear(s);
    clear(dp);
    const std::uint32_t k_lane = rows_first<kDim>(unhoisted(shared + S::kKey), warp * 16, lane);
    const std::uint32_t q_lane = columns_first<kDim>(query, 0, lane);
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      std::uint32_t left[4];
      load_matrices(left, k_lane ^ 32 * c);
      mma_queries<kDim>(s, left, q_lane ^ 32 * c);
    }
    const float scale = a.scale * kLog2E;
    const auto* lse = reinterpret_cast<const float2*>(base + S::kLse) + lane % 4;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const float2 l = lse[n * 4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[n][e] = exp2_flushed(fmaf(s[n][e], scale, e % 2 == 0 ? -l.x : -l.y));
      }
    }
    if (masked) hide(s, t0, base);
    const std::uint32_t dy_lane = columns_first<kDim>(unhoisted(shared + S::kDy), 0, lane);
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) mma_queries<kDim>(dp, v[c], dy_lane ^ 32 * c);
    std::uint32_t p[kQueries / 16][4];
    const auto* sums = reinterpret_cast<const float2*>(base + S::kSum) + lane % 4;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const float2 sum = sums[n * 4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float p0 = s[n][2 * r], p1 = s[n][2 * r + 1];
        p[n / 2][n % 2 * 2 + r] = pack_bf16(p0, p1);
        ds[n / 2][n % 2 * 2 + r] =
            pack_bf16(p0 * (dp[n][2 * r] - sum.x), p1 * (dp[n][2 * r + 1] - sum.y));
      }
    }
    store_ds(ds);
    mma_channels<kDim>(dv, p, rows_first<kDim>(unhoisted(shared + S::kDy), 0, lane));
  }

  __device__ static unsigned char* shared_base() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
  }

  // Probabilities of keys that a query does not see.
  __device__ void hide(float (&p)[kQueries / 8][4], int t0, const unsigned char* base) const {
    const int key = work.first_key + warp * 16 + lane / 4;
    const auto* begins = reinterpret_cast<const int2*>(base + S::kBegin) + lane % 4;
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const int2 begin = begins[n * 4];
      const int t = t0 + n * 8 + lane % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int j = key + r * 8;
        if (j > t || j < begin.x) p[n][2 * r] = 0;
        if (j > t + 1 || j < begin.y) p[n][2 * r + 1] = 0;
      }
    }
  }

  __device__ void store_ds(const std::uint32_t (&ds)[kQueries / 16][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::uint32_t to =
          shared + S::kDs + lane % 4 * 4 + tile_offset<kQueries>(warp * 16 + lane / 4 + r * 8, 0);
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to ^ n * 16), "r"(ds[n / 2][n % 2 * 2 + r])
                     : "memory");
      }
    }
  }

  // dq += ds k over the blocks of 16 keys from first to last.
  __device__ void add_dq(float (&dq)[2][kDqBlocks][4], int first, int last) const {
    const std::uint32_t ds_tile = unhoisted(shared + S::kDs), k_tile = unhoisted(shared + S::kKey);
    const std::uint32_t ds_lane = columns_first<kQueries>(ds_tile, 0, lane) ^ warp / 4 * 64;
    const std::uint32_t k_lane = rows_first<kDim>(k_tile, 0, lane) ^ warp % 4 * (kDim / 2);
    for (int i = first; i <= last; ++i) {
      std::uint32_t left[2][4];
      load_matrices_transposed(left[0], ds_lane + i * 16 * kQueries * 2);
      load_matrices_transposed(left[1], (ds_lane ^ 32) + i * 16 * kQueries * 2);
#pragma unroll
      for (int n = 0; n < kDqBlocks; n += 2) {
        std::uint32_t right[4];
        load_matrices_transposed(right, (k_lane ^ 16 * n) + i * 16 * kDim * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(dq[m][n], left[m], right[0], right[1]);
          mma(dq[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  // Waiting and passing on stall a warp, so two warps do them, each in one thread; shared memory
  // says whose turn to pass, of two visits: the next one may wait before this one has passed.
  __device__ void await_turn(int visit, int at, int wanted) const {
    reinterpret_cast<int2*>(shared_base() + S::kTurn)[visit % 2] = make_int2(at, wanted + 1);
    for (std::int32_t found = 0; found < wanted;) {
      asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                   : "=r"(found)
                   : "l"(a.turns + at)
                   : "memory");
    }
  }
  // After a barrier: the release then covers what the whole block has stored.
  __device__ void pass_turn(int visit) const {
    const int2 next = reinterpret_cast<const int2*>(shared_base() + S::kTurn)[visit % 2];
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(a.turns + next.x), "r"(next.y)
                 : "memory");
  }

  __device__ float4* dq_sums(int tile, int head) const {
    return reinterpret_cast<float4*>(
               a.dq_sums +
               (static_cast<std::int64_t>(head) * a.padded_rows + tile * kQueries) * kDim) +
           threadIdx.x;
  }
  __device__ void load_dq(float (&dq)[2][kDqBlocks][4], int tile, int head) const {
    const float4* from = dq_sums(tile, head);
#pragma unroll
    for (int i = 0; i < 2 * kDqBlocks; ++i) {
      *reinterpret_cast<float4*>(dq[i / kDqBlocks][i % kDqBlocks]) = __ldcg(from + i * kThreads);
    }
  }
  __device__ void store_dq(const float (&dq)[2][kDqBlocks][4], int tile, int head) const {
    float4* to = dq_sums(tile, head);
#pragma unroll
    for (int i = 0; i < 2 * kDqBlocks; ++i) {
      const float(&x)[4] = dq[i / kDqBlocks][i % kDqBlocks];
      __stcg(to + i * kThreads, make_float4(x[0], x[1], x[2], x[3]));
    }
  }

  __device__ void run() {
    const int group = a.heads / a.kv_heads, first_head = work.kv_head * group;
    const int visits = (work.last_query_tile - work.first_query_tile + 1) * group;
    load_keys();
    clear(dk);
    clear(dv);
    int tile = work.last_query_tile, head = first_head;
    copy_queries(S::kQuery, a.q, tile, head);
    copy_queries(S::kDy, a.dy, tile, head);
    copy_query_terms(tile, head);
    commit_copies();
    for (int visit = 0; visit < visits; ++visit) {
      const int t0 = tile * kQueries;
      int next_head = head + 1, next_tile = tile;
      if (next_head == first_head + group) next_head = first_head, next_tile = tile - 1;
      const std::uint32_t query = shared + S::kQuery + visit % 2 * S::kTileBytes;
      wait_copies<0>();
      // q and dy are there, and the visit before has been left: its dq too is stored.
      __syncthreads();
      if (threadIdx.x == 0 && visit > 0) pass_turn(visit - 1);
      if (visit + 1 < visits) {
        copy_queries(S::kQuery + (visit + 1) % 2 * S::kTileBytes, a.q, next_tile, next_head);
        commit_copies();
      }
      const auto* begins = reinterpret_cast<const std::int32_t*>(shared_base() + S::kBegin);
      const int least_begin = begins[0], most_begin = begins[kQueries - 1];
      // The blocks of 16 keys that any query of the tile sees.
      const int first_block = max(least_begin - work.first_key, 0) / 16;
      const int last_block = min(t0 + kQueries - 1 - work.first_key, kKeys - 1) / 16;
      const int turn = work.tile - least_begin / kKeys;
      const bool is_last = work.tile == min(t0 + kQueries - 1, a.rows - 1) / kKeys;
      const bool works = warp >= first_block && warp <= last_block;
      std::uint32_t ds[kQueries / 16][4];
      if (works) {
        const int key = work.first_key + warp * 16;
        differentiate(query, t0, key + 15 > t0 || key < most_begin, ds);
      }
      if (threadIdx.x == kWarp) await_turn(visit, head * (a.padded_rows / kQueries) + tile, turn);
      __syncthreads();  // ds is there, dy is read, and it is this block's turn
      if (visit + 1 < visits) {
        copy_queries(S::kDy, a.dy, next_tile, next_head);
        copy_query_terms(next_tile, next_head);
        commit_copies();
      }
      float dq[2][kDqBlocks][4];
      if (turn > 0) {
        load_dq(dq, tile, head);
      } else {
        clear(dq[0]);
        clear(dq[1]);
      }
      if (works) mma_channels<kDim>(dk, ds, rows_first<kDim>(query, 0, lane));
      add_dq(dq, first_block, last_block);
      if (is_last) {
        const int row = warp / 4 * 32;
        for (int m = 0; m < 2; ++m) {
          store_rows(static_cast<bf16*>(a.dq) + query_row(tile, head) +
                         static_cast<std::int64_t>(row + m * 16) * a.heads * kDim +
                         warp % 4 * (kDim / 4),
                     static_cast<std::int64_t>(a.heads) * kDim, a.rows - t0 - row - m * 16, dq[m],
                     a.scale);
        }
      } else {
        store_dq(dq, tile, head);
      }
      tile = next_tile, head = next_head;
    }
    __syncthreads();
    if (threadIdx.x == 0) pass_turn(visits - 1);
    const std::int64_t stride = static_cast<std::int64_t>(a.kv_heads) * kDim;
    const int key = work.first_key + warp * 16;
    const std::int64_t at = key * stride + work.kv_head * kDim;
    store_rows(static_cast<bf16*>(a.dk) + at, stride, a.rows - key, dk, a.scale);
    store_rows(static_cast<bf16*>(a.dv) + at, stride, a.rows - key, dv, 1.0f);
  }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) differentiate_mma(const Args a) {
  begin_kernel();
  extern __shared__ __align__(1024) unsigned char memory[];
  auto* const ticket = reinterpret_cast<int*>(memory + Shared<kDim>::kBegin);
  if (threadIdx.x == 0) *ticket = atomicAdd(a.ticket, 1);
  __syncthreads();
  const Work work(a, *ticket);
  KeyBlock<kDim> block{a,
                       work,
                       shared_address(memory),
                       static_cast<int>(threadIdx.x) % kWarp,
                       __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0),
                       {},
                       {},
                       {}};
  block.run();
}

template <int kDim>
void launch_mma(const Args& a, const Launch& launch) {
  constexpr int kBytes = Shared<kDim>::kBytes;
  const auto kernel = differentiate_mma<kDim>;
  const auto blocks = static_cast<unsigned>(ceil_div(a.rows, kKeys) * a.kv_heads);
  start_kernel("attention_backward", kernel, blocks, kThreads, kBytes, launch, a);
}

// -- Launchers ---------------------------------------------------------------------------------

// The arguments, with scratch as consecutive arrays whose bytes are returned in *used.
Args arguments(const OpCall& call, std::int64_t* used) {
  const AttentionShape n(call);
  Args a{};
  a.q = call.in[0], a.k = call.in[1], a.v = call.in[2], a.o = call.in[3];
  a.lse = call.input<float>(4), a.dy = call.in[5], a.span_begin = call.input<std::int32_t>(6);
  a.dq = call.out[0], a.dk = call.out[1], a.dv = call.out[2];
  a.rows = static_cast<int>(n.rows);
  a.heads = static_cast<int>(n.heads);
  a.kv_heads = static_cast<int>(n.kv_heads);
  a.head_dim = static_cast<int>(n.head_dim);
  a.scale = n.params.scale;
  a.soft_cap = n.params.soft_cap;
  a.padded_rows = static_cast<int>(round_up(n.rows, kQueries));
  *used = 0;
  const auto take = [&](auto*& array, std::int64_t count) {
    if (call.scratch != nullptr) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(
          static_cast<std::byte*>(call.scratch) + *used);
    }
    *used += round_up(count * static_cast<std::int64_t>(sizeof *array), 256);
  };
  const std::int64_t padded = n.heads * a.padded_rows;
  take(a.sums, padded);
  if (attention_on_tensor_cores(call)) {
    take(a.lse_base2, padded);
    take(a.begins, a.padded_rows);
    take(a.turns, padded / kQueries);
    take(a.ticket, 1);
    take(a.dq_sums, padded * n.head_dim);
  }
  return a;
}

bool supports(const OpCall& call) {
  return is_computable(call.out_types[0].dtype) &&
         call.node->get<AttentionParams>().head_dim <= kMaxHeadDim;
}

std::int64_t scratch_bytes(const OpCall& call, const Card& card) {
  if (card.hopper && attention_backward_hopper_supports(call, card)) {
    return attention_backward_hopper_scratch_bytes(call, card);
  }
  std::int64_t used = 0;
  arguments(call, &used);
  return used;
}

void run(const OpCall& call, const Launch& launch) {
  const Card& card = *launch.card;
  if (call.in_types[0].shape[0] == 0) return;
  if (card.hopper && attention_backward_hopper_supports(call, card)) {
    return attention_backward_hopper(call, launch);
  }
  std::int64_t used = 0;
  const Args a = arguments(call, &used);
  with_type(call.out_types[0].dtype, [&](auto element) {
    using T = decltype(element);
    int lanes = 1;
    while (lanes < kWarp && lanes * Pack<T>::kSize < a.head_dim) lanes *= 2;
    const dim3 grid(static_cast<unsigned>(a.padded_rows / kQueries),
                    static_cast<unsigned>(a.heads));
    start_kernel("attention_backward", prepare<T>, grid, kThreads, 0, launch, a, lanes);
    if (attention_on_tensor_cores(call)) {
      if (a.head_dim == 64) return launch_mma<64>(a, launch);
      return launch_mma<128>(a, launch);
    }
    with_passes(a.head_dim,
                [&](auto passes) { launch_rows<T, decltype(passes)::value>(a, launch); });
  });
}

}  // namespace

extern const Kernel attention_backward_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cuda
