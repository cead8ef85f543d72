// ggml Q5_0 and Q5_1: as Q4_0 and Q4_1, with the fifth bits of the 32 elements in a 32-bit word
// before the nibbles. Values d * (q - 16) and d * q + m.
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

// The 32 five-bit codes whose word of high bits is at `bits` and nibbles at `nibbles`.
void unpack(const unsigned char* bits, const unsigned char* nibbles, int (&q)[32]) {
  std::uint32_t high;
  __builtin_memcpy(&high, bits, sizeof high);
  for (int i = 0; i < 16; ++i) {
    q[i] = (nibbles[i] & 15) | static_cast<int>((high >> i & 1u) << 4);
    q[i + 16] = (nibbles[i] >> 4) | static_cast<int>((high >> (i + 16) & 1u) << 4);
  }
}

void decode_q5_0(const unsigned char* block, float* out) {
  const float d = half_at(block);
  int q[32];
  unpack(block + 2, block + 6, q);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i] - 16);
}

void decode_q5_1(const unsigned char* block, float* out) {
  const float d = half_at(block), m = half_at(block + 2);
  int q[32];
  unpack(block + 4, block + 8, q);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i]) + m;
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
