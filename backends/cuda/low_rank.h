// The thin products of an adapter (rank r up to a few hundred against thousands of channels) and
// the parameter gradients: sums over channels or over tokens whose other side is narrow.
//
// Scratch depends on dtypes, shapes and whether there is dropout, never on addresses.
//
// All in F32 with one rounding at the store. Sums over tokens run in tiles of kTokenTile rows, in
// order: acc = acc + tile_sum.
#pragma once

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

inline constexpr int kTokenTile = 512;

// u[m, r] = scale * sum_c drop(x)[m, c] a[r, c]; x [m, cols], a [r, cols] row major, dtype of all:
// BF16 or F32. With dropout, kept elements enter unscaled: put 1/(1-p) into scale.
struct DownProduct {
  DType dtype;
  std::int64_t m, cols, rank;
  const void* x;
  const void* a;
  DropoutArgs drop;
  float scale;
  void* u;
};
std::int64_t down_scratch_bytes(const DownProduct& p, const Card& card);
void down_product(const DownProduct& p, void* scratch, const Launch& launch);

// du[m, r] = scale * sum_n dy[m, n] b[n, r]; dy [m, cols], b [cols, r] row major.
struct UpGradient {
  DType dtype;
  std::int64_t m, cols, rank;
  const void* dy;
  const void* b;
  float scale;
  void* du;
};
std::int64_t up_gradient_scratch_bytes(const UpGradient& p, const Card& card);
void up_gradient(const UpGradient& p, void* scratch, const Launch& launch);

// acc[i, j] += scale * sum_t left[t, i] drop(right)[t, j]; acc F32 [left_cols, right_cols].
// Serves dA (left = du, right = x, with dropout), dB and every linear_dw (left = dy, right = x or
// u, no dropout). left may be F32 in a BF16 graph (left_dtype).
struct TokenSum {
  DType left_dtype, right_dtype;
  std::int64_t rows, left_cols, right_cols;
  const void* left;
  const void* right;
  DropoutArgs drop;  // of `right`, kept elements unscaled
  float scale;
  float* acc;
  std::int64_t left_stride = 0;  // elements, a row readable to it; 0: rows are contiguous

  std::int64_t left_pitch() const { return left_stride != 0 ? left_stride : left_cols; }
};
std::int64_t token_sum_scratch_bytes(const TokenSum& p, const Card& card);
void token_sum(const TokenSum& p, void* scratch, const Launch& launch);

}  // namespace nibble::cuda
