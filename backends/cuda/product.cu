// The routes of a dense product (gemm.h), chosen from shapes, strides and the card:
//
//   hopper   one kernel of our own, the adapter's part inside it (gemm_hopper.cu)
//   library  cuBLASLt. An adapter's part is a product of its own that y then starts from; in BF16
//            it is rounded once on its own, which the fused kernel does not.
//   plain    16 x 16 tiles of multiply-adds: odd strides, and F32 in with BF16 out. What real
//   models
//            never take is right before it is fast.
#include "backends/cuda/blas.h"
#include "backends/cuda/gemm.h"
#include "engine/error.h"

namespace nibble::cuda {
namespace {

enum class Route { hopper, library, plain };

Route route(const Gemm& g, const Card& card) {
  if (g.dtype == DType::BF16 && gemm_hopper_supports(g, card)) return Route::hopper;
  // Rows that are whole 16 bytes: what the library's fast kernels read.
  const std::int64_t whole = g.dtype == DType::BF16 ? 8 : 4;
  const std::int64_t whole_y = g.y_dtype == DType::BF16 ? 8 : 4;
  const bool aligned = g.x_stride % whole == 0 && g.w_stride % whole == 0 &&
                       g.y_stride % whole_y == 0 && (g.rank == 0 || g.rank % whole == 0) &&
                       g.k % whole == 0 && g.n % whole_y == 0;
  const bool same_or_wider = g.dtype == DType::BF16 || g.y_dtype == DType::F32;
  return aligned && same_or_wider && g.m > 0 ? Route::library : Route::plain;
}

constexpr int kTile = 16;

// Operand pointers of the plain route: two products whose sums are added before the rounding.
template <class T>
struct Operands {
  const T* x;
  const T* w;
  const T* u;
  const T* b;
};

// sum over k of x[row, k] w[col, k] (or w[k, col]) for the thread's element, through shared tiles.
template <class T>
__device__ float tile_product(const T* x, std::int64_t x_stride, const T* w, std::int64_t w_stride,
                              bool n_by_k, std::int64_t m, std::int64_t n, std::int64_t k) {
  __shared__ float xs[kTile][kTile + 1], ws[kTile][kTile + 1];
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t col0 = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  float sum = 0;
  for (std::int64_t k0 = 0; k0 < k; k0 += kTile) {
    const std::int64_t row = row0 + ty;
    xs[ty][tx] = row < m && k0 + tx < k ? to_float(x[row * x_stride + k0 + tx]) : 0;
    if (n_by_k) {
      ws[ty][tx] = col0 + ty < n && k0 + tx < k ? to_float(w[(col0 + ty) * w_stride + k0 + tx]) : 0;
    } else {
      ws[tx][ty] = col0 + tx < n && k0 + ty < k ? to_float(w[(k0 + ty) * w_stride + col0 + tx]) : 0;
    }
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum = fmaf(xs[ty][i], ws[tx][i], sum);
    __syncthreads();
  }
  return sum;
}

__device__ bool keeps(const DropoutArgs& keep, std::int64_t row, std::int64_t col) {
  if (keep.p == 0) return true;
  const uint4 words = dropout_words(keep.rng[0], keep.rng[1], keep.adapter, keep.ordinal[row],
                                    static_cast<std::uint32_t>(col / 4));
  const std::uint32_t word = col % 4 == 0   ? words.x
                             : col % 4 == 1 ? words.y
                             : col % 4 == 2 ? words.z
                                            : words.w;
  return (word >> 8) >= keep.threshold;
}

template <class T, class Y>
__global__ void plain_product(Operands<T> in, Gemm g) {
  begin_kernel();
  const bool n_by_k = g.layout == WeightLayout::n_by_k;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.y) * kTile + threadIdx.y;
  const std::int64_t col = static_cast<std::int64_t>(blockIdx.x) * kTile + threadIdx.x;
  float sum = g.alpha * tile_product(in.x, g.x_stride, in.w, g.w_stride, n_by_k, g.m, g.n, g.k);
  if (g.rank > 0) {
    const float low =
        tile_product(in.u, g.rank, in.b, n_by_k ? g.rank : g.n, n_by_k, g.m, g.n, g.rank);
    if (row < g.m && col < g.n && keeps(g.keep, row, col)) sum = fmaf(g.low_scale, low, sum);
  }
  if (row < g.m && col < g.n) static_cast<Y*>(g.y)[row * g.y_stride + col] = from_float<Y>(sum);
}

template <class T, class Y>
void launch_plain(const Gemm& g, const Launch& launch) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(g.n, kTile)),
                    static_cast<unsigned>(ceil_div(g.m, kTile)));
  const Operands<T> in{static_cast<const T*>(g.x), static_cast<const T*>(g.w),
                       static_cast<const T*>(g.u), static_cast<const T*>(g.b)};
  start_kernel("plain_product", plain_product<T, Y>, blocks, dim3(kTile, kTile), 0, launch, in, g);
}

void product_plain(const Gemm& g, const Launch& launch) {
  if (g.dtype == DType::F32 && g.y_dtype == DType::F32)
    return launch_plain<float, float>(g, launch);
  if (g.dtype == DType::F32) return launch_plain<float, bf16>(g, launch);
  if (g.y_dtype == DType::F32) return launch_plain<bf16, float>(g, launch);
  launch_plain<bf16, bf16>(g, launch);
}

// y[t, c] = 0 where dropout drops it; one thread per group of four channels.
template <class T>
__global__ void drop_low(T* y, std::int64_t m, std::int64_t n, std::int64_t stride,
                         DropoutArgs keep) {
  begin_kernel();
  const std::int64_t groups = (n + 3) / 4;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x);
  if (at >= groups) return;
  const uint4 words = dropout_words(keep.rng[0], keep.rng[1], keep.adapter, keep.ordinal[row],
                                    static_cast<std::uint32_t>(at));
  const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
  for (int i = 0; i < 4; ++i) {
    if (4 * at + i < n && (word[i] >> 8) < keep.threshold) {
      y[row * stride + 4 * at + i] = from_float<T>(0.0f);
    }
  }
}

void product_library(const Gemm& g, void* workspace, const Launch& launch) {
  const bool n_by_k = g.layout == WeightLayout::n_by_k;
  Blas::Product main{n_by_k,     g.m,        g.n,     g.k,       g.x_stride,
                     g.w_stride, g.y_stride, g.dtype, g.y_dtype, g.rank > 0};
  Blas::Product low{n_by_k,     g.m,     g.n,       g.rank, g.rank, n_by_k ? g.rank : g.n,
                    g.y_stride, g.dtype, g.y_dtype, false};
  if (!launch.blas->supports(main) || (g.rank > 0 && !launch.blas->supports(low))) {
    return product_plain(g, launch);
  }
  if (g.rank > 0) {
    launch.blas->run(low, g.low_scale, g.u, g.b, g.y, workspace, launch.stream);
    if (g.keep.p > 0) {
      const dim3 blocks(static_cast<unsigned>(g.m),
                        static_cast<unsigned>(ceil_div(ceil_div(g.n, 4), 128)));
      with_type(g.y_dtype, [&](auto type) {
        using T = decltype(type);
        start_kernel("drop_low", drop_low<T>, blocks, 128, 0, launch, static_cast<T*>(g.y), g.m,
                     g.n, g.y_stride, g.keep);
      });
    }
  }
  launch.blas->run(main, g.alpha, g.x, g.w, g.y, workspace, launch.stream);
}

}  // namespace

std::int64_t product_scratch_bytes(const Gemm& g, const Card& card) {
  return route(g, card) == Route::library ? kBlasWorkspace : 0;
}

void product(const Gemm& g, void* scratch, const Launch& launch) {
  if (g.m == 0 || g.n == 0) return;
  switch (route(g, *launch.card)) {
    case Route::hopper:
      return gemm_hopper(g, launch);
    case Route::library:
      return product_library(g, scratch, launch);
    case Route::plain:
      return product_plain(g, launch);
  }
}

}  // namespace nibble::cuda
