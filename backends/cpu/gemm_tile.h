// The inner kernel of a product: a tile of up to kTileRows rows times one panel of columns, kept in
// registers over the whole reduction.
//
//   acc[i][v] = fma(a[k][i], b[k][v], acc[i][v])   for k = 0, 1, ...
//
// One instance per number of rows, so that a single row does a single row's work; every instance
// does the same multiply-adds in the same order for each element, so a row's result does not
// depend on its tile. `a` is packed [k][rows], `b` [k][width]. The tile is 12 x 2 vectors on
// AVX-512 (24 of 32 registers accumulate), 6 x 2 on AVX2 (12 of 16), 4 x 2 portable; a panel of
// one vector serves narrow matrices and the last columns.
#pragma once

#include <cstdint>
#include <utility>

#include "backends/cpu/vec.h"

namespace nibble::cpu::NIBBLE_ISA {

#if NIBBLE_ISA_LEVEL == 2
inline constexpr int kTileRows = 12;
#elif NIBBLE_ISA_LEVEL == 1
inline constexpr int kTileRows = 6;
#else
inline constexpr int kTileRows = 4;
#endif
inline constexpr int kPanelVectors = 2;

template <class T>
inline constexpr int kPanelWidth = kPanelVectors* Simd<T>::lanes;

// What happens to the sums: replace c, go on from c, or start from zero and be added to c.
enum class TileStart { Zero, Continue, Add };

template <class T>
using TileKernel = void (*)(std::int64_t depth, const T* a, const T* b, T* c, std::int64_t stride,
                            TileStart start);

template <class T, int kRows, int kVectors>
void tile_kernel(std::int64_t depth, const T* a, const T* b, T* c, std::int64_t stride,
                 TileStart start) {
  using Vec = typename Simd<T>::Vec;
  constexpr int kLanes = Simd<T>::lanes;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      acc[i][v] = start == TileStart::Continue ? load(c + i * stride + v * kLanes) : Vec{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec row = splat(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(row, column[v], acc[i][v]);
    }
    a += kRows;
    b += kVectors * kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + i * stride + v * kLanes;
      store(to, start == TileStart::Add ? load(to) + acc[i][v] : acc[i][v]);
    }
  }
}

// kernels[rows - 1][vectors - 1]
template <class T>
struct TileKernels {
  TileKernel<T> at[kTileRows][kPanelVectors];
};

template <class T, int... kRow>
constexpr TileKernels<T> make_tile_kernels(std::integer_sequence<int, kRow...>) {
  return {{{tile_kernel<T, kRow + 1, 1>, tile_kernel<T, kRow + 1, 2>}...}};
}

template <class T>
inline constexpr TileKernels<T> kTileKernels =
    make_tile_kernels<T>(std::make_integer_sequence<int, kTileRows>{});

}  // namespace nibble::cpu::NIBBLE_ISA
