// The products of low_rank.h on Hopper: BF16, without dropout and without scratch. X_supports also
// says whether it is the faster way.
#pragma once

#include "backends/cuda/low_rank.h"

namespace nibble::cuda {

// acc[i, j] += scale * sum_t left[t, i] right[t, j].
bool token_sum_hopper_supports(const TokenSum& p, const Card& card);
void token_sum_hopper(const TokenSum& p, const Launch& launch);

// A thin product: out[m, r] = scale * sum_c drop(wide)[m, c] narrow(c, r); narrow is [rank, cols]
// (an adapter's A), or [cols, rank] when `narrow_by_cols` (its B).
struct Thin {
  DType dtype;
  std::int64_t m, cols, rank;
  const void* wide;
  const void* narrow;
  bool narrow_by_cols;
  DropoutArgs drop;
  float scale;
  void* out;
};
bool thin_hopper_supports(const Thin& p, const Card& card);
void thin_hopper(const Thin& p, const Launch& launch);

}  // namespace nibble::cuda
