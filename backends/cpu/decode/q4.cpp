// ggml Q4_0 and Q4_1: 32 elements with a half d (Q4_1: and a half m), then 16 bytes; the low nibble
// of byte j is element j, the high nibble element j + 16. Values d * (q - 8) and d * q + m.
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

void decode_q4_0(const unsigned char* block, float* out) {
  const float d = half_at(block);
  unsigned char q[16];
  __builtin_memcpy(q, block + 2, sizeof q);
  for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>((q[i] & 15) - 8);
  for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>((q[i] >> 4) - 8);
}

void decode_q4_1(const unsigned char* block, float* out) {
  const float d = half_at(block), m = half_at(block + 2);
  unsigned char q[16];
  __builtin_memcpy(q, block + 4, sizeof q);
  for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(q[i] & 15) + m;
  for (int i = 0; i < 16; ++i) out[i + 16] = d * static_cast<float>(q[i] >> 4) + m;
}

}  // namespace

void q4_0_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const unsigned char* block = block_at(m, row, col, 32, 18);
  for (std::int64_t i = 0; i < count; i += 32, block += 18) decode_q4_0(block, out + i);
}

void q4_1_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const unsigned char* block = block_at(m, row, col, 32, 20);
  for (std::int64_t i = 0; i < count; i += 32, block += 20) decode_q4_1(block, out + i);
}

}  // namespace nibble::cpu::NIBBLE_ISA
