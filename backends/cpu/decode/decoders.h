// What a storage format's file in this folder provides, for one instruction set (isa.h).
//
// Every format has NAME_row. A format for which it pays also has NAME_columns, which decodes
// kFloatLanes rows at once straight into the transposed layout that a product's panels have; the
// others are decoded by rows and then transposed (decode_columns in decode.cpp).
#pragma once

#include <cstdint>

#include "backends/cpu/decode.h"
#include "backends/cpu/vec.h"

namespace nibble::cpu::NIBBLE_ISA {

// out[i] = element col + i of the row, i < count. See decode_row for what col and count may be.
using RowDecoder = void(const StoredMatrix& m, std::int64_t row, std::int64_t col,
                        std::int64_t count, float* out);

RowDecoder f64_row, f32_row, f16_row, bf16_row, codebook_row, q8_0_row, q4_0_row, q4_1_row,
    q5_0_row, q5_1_row, q2_k_row, q3_k_row, q4_k_row, q5_k_row, q6_k_row;

// Whether codebook_columns can do this matrix: a block never straddles rows.
bool has_codebook_columns(const StoredMatrix& m);

// out[i * width + r] = element (row + r, col + i) for r < kFloatLanes, i < count; rows past
// `row_count` (>= 1) repeat the last one. col and count are multiples of 32.
void codebook_columns(const StoredMatrix& m, std::int64_t row, std::int64_t row_count,
                      std::int64_t col, std::int64_t count, float* out, std::int64_t width);

// The same for every format: `width` rows at once, a multiple of the lane count. col is a multiple
// of 32; count is too, unless it reaches the row's end.
void decode_columns(const StoredMatrix& m, std::int64_t row, std::int64_t row_count,
                    std::int64_t col, std::int64_t count, float* out, std::int64_t width);
void decode_columns(const StoredMatrix& m, std::int64_t row, std::int64_t row_count,
                    std::int64_t col, std::int64_t count, double* out, std::int64_t width);

// decode_row of backends/cpu/decode.h.
void read_row_f32(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                  float* out);
void read_row_f64(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                  double* out);
inline void read_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                     float* out) {
  read_row_f32(m, row, col, count, out);
}
inline void read_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                     double* out) {
  read_row_f64(m, row, col, count, out);
}

// First byte of the 32- or 256-element block that holds element (row, col).
inline const unsigned char* block_at(const StoredMatrix& m, std::int64_t row, std::int64_t col,
                                     std::int64_t block, std::int64_t block_bytes) {
  return reinterpret_cast<const unsigned char*>(m.data) +
         ((m.first_row + row) * (m.cols / block) + col / block) * block_bytes;
}

inline float half_at(const unsigned char* p) {
  f16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return to_float(h);
}

}  // namespace nibble::cpu::NIBBLE_ISA
