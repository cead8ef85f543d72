// ggml Q2_K and Q3_K: 256 elements in groups of 16 that share a scale. Element 128h + 32j + 16s + l
// is bits 2j, 2j + 1 of byte 32h + 16s + l and has scale 8h + 2j + s; a part is the 32 elements of
// one (h, j). Values (d * scale) * q - dmin * min and (d * (scale - 32)) * q.
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

void decode_q2_k(const unsigned char* block, int part, float* out) {
  const unsigned char* packed = block + 16 + 32 * (part / 4);
  const float d = half_at(block + 80), dmin = half_at(block + 82);
  const int shift = 2 * (part % 4);
  std::uint8_t q[32];
  for (int l = 0; l < 32; ++l) q[l] = packed[l] >> shift & 3;
  for (int s = 0; s < 2; ++s) {
    const unsigned char scales = block[2 * part + s];
    const float minimum = dmin * static_cast<float>(scales >> 4);
    scale_codes(q + 16 * s, 16, d * static_cast<float>(scales & 15), -minimum, out + 16 * s);
  }
}

// The 6-bit scale i of 16: low nibbles in bytes 0-7, pairs of high bits in bytes 8-11.
int q3_k_scale(const unsigned char* packed, int i) {
  const int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
  return (low | (packed[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32;
}

void decode_q3_k(const unsigned char* block, int part, float* out) {
  const unsigned char* packed = block + 32 + 32 * (part / 4);
  const float d = half_at(block + 108);
  const int shift = 2 * (part % 4);
  std::int8_t q[32];
  for (int l = 0; l < 32; ++l) {
    q[l] = static_cast<std::int8_t>((packed[l] >> shift & 3) + ((block[l] >> part & 1) << 2) - 4);
  }
  for (int s = 0; s < 2; ++s) {
    const float scale = d * static_cast<float>(q3_k_scale(block + 96, 2 * part + s));
    scale_codes(q + 16 * s, 16, scale, out + 16 * s);
  }
}

}  // namespace

void q2_k_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  for (std::int64_t i = 0; i < count; i += 32) {
    const std::int64_t at = col + i;
    decode_q2_k(block_at(m, row, at, 256, 84), static_cast<int>(at % 256 / 32), out + i);
  }
}

void q3_k_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  for (std::int64_t i = 0; i < count; i += 32) {
    const std::int64_t at = col + i;
    decode_q3_k(block_at(m, row, at, 256, 110), static_cast<int>(at % 256 / 32), out + i);
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
