// NF4 and FP4 planes: value = codebook[4-bit code] * absmax[block], one F32 multiply.
//
// Elements are numbered over the whole tensor; element 2k is the high nibble of byte k. With
// double quantization absmax = map[u8] * scale + offset in two roundings. The 16 codebook values
// sit in one 64-byte register (two 32-byte ones), so that a lookup is a permute.
//
// codebook_columns feeds x W^T: it transposes 32-bit words of codes, 8 elements each, instead of
// decoded floats, so that the shuffles are an eighth, and then each lane unpacks its own row.
#include "backends/cpu/decode/bytes.h"
#include "backends/cpu/decode/decoders.h"
#include "backends/cpu/decode/transpose.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

float absmax_of(const StoredMatrix& m, std::int64_t block) {
  if (m.scale == nullptr) {
    float value;
    __builtin_memcpy(&value, m.absmax + 4 * block, sizeof value);
    return value;
  }
  float scale;
  __builtin_memcpy(&scale, m.scale + 4 * (block / 256), sizeof scale);
  const float product = m.map[static_cast<unsigned char>(m.absmax[block])] * scale;
  return product + m.offset;
}

#if NIBBLE_ISA_LEVEL > 0

// The codebook in registers and the lookup of kFloatLanes codes. `index` may have anything above
// its low four bits. (The maskz form, all lanes on, is the same instruction; the plain one makes
// g++ 12 warn about its own header.)
struct Lookup {
#if NIBBLE_ISA_LEVEL == 2
  explicit Lookup(const float* codebook) : values(load(codebook)) {}
  [[gnu::always_inline]] VecF32 operator()(VecU32 index) const {
    return _mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(index), values);
  }
  VecF32 values;
#else
  explicit Lookup(const float* codebook) : low(load(codebook)), high(load(codebook + 8)) {}
  [[gnu::always_inline]] VecF32 operator()(VecU32 index) const {
    const auto i = reinterpret_cast<__m256i>(index);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  VecF32 low, high;
#endif
};

// 32 elements from 16 bytes.
[[gnu::always_inline]] inline void decode_32(const unsigned char* codes, const Lookup& lookup,
                                             VecF32 scale, float* out) {
  __m128i bytes;
  __builtin_memcpy(&bytes, codes, sizeof bytes);
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i odd = _mm_and_si128(bytes, mask);
  const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
  std::uint8_t code[32];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(code), first);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(code + 16), second);
#pragma GCC unroll 4
  for (int i = 0; i < 32; i += kFloatLanes) {
    store(out + i, lookup(reinterpret_cast<VecU32>(widen_bytes(code + i))) * scale);
  }
}

#endif

// Elements [begin, begin + count) of one block.
void decode_run(const StoredMatrix& m, std::int64_t begin, std::int64_t count, float absmax,
                float* out) {
  const auto* codes = reinterpret_cast<const unsigned char*>(m.data);
  std::int64_t i = 0;
  if (begin % 2 != 0 && count > 0) out[i++] = m.codebook[codes[begin / 2] & 15] * absmax;
#if NIBBLE_ISA_LEVEL > 0
  const Lookup lookup(m.codebook);
  const VecF32 scale = splat(absmax);
  for (; i + 32 <= count; i += 32) decode_32(codes + (begin + i) / 2, lookup, scale, out + i);
#endif
  for (; i + 2 <= count; i += 2) {
    const unsigned char byte = codes[(begin + i) / 2];
    out[i] = m.codebook[byte >> 4] * absmax;
    out[i + 1] = m.codebook[byte & 15] * absmax;
  }
  if (i < count) out[i] = m.codebook[codes[(begin + i) / 2] >> 4] * absmax;
}

}  // namespace

void codebook_row(const StoredMatrix& m, std::int64_t row, std::int64_t col, std::int64_t count,
                  float* out) {
  std::int64_t begin = (m.first_row + row) * m.cols + col;
  const std::int64_t end = begin + count;
  while (begin < end) {
    const std::int64_t block = begin / m.block;
    const std::int64_t block_end = (block + 1) * m.block;
    const std::int64_t run = (block_end < end ? block_end : end) - begin;
    decode_run(m, begin, run, absmax_of(m, block), out);
    begin += run;
    out += run;
  }
}

#if NIBBLE_ISA_LEVEL > 0

bool has_codebook_columns(const StoredMatrix& m) { return m.cols % m.block == 0; }

void codebook_columns(const StoredMatrix& m, std::int64_t row, std::int64_t row_count,
                      std::int64_t col, std::int64_t count, float* out, std::int64_t width) {
  constexpr int kLanes = kFloatLanes;
  const Lookup lookup(m.codebook);
  const unsigned char* codes[kLanes];
  std::int64_t blocks[kLanes];  // block of column 0
  for (int r = 0; r < kLanes; ++r) {
    const std::int64_t tensor_row = m.first_row + row + (r < row_count ? r : row_count - 1);
    codes[r] = reinterpret_cast<const unsigned char*>(m.data) + (tensor_row * m.cols + col) / 2;
    blocks[r] = tensor_row * (m.cols / m.block);
  }
  VecF32 scale{};
  std::int64_t scale_end = col;  // first column that `scale` does not cover
  for (std::int64_t done = 0; done < count; done += 8 * kLanes) {
    const std::int64_t left = (count - done) / 8;
    const int words = left < kLanes ? static_cast<int>(left) : kLanes;
    VecF32 word[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      if (words == kLanes) {
        __builtin_memcpy(&word[r], codes[r] + done / 2, sizeof word[r]);
      } else {
        word[r] = VecF32{};
        __builtin_memcpy(&word[r], codes[r] + done / 2, static_cast<std::size_t>(4 * words));
      }
    }
    transpose(word);
    for (int w = 0; w < words; ++w) {
      const std::int64_t at = col + done + 8 * w;
      if (at >= scale_end) {
        const std::int64_t block = at / m.block;
        float values[kLanes];
        for (int r = 0; r < kLanes; ++r) values[r] = absmax_of(m, blocks[r] + block);
        scale = load(values);
        scale_end = (block + 1) * m.block;
      }
      const VecU32 code = bits_of(word[w]);
      float* to = out + (done + 8 * w) * width;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        // Byte j / 2 of the word; the even element of the pair is the high nibble.
        const int shift = 8 * (j / 2) + (j % 2 == 0 ? 4 : 0);
        store(to + j * width, lookup(code >> shift) * scale);
      }
    }
  }
}

#else

bool has_codebook_columns(const StoredMatrix&) { return false; }

void codebook_columns(const StoredMatrix&, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                      float*, std::int64_t) {}

#endif

}  // namespace nibble::cpu::NIBBLE_ISA
