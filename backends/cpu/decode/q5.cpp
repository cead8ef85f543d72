// ggml Q5_0 and Q5_1: as Q4_0 and Q4_1, with the fifth bits of the 32 elements in a 32-bit word
// before the nibbles. Values d * (q - 16) and d * q + m.
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

// The 32 five-bit codes, less `bias`, whose word of high bits is at `bits` and nibbles at
// `nibbles`.
void unpack(const unsigned char* bits, const unsigned char* nibbles, std::uint8_t bias,
            std::int8_t (&q)[32]) {
  auto [low, high] = split_nibbles(nibbles);
  low = (low | fifth_bits(bits)) - bias;
  high = (high | fifth_bits(bits + 2)) - bias;
  __builtin_memcpy(q, &low, sizeof low);
  __builtin_memcpy(q + 16, &high, sizeof high);
}

void decode_q5_0(const unsigned char* block, float* out) {
  std::int8_t q[32];
  unpack(block + 2, block + 6, 16, q);
  scale_codes(q, 32, half_at(block), out);
}

void decode_q5_1(const unsigned char* block, float* out) {
  std::int8_t q[32];
  unpack(block + 4, block + 8, 0, q);
  scale_codes(q, 32, half_at(block), half_at(block + 2), out);
}

}  // namespace

void q5_0_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const unsigned char* block = block_at(m, row, col, 32, 22);
  for (std::int64_t i = 0; i < count; i += 32, block += 22) decode_q5_0(block, out + i);
}

void q5_1_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const unsigned char* block = block_at(m, row, col, 32, 24);
  for (std::int64_t i = 0; i < count; i += 32, block += 24) decode_q5_1(block, out + i);
}

}  // namespace nibble::cpu::NIBBLE_ISA
