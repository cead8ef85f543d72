// How a product is cut up, as far as it decides scratch memory: the same for every instruction
// set, so that a plan made on one machine fits another. Arithmetic only.
#pragma once

#include <cstdint>

#include "backends/cpu/gemm.h"

namespace nibble::cpu {

// Up to this many rows a product keeps each decoded panel in a thread's cache and lets all rows
// use it at once; beyond, decoded panels are shared by all threads.
inline constexpr std::int64_t kFewRows = 32;
// Reduction elements per pass. A panel of 32 columns is 48 KiB, a row tile of 12 rows 18 KiB.
inline constexpr std::int64_t kInnerBlock = 384;
// Columns of the result per pass; less when BF16 results need an F32 copy.
inline constexpr std::int64_t kColumnBlock = 2048, kRoundedColumnBlock = 1024;
// Panels start at multiples of this, which every instruction set's panel width divides.
inline constexpr std::int64_t kPanelMultiple = 32;
// Columns that one packing task decodes side by side.
inline constexpr std::int64_t kGroupColumns = 256;

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
constexpr std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Width of a column pass: `columns` in equal shares of at most `limit`, in whole groups; when one
// pass does, in whole panels.
constexpr std::int64_t column_block(std::int64_t columns, std::int64_t limit) {
  const std::int64_t passes = larger(quotient_up(columns, limit), 1);
  const std::int64_t unit = passes > 1 ? kGroupColumns : kPanelMultiple;
  return quotient_up(quotient_up(columns, passes), unit) * unit;
}

// Byte offsets of the parts of the scratch memory.
struct ScratchParts {
  std::int64_t a = 0;       // packed activations
  std::int64_t b = 0;       // packed, decoded weights
  std::int64_t result = 0;  // F32 copy of BF16 results between passes
  std::int64_t bytes = 0;
};

constexpr ScratchParts scratch_parts(std::int64_t a_bytes, std::int64_t b_bytes,
                                     std::int64_t result_bytes) {
  ScratchParts p;
  p.b = quotient_up(a_bytes, 64) * 64;
  p.result = p.b + quotient_up(b_bytes, 64) * 64;
  p.bytes = p.result + quotient_up(result_bytes, 64) * 64;
  return p;
}

constexpr std::int64_t multiply_columns(DType y, std::int64_t outputs) {
  return column_block(outputs, y == DType::BF16 ? kRoundedColumnBlock : kColumnBlock);
}

// `inner` is the sum of the terms' reductions.
constexpr ScratchParts multiply_parts(DType x, DType y, std::int64_t rows, std::int64_t outputs,
                                      std::int64_t inner) {
  const std::int64_t element = x == DType::F64 ? 8 : 4;
  if (rows <= kFewRows) return scratch_parts(rows * inner * element, 0, 0);
  const std::int64_t columns = multiply_columns(y, outputs);
  const std::int64_t depth = smaller(inner, kInnerBlock);
  return scratch_parts(rows * depth * element, columns * depth * element,
                       y == DType::BF16 ? rows * columns * element : 0);
}

// dW^T instead of dW: when dW has few columns (LoRA's B), they become the rows of the tiles, so
// that no panel is mostly padding.
constexpr bool gradient_is_swapped(std::int64_t n, std::int64_t k) {
  return k < kPanelMultiple && n > k;
}

constexpr ScratchParts gradient_parts(DType dw, std::int64_t rows, std::int64_t n, std::int64_t k) {
  const std::int64_t element = dw == DType::F64 ? 8 : 4;
  const bool swapped = gradient_is_swapped(n, k);
  const std::int64_t tile_rows = swapped ? k : n, outputs = swapped ? n : k;
  const std::int64_t depth = smaller(rows, kGradientTile);
  const std::int64_t columns = column_block(outputs, kColumnBlock);
  return scratch_parts(tile_rows * depth * element, columns * depth * element, 0);
}

}  // namespace nibble::cpu
