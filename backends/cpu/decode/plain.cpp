// F64, F32, F16 and BF16 storage: one value per element, rows `stride` elements apart.
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

template <class T>
const T* at(const StoredMatrix& m, std::int64_t row, std::int64_t col) {
  return reinterpret_cast<const T*>(m.data) + (m.first_row + row) * m.stride + col;
}

}  // namespace

void f64_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
             float* out) {
  const double* in = at<double>(m, row, col);
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

void f32_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
             float* out) {
  __builtin_memcpy(out, at<float>(m, row, col), static_cast<std::size_t>(count) * sizeof(float));
}

void bf16_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const bf16* in = at<bf16>(m, row, col);
  std::int64_t i = 0;
  for (; i + kFloatLanes <= count; i += kFloatLanes) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

// The instruction quiets a signalling NaN where to_float(f16) keeps it; every other value is the
// same.
void f16_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
             float* out) {
  const f16* in = at<f16>(m, row, col);
  std::int64_t i = 0;
#if NIBBLE_ISA_LEVEL > 0
  for (; i + 8 <= count; i += 8) {
    __m128i half;
    __builtin_memcpy(&half, in + i, sizeof half);
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

}  // namespace nibble::cpu::NIBBLE_ISA
