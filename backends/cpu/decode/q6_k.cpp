// ggml Q6_K: 256 elements in groups of 16 that share a signed 8-bit scale. Part p of 32 elements
// (half n = p / 4, quarter c = p % 4): low bits are nibble c / 2 of ql[64n + 32(c % 2) + l], high
// bits are bits 2c, 2c + 1 of qh[32n + l]. Value (d * scale) * (q - 32).
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

void decode_q6_k(const unsigned char* block, int part, float* out) {
  const int half = part / 4, quarter = part % 4;
  const unsigned char* low = block + 64 * half + 32 * (quarter % 2);
  const unsigned char* high = block + 128 + 32 * half;
  const float d = half_at(block + 208);
  const int low_shift = 4 * (quarter / 2), high_shift = 2 * quarter;
  std::int8_t q[32];
  for (int l = 0; l < 32; ++l) {
    const int code = (low[l] >> low_shift & 15) | (high[l] >> high_shift & 3) << 4;
    q[l] = static_cast<std::int8_t>(code - 32);
  }
  for (int s = 0; s < 2; ++s) {
    const auto scale = static_cast<signed char>(block[192 + 8 * half + 2 * quarter + s]);
    scale_codes(q + 16 * s, 16, d * static_cast<float>(scale), out + 16 * s);
  }
}

}  // namespace

void q6_k_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  for (std::int64_t i = 0; i < count; i += 32) {
    const std::int64_t at = col + i;
    decode_q6_k(block_at(m, row, at, 256, 210), static_cast<int>(at % 256 / 32), out + i);
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
