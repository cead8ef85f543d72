// What the Hopper kernels of attention and of its gradient share: rings of tiles in shared memory,
// and the walk over tiles of query rows with the tiles of keys that they see.
#pragma once

#include "backends/cuda/hopper.cuh"

namespace nibble::cuda::hopper {

inline constexpr int kKeys = 128;  // rows of a key tile
inline constexpr int kStages = 2;  // of every ring
inline constexpr float kLog2E = 1.4426950408889634f;

// Which stage of a ring is next, and the parity of its barrier.
struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What a tile number means: kRows query rows of one head, the last rows first, because in a long
// document they see the most keys. Heads vary fastest: those that share keys run at the same time.
template <int kRows>
struct QueryTile {
  __device__ QueryTile(int number, int rows, int heads, const std::int32_t* span_begin) {
    head = number % heads;
    first_row = (count(rows, 1) - 1 - number / heads) * kRows;
    first_key_tile = span_begin[first_row] / kKeys;
    last_key_tile = (min(first_row + kRows, rows) - 1) / kKeys;
  }
  __host__ __device__ static int count(int rows, int heads) {
    return (rows + kRows - 1) / kRows * heads;
  }
  int head, first_row, first_key_tile, last_key_tile;
};

// A whole tile, from `row` and `column` on, in boxes of kBoxRows x 64.
template <int kBoxRows, int kBoxes, int kRows>
__device__ inline void load_tile(bf16 (&to)[kBoxes][kRows][kBoxColumns], const CUtensorMap& map,
                                 int column, int row, Barrier& full) {
  static_assert(kRows % kBoxRows == 0);
  for (int box = 0; box < kBoxes; ++box) {
    for (int r = 0; r < kRows; r += kBoxRows) {
      load_box(to[box][r], map, column + box * kBoxColumns, row + r, full);
    }
  }
}

// One arrival for each warp of a warpgroup.
__device__ inline void release(Barrier& empty) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) empty.arrive();
}

// d (+)= a b^T: 64 rows of a by the rows of b, kDepth deep, both stored along the depth; a_rows and
// b_rows are those of their boxes.
template <int kDepth, int kSize>
__device__ inline void products_along(float (&d)[kSize], const void* a, int a_rows, const void* b,
                                      int b_rows) {
  const std::uint64_t a_operand = operand(a), b_operand = operand(b);
  products_begin();
#pragma unroll
  for (int depth = 0; depth < kDepth / 16; ++depth) {
    const int box = depth / 4, inside = depth % 4 * 32;
    product<along, along>(d, a_operand + (box * a_rows * kBoxRowBytes + inside) / 16,
                          b_operand + (box * b_rows * kBoxRowBytes + inside) / 16, depth > 0);
  }
  products_commit();
}

// d += weights b, over the kDepth rows of b, which are those of its boxes.
template <int kSteps, int kSize>
__device__ inline void products_across(float (&d)[kSize], std::uint32_t (&weights)[kSteps][4],
                                       const void* b) {
  const std::uint64_t b_operand = operand(b, kSteps * 16 * kBoxRowBytes);
  hold(weights);
  hold(d);
  products_begin();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    product<across>(d, weights[step], b_operand + step * 16 * kBoxRowBytes / 16, 1);
  }
  products_commit();
}

// A warpgroup's accumulators as BF16 into its 64 rows of a tile.
template <int kSize, int kBoxes, int kRows>
__device__ inline void store_rows(bf16 (&to)[kBoxes][kRows][kBoxColumns], int first_row,
                                  const float (&d)[kSize]) {
  static_assert(kSize * 2 == kBoxes * kBoxColumns);
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp;
  std::uint32_t words[kSize / 8][4];
  round_fragments(d, words);
#pragma unroll
  for (int i = 0; i < kSize / 8; ++i) {
    store_fragment(to[i / 4][first_row], 16 * warp, i % 4 * 16, words[i]);
  }
}

// Lets warpgroups start their products in turns, so that the arithmetic of one runs under the
// products of the other. Uses named barriers first, first + 1, ...
template <int kWarpgroups>
struct Turns {
  int first, mine;
  // Once, at the start: the first warpgroup's turn.
  __device__ void begin() const {
    if (mine == kWarpgroups - 1) pass();
  }
  __device__ void take() const { named_sync(first + mine, 2 * kWarpgroup); }
  __device__ void pass() const { named_arrive(first + (mine + 1) % kWarpgroups, 2 * kWarpgroup); }
};

}  // namespace nibble::cuda::hopper
