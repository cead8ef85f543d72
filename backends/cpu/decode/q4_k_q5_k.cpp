// ggml Q4_K and Q5_K: 256 elements in 8 parts of 32, each with a 6-bit scale and minimum packed in
// 12 bytes. Parts 2c and 2c + 1 are the low and high nibbles of bytes 32c ... 32c + 31; Q5_K's
// fifth bit of element l of a part is bit `part` of qh[l]. Value (d * scale) * q - dmin * min.
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

struct ScaleAndMinimum {
  float scale, minimum;
};

ScaleAndMinimum part_scale(const unsigned char* block, int part) {
  const unsigned char* b = block + 4;
  const int scale = part < 4 ? b[part] & 63 : (b[part + 4] & 15) | (b[part - 4] >> 6) << 4;
  const int minimum = part < 4 ? b[part + 4] & 63 : (b[part + 4] >> 4) | (b[part] >> 6) << 4;
  return {half_at(block) * static_cast<float>(scale),
          half_at(block + 2) * static_cast<float>(minimum)};
}

void decode_q4_k(const unsigned char* block, int part, float* out) {
  const auto [scale, minimum] = part_scale(block, part);
  const unsigned char* packed = block + 16 + 32 * (part / 2);
  const int shift = 4 * (part % 2);
  std::uint8_t q[32];
  for (int l = 0; l < 32; ++l) q[l] = packed[l] >> shift & 15;
  scale_codes(q, 32, scale, -minimum, out);
}

void decode_q5_k(const unsigned char* block, int part, float* out) {
  const auto [scale, minimum] = part_scale(block, part);
  const unsigned char* high = block + 16;
  const unsigned char* packed = block + 48 + 32 * (part / 2);
  const int shift = 4 * (part % 2);
  std::uint8_t q[32];
  for (int l = 0; l < 32; ++l) {
    q[l] = static_cast<std::uint8_t>((packed[l] >> shift & 15) | (high[l] >> part & 1) << 4);
  }
  scale_codes(q, 32, scale, -minimum, out);
}

}  // namespace

void q4_k_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  for (std::int64_t i = 0; i < count; i += 32) {
    const std::int64_t at = col + i;
    decode_q4_k(block_at(m, row, at, 256, 144), static_cast<int>(at % 256 / 32), out + i);
  }
}

void q5_k_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  for (std::int64_t i = 0; i < count; i += 32) {
    const std::int64_t at = col + i;
    decode_q5_k(block_at(m, row, at, 256, 176), static_cast<int>(at % 256 / 32), out + i);
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
