// The thin products and sums over tokens of low_rank.h: which kernel, tile and slices serve a call.
//
//   down   u[m, r]   = scale * sum_c drop(x)[m, c] a[r, c]       A = x,  B = a
//   up     du[m, r]  = scale * sum_n dy[m, n] b[n, r]            A = dy, B = b
//   tokens acc[i, j] += scale * sum_t left[t, i] drop(right)[t, j]
//                                                   A = the wider side, or the one with dropout
// BF16 operands take the tensor cores: Hopper's for ranks above 32 (low_rank_hopper.h), else
// mma.sync (low_rank_mma.cuh). F32 ones, and an F32 left beside a BF16
// right, take 64 x 64 tiles of multiply-adds here.
//
// The bytes of the wide operand bound the time, so slices exist to give every multiprocessor a
// part of it: up to 8 slices of the channels of a thin product, 512 tokens each of a sum over
// tokens. The slices of a thin product depend on the number of rows, those of a sum over tokens do
// not: adding up 1024 rows, or 512 and then 512, gives the same bits.
//
// On an H100 (4096 rows x 4096 channels, rank 16: 12.9 us at 2.6 TB/s): down 16 us, with dropout
// 29 us, which the ten rounds of philox bound; dB 20 us, dA with dropout 30 us.
#include "backends/cuda/low_rank.h"

#include <algorithm>

#include "backends/cuda/low_rank_hopper.h"
#include "backends/cuda/low_rank_mma.cuh"

namespace nibble::cuda {
namespace {

using low_rank::Finish;
using low_rank::Order;
using low_rank::Product;

// Sums of slices in scratch beyond this are not worth their memory: a block then takes all slices.
constexpr std::int64_t kMostScratch = 64 << 20;

// -- Sums of slices in scratch -----------------------------------------------------------------

constexpr int kFinishThreads = 256;

template <class T>
__global__ __launch_bounds__(kFinishThreads) void finish_round(const float* sums, int slices,
                                                               std::int64_t count, float scale,
                                                               T* to) {
  begin_kernel();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < slices; ++s) sum += sums[s * count + i];
  to[i] = from_float<T>(scale * sum);
}

__global__ __launch_bounds__(kFinishThreads) void finish_add(const float* sums, int slices,
                                                             std::int64_t count, float scale,
                                                             float* acc) {
  begin_kernel();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (i >= count) return;
  float sum = acc[i];
#pragma unroll 8
  for (int s = 0; s < slices; ++s) sum = fmaf(scale, sums[s * count + i], sum);
  acc[i] = sum;
}

template <class T>
void run_finish_round(const float* sums, std::int64_t slices, std::int64_t count, float scale,
                      void* to, const Launch& launch) {
  start_kernel("finish_round", finish_round<T>,
               static_cast<unsigned>(ceil_div(count, kFinishThreads)), kFinishThreads, 0, launch,
               sums, static_cast<int>(slices), count, scale, static_cast<T*>(to));
}
void run_finish_add(const float* sums, std::int64_t slices, std::int64_t count, float scale,
                    float* acc, const Launch& launch) {
  start_kernel("finish_add", finish_add, static_cast<unsigned>(ceil_div(count, kFinishThreads)),
               kFinishThreads, 0, launch, sums, static_cast<int>(slices), count, scale, acc);
}

// -- Multiply-adds -----------------------------------------------------------------------------

constexpr int kPlain = 64, kPlainK = 16, kPlainThreads = 256;

enum class DropOn { nothing, a, b };

// out[i, j] = sum_k A(i, k) B(k, j); A(i, k) = a[i a_row + k a_k], B(k, j) = b[k b_k + j b_col].
template <class A, class B>
struct PlainProduct {
  const A* a;
  std::int64_t a_row, a_k;
  const B* b;
  std::int64_t b_k, b_col;
  std::int64_t m, n, k, slice;
  DropoutArgs drop;
  DropOn drop_on;  // a: row i is a token; b: k is
  float scale;
  bool add;    // out += scale * slice, slice by slice; else out[slice] = the slice's sums
  float* out;  // [m, n] or [slices, m, n]
};

__device__ bool keeps(const DropoutArgs& drop, std::int64_t token, std::int64_t channel) {
  const uint4 w = dropout_words(drop.rng[0], drop.rng[1], drop.adapter, drop.ordinal[token],
                                static_cast<std::uint32_t>(channel / 4));
  const auto i = channel % 4;
  return ((i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w) >> 8) >= drop.threshold;
}

template <class A, class B>
struct PlainTile {
  const PlainProduct<A, B>& p;
  float (&a)[kPlainK][kPlain + 4];
  float (&b)[kPlainK][kPlain + 4];
  std::int64_t row, col;  // of the tile
  float sums[4][4];

  // Neighbouring threads read neighbouring elements, whichever way an operand lies.
  __device__ void fill(std::int64_t k0, std::int64_t k_end) {
    for (int e = static_cast<int>(threadIdx.x); e < kPlain * kPlainK; e += kPlainThreads) {
      const int k = p.a_k == 1 ? e % kPlainK : e / kPlain;
      const int i = p.a_k == 1 ? e / kPlainK : e % kPlain;
      bool real = row + i < p.m && k0 + k < k_end;
      if (real && p.drop_on == DropOn::a) real = keeps(p.drop, row + i, k0 + k);
      a[k][i] = real ? to_float(p.a[(row + i) * p.a_row + (k0 + k) * p.a_k]) : 0;
    }
    for (int e = static_cast<int>(threadIdx.x); e < kPlain * kPlainK; e += kPlainThreads) {
      const int k = p.b_k == 1 ? e % kPlainK : e / kPlain;
      const int j = p.b_k == 1 ? e / kPlainK : e % kPlain;
      bool real = col + j < p.n && k0 + k < k_end;
      if (real && p.drop_on == DropOn::b) real = keeps(p.drop, k0 + k, col + j);
      b[k][j] = real ? to_float(p.b[(k0 + k) * p.b_k + (col + j) * p.b_col]) : 0;
    }
  }
  __device__ void multiply(int y, int x) {
#pragma unroll
    for (int k = 0; k < kPlainK; ++k) {
      float u[4], v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[i] = a[k][y * 4 + i];
        v[i] = b[k][x * 4 + i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(u[i], v[j], sums[i][j]);
      }
    }
  }
};

template <class A, class B>
__global__ __launch_bounds__(kPlainThreads) void plain_thin_product(PlainProduct<A, B> p) {
  begin_kernel();
  __shared__ float a[kPlainK][kPlain + 4], b[kPlainK][kPlain + 4];
  const int y = static_cast<int>(threadIdx.x) / 16, x = static_cast<int>(threadIdx.x) % 16;
  PlainTile<A, B> tile{p,
                       a,
                       b,
                       static_cast<std::int64_t>(blockIdx.x) * kPlain,
                       static_cast<std::int64_t>(blockIdx.y) * kPlain,
                       {}};
  for (std::int64_t s = blockIdx.z; s * p.slice < p.k; s += gridDim.z) {
    const std::int64_t begin = s * p.slice;
    const std::int64_t end = begin + p.slice < p.k ? begin + p.slice : p.k;
    for (auto& row : tile.sums) {
      for (float& sum : row) sum = 0;
    }
    for (std::int64_t k = begin; k < end; k += kPlainK) {
      tile.fill(k, end);
      __syncthreads();
      tile.multiply(y, x);
      __syncthreads();
    }
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const std::int64_t row = tile.row + y * 4 + i, col = tile.col + x * 4 + j;
        if (row >= p.m || col >= p.n) continue;
        if (p.add) {
          float* const to = p.out + row * p.n + col;
          *to = fmaf(p.scale, tile.sums[i][j], *to);
        } else {
          p.out[(s * p.m + row) * p.n + col] = tile.sums[i][j];
        }
      }
    }
  }
}

template <class A, class B>
void run_plain(const PlainProduct<A, B>& p, const Launch& launch) {
  const std::int64_t slices = p.add ? 1 : ceil_div(p.k, p.slice);
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.m, kPlain)),
                    static_cast<unsigned>(ceil_div(p.n, kPlain)), static_cast<unsigned>(slices));
  start_kernel("plain_thin_product", plain_thin_product<A, B>, blocks, kPlainThreads, 0, launch, p);
}

constexpr std::int64_t kPlainSlice = 1024;  // channels

// -- Tensor cores ------------------------------------------------------------------------------

template <int kM, int kN, Order kOrderA, Order kOrderB>
void launch_tiles(const Product& p, const Launch& launch) {
  using C = low_rank::Config<kM, kN>;
  const auto kernel = low_rank::thin_product<kM, kN, kOrderA, kOrderB>;
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.m, kM) * p.slice_blocks),
                    static_cast<unsigned>(ceil_div(p.n, kN)));
  start_kernel("thin_product", kernel, blocks, low_rank::kThreads, C::kSharedBytes, launch, p);
}

low_rank::Operand operand(const void* data, std::int64_t stride) {
  return {static_cast<const bf16*>(data), stride, stride % 8 == 0};
}

// How a thin product is cut.
struct Cut {
  int rows;            // of a tile
  std::int64_t slice;  // channels
  std::int64_t slices;
};
Cut cut(std::int64_t m, std::int64_t cols, std::int64_t rank, const Card& card) {
  // High tiles read the narrow operand less often, which matters when it is not so narrow; low
  // ones need fewer slices to keep all multiprocessors busy.
  const int rows = rank <= 16 || m < 2048 ? 32 : m < 4096 ? 64 : 128;
  std::int64_t slices = 1;
  while (slices < 8 && 2 * slices * ceil_div(m, rows) <= card.multiprocessors) slices *= 2;
  const std::int64_t slice = std::max<std::int64_t>(ceil_div(ceil_div(cols, 128), slices), 2) * 128;
  return {rows, slice, ceil_div(cols, slice)};
}

std::int64_t thin_scratch_bytes(const Thin& t, const Card& card) {
  if (thin_hopper_supports(t, card)) return 0;
  if (t.dtype == DType::F32) return ceil_div(t.cols, kPlainSlice) * t.m * t.rank * 4;
  const std::int64_t slices = cut(t.m, t.cols, t.rank, card).slices;
  return slices == 1 ? 0 : slices * t.m * t.rank * 4;
}

template <Order kOrderB>
void thin_bf16(const Thin& t, void* scratch, const Launch& launch) {
  Product p{};
  p.a = operand(t.wide, t.cols);
  p.b = operand(t.narrow, kOrderB == Order::k_down_rows ? t.rank : t.cols);
  p.m = t.m;
  p.n = t.rank;
  p.k = t.cols;
  const Cut c = cut(t.m, t.cols, t.rank, *launch.card);
  const bool through_scratch = c.slices > 1;
  p.slice = c.slice;
  p.slice_blocks = static_cast<int>(c.slices);
  p.drop = t.drop;
  p.scale = t.scale;
  p.finish = through_scratch ? Finish::scratch : Finish::round;
  p.out = through_scratch ? scratch : t.out;
  constexpr auto kAlong = Order::k_along_rows;
  if (t.rank <= 16) {
    launch_tiles<32, 16, kAlong, kOrderB>(p, launch);
  } else if (c.rows == 32) {
    launch_tiles<32, 64, kAlong, kOrderB>(p, launch);
  } else if (c.rows == 64) {
    launch_tiles<64, 64, kAlong, kOrderB>(p, launch);
  } else {
    launch_tiles<128, 64, kAlong, kOrderB>(p, launch);
  }
  if (through_scratch) {
    run_finish_round<bf16>(static_cast<const float*>(scratch), c.slices, t.m * t.rank, t.scale,
                           t.out, launch);
  }
}

template <Order kOrderB>
void thin_f32(const Thin& t, void* scratch, const Launch& launch) {
  constexpr bool kDown = kOrderB == Order::k_down_rows;
  const PlainProduct<float, float> p{static_cast<const float*>(t.wide),
                                     t.cols,
                                     1,
                                     static_cast<const float*>(t.narrow),
                                     kDown ? t.rank : 1,
                                     kDown ? 1 : t.cols,
                                     t.m,
                                     t.rank,
                                     t.cols,
                                     kPlainSlice,
                                     t.drop,
                                     t.drop.p > 0 ? DropOn::a : DropOn::nothing,
                                     t.scale,
                                     /*add=*/false,
                                     static_cast<float*>(scratch)};
  run_plain(p, launch);
  run_finish_round<float>(p.out, ceil_div(t.cols, kPlainSlice), t.m * t.rank, t.scale, t.out,
                          launch);
}

void thin(const Thin& t, void* scratch, const Launch& launch) {
  if (t.m == 0) return;
  if (thin_hopper_supports(t, *launch.card)) return thin_hopper(t, launch);
  constexpr auto kAlong = Order::k_along_rows, kDown = Order::k_down_rows;
  if (t.dtype == DType::F32) {
    return t.narrow_by_cols ? thin_f32<kDown>(t, scratch, launch)
                            : thin_f32<kAlong>(t, scratch, launch);
  }
  return t.narrow_by_cols ? thin_bf16<kDown>(t, scratch, launch)
                          : thin_bf16<kAlong>(t, scratch, launch);
}

Thin thin_of(const DownProduct& p) {
  return {p.dtype, p.m, p.cols, p.rank, p.x, p.a, /*narrow_by_cols=*/false, p.drop, p.scale, p.u};
}
Thin thin_of(const UpGradient& p) {
  return {p.dtype, p.m, p.cols, p.rank, p.dy, p.b, /*narrow_by_cols=*/true, {}, p.scale, p.du};
}

// -- Sums over tokens --------------------------------------------------------------------------

// Where the slices of an output tile meet.
enum class Meet { alone, scratch };

Meet meet(bool tensor_cores, std::int64_t rows, std::int64_t left_cols, std::int64_t right_cols,
          const Card& card) {
  const std::int64_t tiles = ceil_div(rows, kTokenTile);
  const bool wide = tensor_cores && std::min(left_cols, right_cols) > 64;
  const std::int64_t side = wide ? 128 : 64;
  const std::int64_t blocks = ceil_div(left_cols, side) * ceil_div(right_cols, side);
  if (tiles <= 1 || blocks >= card.multiprocessors) return Meet::alone;
  return tiles * left_cols * right_cols * 4 > kMostScratch ? Meet::alone : Meet::scratch;
}

bool on_tensor_cores(DType left, DType right) {
  return left == DType::BF16 && right == DType::BF16;
}

void token_sum_bf16(const TokenSum& p, Meet how, void* scratch, const Launch& launch) {
  const low_rank::Operand left = operand(p.left, p.left_pitch());
  const low_rank::Operand right = operand(p.right, p.right_cols);
  const bool a_is_right = p.drop.p > 0 || p.right_cols > p.left_cols;
  Product q{};
  q.a = a_is_right ? right : left;
  q.b = a_is_right ? left : right;
  q.m = a_is_right ? p.right_cols : p.left_cols;
  q.n = a_is_right ? p.left_cols : p.right_cols;
  q.k = p.rows;
  q.slice = kTokenTile;
  q.slice_blocks = how == Meet::scratch ? static_cast<int>(ceil_div(p.rows, kTokenTile)) : 1;
  q.drop = p.drop;
  q.scale = p.scale;
  q.n_is_row = a_is_right;
  q.finish = how == Meet::scratch ? Finish::scratch : Finish::add;
  q.out = how == Meet::scratch ? scratch : p.acc;
  constexpr auto kDown = Order::k_down_rows;
  if (q.n > 64 && p.drop.p == 0) {
    launch_tiles<128, 128, kDown, kDown>(q, launch);
  } else if (q.n > 16) {
    launch_tiles<64, 64, kDown, kDown>(q, launch);
  } else {
    launch_tiles<64, 16, kDown, kDown>(q, launch);
  }
}

template <class Left, class Right>
void token_sum_plain(const TokenSum& p, Meet how, void* scratch, const Launch& launch) {
  const PlainProduct<Left, Right> q{static_cast<const Left*>(p.left),
                                    1,
                                    p.left_pitch(),
                                    static_cast<const Right*>(p.right),
                                    p.right_cols,
                                    1,
                                    p.left_cols,
                                    p.right_cols,
                                    p.rows,
                                    kTokenTile,
                                    p.drop,
                                    p.drop.p > 0 ? DropOn::b : DropOn::nothing,
                                    p.scale,
                                    /*add=*/how == Meet::alone,
                                    how == Meet::alone ? p.acc : static_cast<float*>(scratch)};
  run_plain(q, launch);
}

}  // namespace

std::int64_t down_scratch_bytes(const DownProduct& p, const Card& card) {
  return thin_scratch_bytes(thin_of(p), card);
}
void down_product(const DownProduct& p, void* scratch, const Launch& launch) {
  thin(thin_of(p), scratch, launch);
}

std::int64_t up_gradient_scratch_bytes(const UpGradient& p, const Card& card) {
  return thin_scratch_bytes(thin_of(p), card);
}
void up_gradient(const UpGradient& p, void* scratch, const Launch& launch) {
  thin(thin_of(p), scratch, launch);
}

std::int64_t token_sum_scratch_bytes(const TokenSum& p, const Card& card) {
  if (token_sum_hopper_supports(p, card)) return 0;
  const bool tensor_cores = on_tensor_cores(p.left_dtype, p.right_dtype);
  if (meet(tensor_cores, p.rows, p.left_cols, p.right_cols, card) != Meet::scratch) return 0;
  return ceil_div(p.rows, kTokenTile) * p.left_cols * p.right_cols * 4;
}
void token_sum(const TokenSum& p, void* scratch, const Launch& launch) {
  if (p.rows == 0) return;
  if (token_sum_hopper_supports(p, *launch.card)) return token_sum_hopper(p, launch);
  const bool tensor_cores = on_tensor_cores(p.left_dtype, p.right_dtype);
  const Meet how = meet(tensor_cores, p.rows, p.left_cols, p.right_cols, *launch.card);
  if (tensor_cores) {
    token_sum_bf16(p, how, scratch, launch);
  } else if (p.right_dtype == DType::F32) {
    token_sum_plain<float, float>(p, how, scratch, launch);
  } else {
    token_sum_plain<float, bf16>(p, how, scratch, launch);
  }
  if (how == Meet::scratch) {
    run_finish_add(static_cast<const float*>(scratch), ceil_div(p.rows, kTokenTile),
                   p.left_cols * p.right_cols, p.scale, p.acc, launch);
  }
}

}  // namespace nibble::cuda
