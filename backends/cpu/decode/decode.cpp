// Views of stored tensors, and the choice of the instruction set's decoder.
#include "backends/cpu/decode.h"

#include <cstring>

#include "engine/error.h"
#include "engine/quantize.h"

namespace nibble::cpu {

NIBBLE_PER_ISA(void read_row_f32(const StoredMatrix& m, std::int64_t row, std::int64_t col,
                                 std::int64_t count, float* out);
               void read_row_f64(const StoredMatrix& m, std::int64_t row, std::int64_t col,
                                 std::int64_t count, double* out);)

bool can_decode(DType dtype) {
  return is_float(dtype) || dtype == DType::NF4 || dtype == DType::FP4 || is_block(dtype);
}

StoredMatrix stored_matrix(const TensorType& type, const std::byte* data) {
  if (!can_decode(type.dtype)) {
    throw Unsupported("weight " + type.str() +
                      ": the CPU backend reads F64, F32, F16, BF16, NF4, FP4 and ggml blocks as "
                      "weights; convert it to one of these");
  }
  StoredMatrix m;
  m.data = data;
  m.dtype = type.dtype;
  m.rows = type.shape.rows();
  m.cols = m.stride = type.shape.cols();
  if (!is_plane(type.dtype)) return m;
  const Planes p = planes(type);
  m.data = data + p.codes;
  m.block = type.quant.block;
  m.codebook = type.dtype == DType::NF4 ? nf4_values : fp4_values;
  m.absmax = data + p.absmax;
  if (type.quant.double_quant) {
    m.scale = data + p.scale;
    m.map = dynamic_map_signed;
    if (type.quant.custom_map) m.map = reinterpret_cast<const float*>(data + p.map);
    std::memcpy(&m.offset, data + p.offset, sizeof m.offset);
  }
  return m;
}

StoredMatrix plain_matrix(DType dtype, const void* data, std::int64_t rows, std::int64_t cols,
                          std::int64_t stride) {
  if (!is_float(dtype)) {
    throw Unsupported("plain_matrix: " + std::string(name(dtype)) +
                      " found; F64, F32, F16 and BF16 are plain float types");
  }
  StoredMatrix m;
  m.data = static_cast<const std::byte*>(data);
  m.dtype = dtype;
  m.rows = rows;
  m.cols = cols;
  m.stride = stride;
  return m;
}

StoredMatrix row_range(const StoredMatrix& m, std::int64_t begin, std::int64_t count) {
  if (begin < 0 || count < 0 || begin > m.rows || count > m.rows - begin) {
    throw ShapeError("rows " + std::to_string(begin) + " to " + std::to_string(begin + count) +
                     " of a matrix with " + std::to_string(m.rows) + " rows");
  }
  StoredMatrix part = m;
  part.first_row += begin;
  part.rows = count;
  return part;
}

void decode_row(Isa isa, const StoredMatrix& m, std::int64_t row, std::int64_t col,
                std::int64_t count, float* out) {
  NIBBLE_PICK(isa, read_row_f32)(m, row, col, count, out);
}

void decode_row(Isa isa, const StoredMatrix& m, std::int64_t row, std::int64_t col,
                std::int64_t count, double* out) {
  NIBBLE_PICK(isa, read_row_f64)(m, row, col, count, out);
}

}  // namespace nibble::cpu
