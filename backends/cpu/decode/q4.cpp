// ggml Q4_0 and Q4_1: 32 elements with a half d (Q4_1: and a half m), then 16 bytes; the low nibble
// of byte j is element j, the high nibble element j + 16. Values d * (q - 8) and d * q + m.
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

// The 32 codes of 16 bytes of nibbles, less `bias`.
void unpack(const unsigned char* nibbles, std::uint8_t bias, std::int8_t (&q)[32]) {
  auto [low, high] = split_nibbles(nibbles);
  low -= bias;
  high -= bias;
  __builtin_memcpy(q, &low, sizeof low);
  __builtin_memcpy(q + 16, &high, sizeof high);
}

void decode_q4_0(const unsigned char* block, float* out) {
  std::int8_t q[32];
  unpack(block + 2, 8, q);
  scale_codes(q, 32, half_at(block), out);
}

void decode_q4_1(const unsigned char* block, float* out) {
  std::int8_t q[32];
  unpack(block + 4, 0, q);
  scale_codes(q, 32, half_at(block), half_at(block + 2), out);
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
