// Reading rows of a tensor as numbers, whatever it is stored as: plain types, NF4 and FP4
// planes, ggml blocks. `linear` and `embedding` are built on this; a new format is one file in
// decode/.
//
// Values are those of nibble::dequantize (engine/quantize.h) bit for bit, on every instruction
// set. Reading as double widens the F32 value, except for F64 storage, which is exact.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cpu/isa.h"
#include "engine/dtype.h"

namespace nibble::cpu {

// A stored matrix with everything its decoder needs, worked out once. Borrows `data`; a value,
// free of allocation, and usable by any number of threads.
struct StoredMatrix {
  const std::byte* data = nullptr;
  DType dtype = DType::F32;
  std::int64_t rows = 0, cols = 0;
  std::int64_t first_row = 0;  // of the tensor at `data`: where row 0 of this view lies
  std::int64_t stride = 0;     // plain types: elements from a row to the next; others: cols
  // NF4 and FP4 only.
  std::int64_t block = 0;           // elements that share an absmax
  const float* codebook = nullptr;  // 16 values
  const std::byte* absmax = nullptr;
  const std::byte* scale = nullptr;  // null without double quantization
  const float* map = nullptr;        // 256 values of the 8-bit absmax
  float offset = 0;
};

// Rows [begin, begin + count) of `m`.
StoredMatrix row_range(const StoredMatrix& m, std::int64_t begin, std::int64_t count);

// Views a tensor of `type` at `data` (kHostPlaneAlignment planes) as type.shape.rows() rows.
// Throws Unsupported for a type without a decoder (see can_decode).
StoredMatrix stored_matrix(const TensorType& type, const std::byte* data);
bool can_decode(DType dtype);

// A plain matrix whose rows lie `stride` elements apart.
StoredMatrix plain_matrix(DType dtype, const void* data, std::int64_t rows, std::int64_t cols,
                          std::int64_t stride);

// Decodes `count` elements of `row` from column `col` on. Block formats: `col` is a multiple of
// 32, and so is `count` unless it reaches the row's end. Other types: any.
void decode_row(Isa isa, const StoredMatrix& m, std::int64_t row, std::int64_t col,
                std::int64_t count, float* out);
void decode_row(Isa isa, const StoredMatrix& m, std::int64_t row, std::int64_t col,
                std::int64_t count, double* out);

}  // namespace nibble::cpu
