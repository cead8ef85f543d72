// Picks the decoder of a format, and turns rows into the columns that a product's panels have.
#include "backends/cpu/decode/decoders.h"
#include "backends/cpu/decode/transpose.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kChunk = 128;  // columns decoded before transposing: 8 KiB of stack

RowDecoder* row_decoder(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return f64_row;
    case DType::F16:
      return f16_row;
    case DType::BF16:
      return bf16_row;
    case DType::NF4:
    case DType::FP4:
      return codebook_row;
    case DType::Q8_0:
      return q8_0_row;
    case DType::Q4_0:
      return q4_0_row;
    case DType::Q4_1:
      return q4_1_row;
    case DType::Q5_0:
      return q5_0_row;
    case DType::Q5_1:
      return q5_1_row;
    case DType::Q2_K:
      return q2_k_row;
    case DType::Q3_K:
      return q3_k_row;
    case DType::Q4_K:
      return q4_k_row;
    case DType::Q5_K:
      return q5_k_row;
    case DType::Q6_K:
      return q6_k_row;
    default:
      return f32_row;  // can_decode() was asked before
  }
}

// kFloatLanes rows, decoded one by one and transposed.
void columns_through_rows(const StoredMatrix& m, RowDecoder* decode, std::int64_t row,
                          std::int64_t row_count, std::int64_t col, std::int64_t count, float* out,
                          std::int64_t width) {
  constexpr int kLanes = kFloatLanes;
  alignas(64) float rows[kLanes][kChunk];
  for (std::int64_t begin = 0; begin < count; begin += kChunk) {
    const std::int64_t n = count - begin < kChunk ? count - begin : kChunk;
    for (int r = 0; r < kLanes; ++r) {
      if (r < row_count) {
        decode(m, row + r, col + begin, n, rows[r]);
      } else {
        __builtin_memset(rows[r], 0, sizeof rows[r]);
      }
    }
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      VecF32 square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = load(&rows[r][i]);
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(out + (begin + i + r) * width, square[r]);
    }
    for (; i < n; ++i) {
      for (int r = 0; r < kLanes; ++r) out[(begin + i) * width + r] = rows[r][i];
    }
  }
}

}  // namespace

void read_row_f32(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                  float* out) {
  row_decoder(m.dtype)(m, row, col, count, out);
}

void read_row_f64(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                  double* out) {
  if (m.dtype == DType::F64) {
    const auto* in = reinterpret_cast<const double*>(m.data);
    __builtin_memcpy(out, in + (m.first_row + row) * m.stride + col,
                     static_cast<std::size_t>(count) * sizeof(double));
    return;
  }
  RowDecoder* decode = row_decoder(m.dtype);
  float values[kChunk];
  for (std::int64_t begin = 0; begin < count; begin += kChunk) {
    const std::int64_t n = count - begin < kChunk ? count - begin : kChunk;
    decode(m, row, col + begin, n, values);
    for (std::int64_t i = 0; i < n; ++i) out[begin + i] = static_cast<double>(values[i]);
  }
}

void decode_columns(const StoredMatrix& m, std::int64_t row, std::int64_t row_count,
                    std::int64_t col, std::int64_t count, float* out, std::int64_t width) {
  const bool codebook = m.dtype == DType::NF4 || m.dtype == DType::FP4;
  const bool direct = codebook && has_codebook_columns(m);
  for (std::int64_t r = 0; r < width; r += kFloatLanes) {
    if (r >= row_count) {
      for (std::int64_t i = 0; i < count; ++i) store(out + i * width + r, VecF32{});
    } else if (direct) {
      codebook_columns(m, row + r, row_count - r, col, count, out + r, width);
    } else {
      columns_through_rows(m, row_decoder(m.dtype), row + r, row_count - r, col, count, out + r,
                           width);
    }
  }
}

void decode_columns(const StoredMatrix& m, std::int64_t row, std::int64_t row_count,
                    std::int64_t col, std::int64_t count, double* out, std::int64_t width) {
  double values[kChunk];
  for (std::int64_t r = 0; r < width; ++r) {
    for (std::int64_t begin = 0; begin < count; begin += kChunk) {
      const std::int64_t n = count - begin < kChunk ? count - begin : kChunk;
      if (r < row_count) {
        read_row(m, row + r, col + begin, n, values);
      } else {
        __builtin_memset(values, 0, sizeof values);
      }
      for (std::int64_t i = 0; i < n; ++i) out[(begin + i) * width + r] = values[i];
    }
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
