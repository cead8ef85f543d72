// ggml Q8_0: 32 elements in 34 bytes: a half d, then signed bytes q. Value d * q.
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

void decode_32(const unsigned char* block, float* out) {
  std::int8_t q[32];
  __builtin_memcpy(q, block + 2, sizeof q);
  scale_codes(q, 32, half_at(block), out);
}

}  // namespace

void q8_0_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
              float* out) {
  const unsigned char* block = block_at(m, row, col, 32, 34);
  for (std::int64_t i = 0; i < count; i += 32, block += 34) decode_32(block, out + i);
}

}  // namespace nibble::cpu::NIBBLE_ISA
