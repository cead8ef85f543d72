// The dropout of an adapter over whole rows: the numbers of engine/dropout.h, 64 channels (16
// philox blocks, side by side in vectors) at a time.
//
// Elements are kept or replaced by zero, not scaled: 1/(1-p) goes into the product's factor, so
// that a dropped BF16 row stays exact.
#pragma once

#include "backends/cpu/lanes.h"
#include "engine/dropout.h"

namespace nibble::cpu::NIBBLE_ISA {

inline constexpr int kDropoutBlocks = 16;
inline constexpr std::int64_t kDropoutChannels = 4 * kDropoutBlocks;
static_assert(kDropoutBlocks % kFloatLanes == 0);

typedef std::uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

// The low halves of a's 64-bit lanes times m.
[[gnu::always_inline]] inline VecU64 multiply_even(VecU64 a, std::uint32_t m) {
  const VecU64 factor = VecU64{} + m;
#if NIBBLE_ISA_LEVEL == 2
  // The masked form, because g++ 12 warns inside the plain one.
  return reinterpret_cast<VecU64>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a),
                                                         reinterpret_cast<__m512i>(factor)));
#elif NIBBLE_ISA_LEVEL == 1
  return reinterpret_cast<VecU64>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// The two halves of the 64-bit products a * m.
[[gnu::always_inline]] inline void multiply_wide(VecU32 a, std::uint32_t m, VecU32& high,
                                                 VecU32& low) {
  const VecU64 pairs = reinterpret_cast<VecU64>(a);
  const VecU64 even = multiply_even(pairs, m), odd = multiply_even(pairs >> 32, m);
  const VecU64 upper = ~VecU64{} << 32;
  high = reinterpret_cast<VecU32>((even >> 32) | (odd & upper));
  low = reinterpret_cast<VecU32>((even & ~upper) | (odd << 32));
}

// The words of channels [64 group, 64 group + 64) of one token.
[[gnu::always_inline]] inline void dropout_words(const DropoutKey& key, std::uint32_t ordinal,
                                                 std::int64_t group,
                                                 std::uint32_t (&words)[kDropoutChannels]) {
  for (int first = 0; first < kDropoutBlocks; first += kFloatLanes) {
    VecU32 c0 = VecU32{} + key.step, c1 = VecU32{} + key.adapter, c2 = VecU32{} + ordinal, c3;
    for (int i = 0; i < kFloatLanes; ++i) {
      c3[i] = static_cast<std::uint32_t>(group * kDropoutBlocks + first + i);
    }
    auto k0 = static_cast<std::uint32_t>(key.seed);
    auto k1 = static_cast<std::uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      VecU32 high0, low0, high1, low1;
      multiply_wide(c0, 0xD2511F53u, high0, low0);
      multiply_wide(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kFloatLanes; ++i) {
      std::uint32_t* to = words + 4 * (first + i);
      to[0] = c0[i];
      to[1] = c1[i];
      to[2] = c2[i];
      to[3] = c3[i];
    }
  }
}

// The smallest word >> 8 that is kept: uniform() never falls as the word grows.
[[gnu::always_inline]] inline std::uint32_t dropout_threshold(float p) {
  std::uint32_t low = 0, high = 1u << 24;
  while (low < high) {
    const std::uint32_t middle = (low + high) / 2;
    if ((static_cast<float>(middle) + 0.5f) * 0x1p-24f >= p) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

[[gnu::always_inline]] inline float keep_if(bool keep, float x) { return keep ? x : 0; }
[[gnu::always_inline]] inline double keep_if(bool keep, double x) { return keep ? x : 0; }
[[gnu::always_inline]] inline bf16 keep_if(bool keep, bf16 x) {
  return {static_cast<std::uint16_t>(keep ? x.bits : 0)};
}

// to[c] = from[c] where channel c of the token is kept, else 0; `to` may be `from`.
template <class T>
void drop_row(const DropoutKey& key, std::uint32_t threshold, std::uint32_t ordinal,
              std::int64_t cols, const T* from, T* to) {
  for (std::int64_t begin = 0; begin < cols; begin += kDropoutChannels) {
    std::uint32_t words[kDropoutChannels];
    dropout_words(key, ordinal, begin / kDropoutChannels, words);
    const std::int64_t n = cols - begin < kDropoutChannels ? cols - begin : kDropoutChannels;
    T values[kDropoutChannels] = {};  // apart from `to`, so that the loop may be vectorized
    for (std::int64_t i = 0; i < n; ++i) values[i] = from[begin + i];
    for (int i = 0; i < kDropoutChannels; ++i) {
      values[i] = keep_if((words[i] >> 8) >= threshold, values[i]);
    }
    for (std::int64_t i = 0; i < n; ++i) to[begin + i] = values[i];
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
