// Packing: rows of activations into row tiles [k][rows], columns of the other operand into panels
// [k][width], zero-padded to whole vectors. Stored weights are decoded here.
#pragma once

#include <cstdint>

#include "backends/cpu/decode/decoders.h"
#include "backends/cpu/gemm.h"
#include "backends/cpu/gemm_blocking.h"
#include "backends/cpu/gemm_tile.h"

namespace nibble::cpu::NIBBLE_ISA {

[[gnu::always_inline]] inline float widen(float x) { return x; }
[[gnu::always_inline]] inline double widen(double x) { return x; }
[[gnu::always_inline]] inline float widen(bf16 x) { return to_float(x); }

// The panels over `columns` columns. All are kPanelWidth wide but the last, which is one vector
// when that holds what is left.
template <class T>
struct Panels {
  std::int64_t columns;
  std::int64_t count() const { return quotient_up(columns, kPanelWidth<T>); }
  std::int64_t begin(std::int64_t p) const { return p * kPanelWidth<T>; }
  std::int64_t valid(std::int64_t p) const { return smaller(columns - begin(p), kPanelWidth<T>); }
  int width(std::int64_t p) const {
    return valid(p) <= Simd<T>::lanes ? Simd<T>::lanes : kPanelWidth<T>;
  }
};

// out[k * rows + i] = alpha * x[i * stride + k]
template <class T, class In>
void pack_rows(const In* x, std::int64_t stride, int rows, std::int64_t depth, T alpha, T* out) {
  std::int64_t k = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    // Sixteen (kFloatLanes) columns at a time stay in the first cache while all rows pass.
    for (; k + kFloatLanes <= depth; k += kFloatLanes) {
      for (int i = 0; i < rows; ++i) {
        const VecF32 v = load(x + i * stride + k) * alpha;
        T* to = out + k * rows + i;
#pragma GCC unroll 16
        for (int j = 0; j < kFloatLanes; ++j) to[j * rows] = v[j];
      }
    }
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < rows; ++i) out[k * rows + i] = widen(x[i * stride + k]) * alpha;
  }
}

// out[k * rows + i] = alpha * x[k * stride + i]
template <class T, class In>
void pack_columns(const In* x, std::int64_t stride, int rows, std::int64_t depth, T alpha, T* out) {
  for (std::int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < rows; ++i) out[k * rows + i] = widen(x[k * stride + i]) * alpha;
  }
}

// A row tile of x: rows [row, row + rows), columns [col, col + depth).
template <class T>
void pack_row_tile(const ConstMatrix& x, std::int64_t row, int rows, std::int64_t col,
                   std::int64_t depth, T alpha, T* out) {
  const std::int64_t at = row * x.stride + col;
  if constexpr (sizeof(T) == sizeof(double)) {
    pack_rows(static_cast<const double*>(x.data) + at, x.stride, rows, depth, alpha, out);
  } else if (x.dtype == DType::BF16) {
    pack_rows(static_cast<const bf16*>(x.data) + at, x.stride, rows, depth, alpha, out);
  } else {
    pack_rows(static_cast<const float*>(x.data) + at, x.stride, rows, depth, alpha, out);
  }
}

// A row tile of x^T: columns [col, col + rows) of x, rows [row, row + depth).
template <class T>
void pack_column_tile(const ConstMatrix& x, std::int64_t col, int rows, std::int64_t row,
                      std::int64_t depth, T alpha, T* out) {
  const std::int64_t at = row * x.stride + col;
  if constexpr (sizeof(T) == sizeof(double)) {
    pack_columns(static_cast<const double*>(x.data) + at, x.stride, rows, depth, alpha, out);
  } else if (x.dtype == DType::BF16) {
    pack_columns(static_cast<const bf16*>(x.data) + at, x.stride, rows, depth, alpha, out);
  } else {
    pack_columns(static_cast<const float*>(x.data) + at, x.stride, rows, depth, alpha, out);
  }
}

// Panel p of w^T: its columns are rows first + begin(p) ... of w, the reduction runs over w's
// columns [col, col + depth). `out` is that panel's.
template <class T>
void pack_panel_of_rows(const StoredMatrix& w, std::int64_t first, const Panels<T>& panels,
                        std::int64_t p, std::int64_t col, std::int64_t depth, T* out) {
  decode_columns(w, first + panels.begin(p), panels.valid(p), col, depth, out, panels.width(p));
}

// All panels that start in columns [begin, begin + kGroupColumns) of the pass, from rows [row + k0,
// row + k1) of w; the pass starts at column `first` of w. `out` is panel 0 of `depth` rows.
template <class T>
void pack_group_of_columns(const StoredMatrix& w, std::int64_t first, const Panels<T>& panels,
                           std::int64_t begin, std::int64_t row, std::int64_t k0, std::int64_t k1,
                           std::int64_t depth, T alpha, T* out) {
  const std::int64_t count = smaller(panels.columns - begin, kGroupColumns);
  const std::int64_t first_panel = begin / kPanelWidth<T>;
  const std::int64_t last_panel = first_panel + quotient_up(count, kPanelWidth<T>) - 1;
  const std::int64_t filled =
      panels.begin(last_panel) + panels.width(last_panel) - begin;  // with padding
  alignas(64) T values[kGroupColumns];
  for (std::int64_t j = count; j < filled; ++j) values[j] = 0;
  for (std::int64_t k = k0; k < k1; ++k) {
    read_row(w, row + k, first + begin, count, values);
    if (alpha != 1) {
      for (std::int64_t j = 0; j < count; ++j) values[j] *= alpha;
    }
    for (std::int64_t p = first_panel; p <= last_panel; ++p) {
      const int width = panels.width(p);
      const T* from = values + panels.begin(p) - begin;
      T* to = out + panels.begin(p) * depth + k * width;
      for (int v = 0; v < width; v += Simd<T>::lanes) store(to + v, load(from + v));
    }
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
