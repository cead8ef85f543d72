// ggml Q8_0: 32 elements in 34 bytes: a half d, then signed bytes q. Value d * q.
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

void decode_32(const unsigned char* block, float* out) {
  const float d = half_at(block);
  signed char q[32];
  __builtin_memcpy(q, block + 2, sizeof q);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(q[i]);
}

}  // namespace

void q8_0_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const unsigned char* block = block_at(m, row, col, 32, 34);
  for (std::int64_t i = 0; i < count; i += 32, block += 34) decode_32(block, out + i);
}

}  // namespace nibble::cpu::NIBBLE_ISA
