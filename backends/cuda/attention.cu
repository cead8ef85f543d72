// o = softmax(scale q k^T) v within documents, and lse (formulas: engine/ops/attention.cpp).
//
// BF16 with a head_dim of 64 or 128 runs on tensor cores, in the form of FlashAttention-2
// (arXiv 2307.08691): a block takes 128 queries of one head, 32 per warp, keeps their output in
// registers and walks the keys in tiles of 64 with a running maximum and sum. A warp's two
// 16-row fragments share every fragment of keys and values it reads from shared memory; with one
// the reads would take longer than the products. Scores stay in F32; probabilities are rounded to
// BF16 for the second product, their sum is taken before. Tiles of keys start at the first key that
// any query of the block sees, so a block inside one document masks the diagonal alone. Late tiles
// of a long document have the most keys and are launched first; the heads of a tile are launched
// side by side and find its keys in the cache.
//
// Everything else, soft caps too, runs in F32 on ordinary cores (attention_rows.cuh), 16 queries
// per block.
//
// Limits: head_dim up to 256. span_begin[t] does not fall as t grows (documents are contiguous);
// values outside 0 .. t are read as the nearest of these, but by the Hopper kernels, which want
// none.
#include "backends/cuda/attention.h"

#include "backends/cuda/attention_mma.cuh"
#include "backends/cuda/attention_rows.cuh"

namespace nibble::cuda {
namespace {

struct Args {
  const void *q, *k, *v;
  const std::int32_t* span_begin;
  void* o;
  float* lse;
  int rows, heads, kv_heads, head_dim;
  float scale, soft_cap;
};

// The first key that query t sees; queries past the end see none.
__device__ inline int first_key(const Args& a, int t) {
  return t < a.rows ? min(max(a.span_begin[t], 0), t) : t;
}

constexpr int kThreads = 128, kQueries = 128;

template <int kDim, int kKeys>
constexpr int shared_bytes() {
  return (kQueries + 2 * kKeys) * kDim * 2;
}

// A warp's 32 queries: two fragments of 16 rows, of which a lane holds rows g and g + 8.
template <int kDim, int kKeys>
struct WarpQueries {
  static constexpr int kKeyBlocks = kKeys / 8, kDimBlocks = kDim / 8;

  float scores[2][kKeyBlocks][4];
  float out[2][kDimBlocks][4];
  float largest[2][2], sum[2][2];  // of unscaled scores; this lane's part
  int row;                         // of fragment 0, row g

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kDimBlocks; ++n) {
        for (int e = 0; e < 4; ++e) out[m][n][e] = 0;
      }
      for (int r = 0; r < 2; ++r) largest[m][r] = -INFINITY, sum[m][r] = 0;
    }
  }

  // q and k: where this lane starts in the tiles.
  __device__ void score(std::uint32_t q, std::uint32_t k) {
    q = unhoisted(q), k = unhoisted(k);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyBlocks; ++n) {
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0;
      }
    }
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      std::uint32_t left[2][4];
      load_matrices(left[0], q ^ 32 * c);
      load_matrices(left[1], (q ^ 32 * c) + 16 * kDim * 2);
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n += 2) {
        std::uint32_t right[4];
        load_matrices(right, (k ^ 32 * c) + n * 8 * kDim * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(scores[m][n], left[m], right[0], right[1]);
          mma(scores[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  // Few tiles need it, so the spans are read again rather than kept in registers.
  __device__ void mask(const Args& a, int first) {
    const int column = first + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int last = row + m * 16 + r * 8 - column, begin = first_key(a, row + m * 16 + r * 8);
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = n * 8 + e;
            if (key > last || key < begin - column) scores[m][n][2 * r + e] = -INFINITY;
          }
        }
      }
    }
  }

  // Scores become probabilities relative to the running maximum. scale: to base 2.
  __device__ void exponentiate(float scale) {
    float keep[2][2];
    bool changed = false;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
          most = fmaxf(most, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
        }
        most = fmaxf(largest[m][r], quad_max(most));
        const float base = most == -INFINITY ? 0.0f : most * scale;
        keep[m][r] = exp2_flushed(fmaf(largest[m][r], scale, -base));
        changed |= most != largest[m][r];
        largest[m][r] = most;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kKeyBlocks; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            scores[m][n][e] = exp2_flushed(fmaf(scores[m][n][e], scale, -base));
            total += scores[m][n][e];
          }
        }
        sum[m][r] = fmaf(sum[m][r], keep[m][r], total);
      }
    }
    // Maxima soon stop moving; multiplying by one would change nothing.
    if (!__any_sync(~0u, changed)) return;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kDimBlocks; ++n) {
        for (int e = 0; e < 4; ++e) out[m][n][e] *= keep[m][e / 2];
      }
    }
  }

  __device__ void add_values(std::uint32_t v) {
    v = unhoisted(v);
    std::uint32_t left[kKeys / 16][2][4];
#pragma unroll
    for (int c = 0; c < kKeys / 16; ++c) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        for (int i = 0; i < 4; ++i) {
          const auto& s = scores[m][2 * c + i / 2];
          left[c][m][i] = pack_bf16(s[i % 2 * 2], s[i % 2 * 2 + 1]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kKeys / 16; ++c) {
#pragma unroll
      for (int n = 0; n < kDimBlocks; n += 2) {
        std::uint32_t right[4];
        load_matrices_transposed(right, (v ^ 16 * n) + c * 16 * kDim * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(out[m][n], left[c][m], right[0], right[1]);
          mma(out[m][n + 1], left[c][m], right[2], right[3]);
        }
      }
    }
  }
};

// Divides by the sums and writes the warp's rows, through `tile`, its part of the queries' memory.
template <int kDim, class Queries>
__device__ void write_out(Queries& w, std::uint32_t tile, const Args& a, int head) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(w.sum[m][r]), factor = 1 / sum;
      const int t = w.row + m * 16 + r * 8;
      if (lane % 4 == 0 && t < a.rows) {
        a.lse[static_cast<std::int64_t>(t) * a.heads + head] =
            fmaf(w.largest[m][r], a.scale, logf(sum));
      }
      const std::uint32_t to = tile + tile_offset<kDim>(m * 16 + r * 8 + lane / 4, 0);
#pragma unroll
      for (int n = 0; n < Queries::kDimBlocks; ++n) {
        const std::uint32_t pair =
            pack_bf16(w.out[m][n][2 * r] * factor, w.out[m][n][2 * r + 1] * factor);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"((to ^ n * 16) + lane % 4 * 4), "r"(pair)
                     : "memory");
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8, kRowsAtOnce = kWarp / kChunks;
  const int chunk = lane % kChunks, first = w.row - lane / 4;
#pragma unroll
  for (int i = 0; i < 32 / kRowsAtOnce; ++i) {
    const int r = lane / kChunks + i * kRowsAtOnce;
    if (first + r >= a.rows) break;
    uint4 values;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                 : "r"(tile + tile_offset<kDim>(r, chunk))
                 : "memory");
    bf16* to = static_cast<bf16*>(a.o) +
               (static_cast<std::int64_t>(first + r) * a.heads + head) * kDim + chunk * 8;
    *reinterpret_cast<uint4*>(to) = values;
  }
}

template <int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads, 2) attend_mma(const Args a) {
  begin_kernel();
  static_assert(shared_bytes<kDim, kKeys>() <= kSharedLimit);
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // By a shuffle, so that the compiler knows it is the same in all lanes.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int tiles = (a.rows + kQueries - 1) / kQueries;
  const int t0 = (tiles - 1 - static_cast<int>(blockIdx.x) / a.heads) * kQueries;
  const int head = static_cast<int>(blockIdx.x) % a.heads;
  const int end = min(t0 + kQueries, a.rows);
  const int begin = first_key(a, t0);

  const std::int64_t stride = static_cast<std::int64_t>(a.heads) * kDim;
  const std::int64_t kv_stride = static_cast<std::int64_t>(a.kv_heads) * kDim;
  const bf16* q = static_cast<const bf16*>(a.q) + t0 * stride + head * kDim;
  const int kv_at = head / (a.heads / a.kv_heads) * kDim;
  const auto k = [&](int j) { return static_cast<const bf16*>(a.k) + j * kv_stride + kv_at; };
  const auto v = [&](int j) { return static_cast<const bf16*>(a.v) + j * kv_stride + kv_at; };

  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t k_tile = q_tile + kQueries * kDim * 2, v_tile = k_tile + kKeys * kDim * 2;
  copy_tile<kDim, kQueries, kThreads>(q_tile, q, stride, end - t0);
  copy_tile<kDim, kKeys, kThreads>(k_tile, k(begin), kv_stride, end - begin);
  commit_copies();

  WarpQueries<kDim, kKeys> w;
  w.clear();
  w.row = t0 + warp * 32 + lane / 4;
  // Of the warp's first and last query.
  const int first_t = t0 + warp * 32, last_t = first_t + 31;
  const int least_begin = first_key(a, first_t), most_begin = first_key(a, last_t);
  const std::uint32_t q_lane = rows_first<kDim>(q_tile, warp * 32, lane);
  const std::uint32_t k_lane = columns_first<kDim>(k_tile, 0, lane);
  const float scale = a.scale * kLog2E;

  for (int j = begin; j < end; j += kKeys) {
    const bool works = j <= last_t && j + kKeys > least_begin;
    wait_copies<0>();
    __syncthreads();  // keys are there, and nobody reads the values before them any more
    copy_tile<kDim, kKeys, kThreads>(v_tile, v(j), kv_stride, end - j);
    commit_copies();
    if (works) w.score(q_lane, k_lane);
    wait_copies<0>();
    __syncthreads();  // values are there, and nobody reads the keys any more
    if (j + kKeys < end) {
      copy_tile<kDim, kKeys, kThreads>(k_tile, k(j + kKeys), kv_stride, end - j - kKeys);
      commit_copies();
    }
    if (works) {
      if (j + kKeys - 1 > first_t || j < most_begin) w.mask(a, j);
      w.exponentiate(scale);
      w.add_values(rows_first<kDim>(unhoisted(v_tile), 0, lane));
    }
  }
  write_out<kDim>(w, q_tile + warp * 32 * kDim * 2, a, head);
}

template <int kDim, int kKeys>
void launch_mma(const Args& a, const Launch& launch) {
  constexpr int kBytes = shared_bytes<kDim, kKeys>();
  const auto kernel = attend_mma<kDim, kKeys>;
  const auto blocks = static_cast<unsigned>(ceil_div(a.rows, kQueries) * a.heads);
  start_kernel("attention", kernel, blocks, kThreads, kBytes, launch, a);
}

// -- Any head_dim ------------------------------------------------------------------------------

template <class T, int kPasses>
__global__ void __launch_bounds__(kRowThreads) attend_rows(const Args a) {
  begin_kernel();
  extern __shared__ __align__(16) float floats[];
  const int d = a.head_dim, width = row_stride(d);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int tiles = (a.rows + kOwned - 1) / kOwned;
  const int t0 = (tiles - 1 - static_cast<int>(blockIdx.x) / a.heads) * kOwned;
  const int head = static_cast<int>(blockIdx.x) % a.heads;
  const int end = min(t0 + kOwned, a.rows), row = t0 + warp * kRowsPerWarp;
  float *q = floats, *k = q + kOwned * width, *v = k + kStreamed * width;

  const std::int64_t stride = static_cast<std::int64_t>(a.heads) * d;
  const std::int64_t kv_stride = static_cast<std::int64_t>(a.kv_heads) * d;
  const std::int64_t kv_at = static_cast<std::int64_t>(head / (a.heads / a.kv_heads)) * d;
  load_rows(q, static_cast<const T*>(a.q) + t0 * stride + head * d, stride, kOwned, end - t0, d);
  int begin[kRowsPerWarp];
  for (int r = 0; r < kRowsPerWarp; ++r) begin[r] = first_key(a, row + r);

  const Score score{a.scale, a.soft_cap};
  OnlineSoftmax<kPasses> softmax;
  softmax.clear();
  for (int j = first_key(a, t0); j < end; j += kStreamed) {
    __syncthreads();
    const std::int64_t at = kv_at + j * kv_stride;
    load_rows(k, static_cast<const T*>(a.k) + at, kv_stride, kStreamed, end - j, d);
    load_rows(v, static_cast<const T*>(a.v) + at, kv_stride, kStreamed, end - j, d);
    __syncthreads();
    float scores[kRowsPerWarp];
    dot_rows(scores, q + warp * kRowsPerWarp * width, k + lane * width, d);
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const bool sees = j + lane >= begin[r] && j + lane <= row + r;
      scores[r] = sees ? score.of(scores[r]) : -INFINITY;
    }
    softmax.add(scores, v, d);
  }
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const float sum = warp_sum(softmax.sum[r]), factor = 1 / sum;
    const std::int64_t t = row + r;
    if (t >= end) continue;
    if (lane == 0) a.lse[t * a.heads + head] = softmax.largest[r] + logf(sum);
    for (int i = 0; i < kPasses; ++i) {
      const int c = lane + i * kWarp;
      if (c >= d) continue;
      static_cast<T*>(a.o)[(t * a.heads + head) * d + c] =
          from_float<T>(softmax.out[r][i] * factor);
    }
  }
}

template <class T, int kPasses>
void launch_rows(const Args& a, const Launch& launch) {
  const auto bytes_for = [](int d) {
    return (kOwned + 2 * kStreamed) * row_stride(d) * static_cast<int>(sizeof(float));
  };
  const auto kernel = attend_rows<T, kPasses>;
  const auto blocks = static_cast<unsigned>(ceil_div(a.rows, kOwned) * a.heads);
  start_kernel("attention", kernel, blocks, kRowThreads,
               static_cast<std::size_t>(bytes_for(a.head_dim)), launch, a);
}
static_assert((kOwned + 2 * kStreamed) * (kMaxHeadDim + 4) * 4 <= kSharedLimit);

bool supports(const OpCall& call) {
  return is_computable(call.out_types[0].dtype) &&
         call.node->get<AttentionParams>().head_dim <= kMaxHeadDim;
}

std::int64_t scratch_bytes(const OpCall& call, const Card& card) {
  if (card.hopper && attention_hopper_supports(call, card)) {
    return attention_hopper_scratch_bytes(call, card);
  }
  return 0;
}

void run(const OpCall& call, const Launch& launch) {
  const Card& card = *launch.card;
  const AttentionShape n(call);
  if (n.rows == 0) return;
  if (card.hopper && attention_hopper_supports(call, card)) return attention_hopper(call, launch);
  const Args a{call.in[0],
               call.in[1],
               call.in[2],
               call.input<std::int32_t>(3),
               call.out[0],
               call.output<float>(1),
               static_cast<int>(n.rows),
               static_cast<int>(n.heads),
               static_cast<int>(n.kv_heads),
               static_cast<int>(n.head_dim),
               n.params.scale,
               n.params.soft_cap};
  if (attention_on_tensor_cores(call)) {
    if (n.head_dim == 64) return launch_mma<64, 64>(a, launch);
    return launch_mma<128, 64>(a, launch);
  }
  with_type(call.out_types[0].dtype, [&](auto element) {
    with_passes(n.head_dim, [&](auto passes) {
      launch_rows<decltype(element), decltype(passes)::value>(a, launch);
    });
  });
}

}  // namespace

extern const Kernel attention_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cuda
