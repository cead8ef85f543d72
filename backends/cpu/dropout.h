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

// The words of channels [64 group, 64 group + 64) of one token.
[[gnu::always_inline]] inline void dropout_words(const DropoutKey& key, std::uint32_t ordinal,
                                                 std::int64_t group,
                                                 std::uint32_t (&words)[kDropoutChannels]) {
  std::uint32_t c0[kDropoutBlocks], c1[kDropoutBlocks], c2[kDropoutBlocks], c3[kDropoutBlocks];
  for (int i = 0; i < kDropoutBlocks; ++i) {
    c0[i] = key.step;
    c1[i] = key.adapter;
    c2[i] = ordinal;
    c3[i] = static_cast<std::uint32_t>(group * kDropoutBlocks + i);
  }
  auto k0 = static_cast<std::uint32_t>(key.seed);
  auto k1 = static_cast<std::uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kDropoutBlocks; ++i) {
      const std::uint64_t p0 = 0xD2511F53ull * c0[i], p1 = 0xCD9E8D57ull * c2[i];
      c0[i] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<std::uint32_t>(p1);
      c2[i] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kDropoutBlocks; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
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

// to[c] = from[c] where channel c of the token is kept, else 0; `to` may be `from`.
template <class T>
void drop_row(const DropoutKey& key, std::uint32_t threshold, std::uint32_t ordinal,
              std::int64_t cols, const T* from, T* to) {
  for (std::int64_t begin = 0; begin < cols; begin += kDropoutChannels) {
    std::uint32_t words[kDropoutChannels];
    dropout_words(key, ordinal, begin / kDropoutChannels, words);
    const std::int64_t n = cols - begin < kDropoutChannels ? cols - begin : kDropoutChannels;
    for (std::int64_t i = 0; i < n; ++i) {
      const T x = from[begin + i];
      to[begin + i] = (words[i] >> 8) >= threshold ? x : T{};
    }
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
