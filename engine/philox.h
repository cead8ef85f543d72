// Philox4x32-10 (Salmon et al., SC'11): a counter-based generator. The same (key, counter) gives
// the same 128 bits on every backend and in any order, so nothing random is ever stored.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace nibble {

using PhiloxBlock = std::array<std::uint32_t, 4>;

inline PhiloxBlock philox(std::uint64_t key, PhiloxBlock counter) {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * counter[0], p1 = 0xCD9E8D57ull * counter[2];
    counter = {
        static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(p1),
        static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in (0, 1]: 24 bits, each in the middle of its cell, the last of which rounds up to 1.
inline float uniform(std::uint32_t bits) {
  return (static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f;
}

// floor(r * n / 2^53) for r < 2^53: a number below n from 53 random bits.
inline std::uint64_t multiply_shift(std::uint64_t r, std::uint64_t n) {
  const std::uint64_t r_high = r >> 32, r_low = r & 0xffffffffu;
  const std::uint64_t n_high = n >> 32, n_low = n & 0xffffffffu;
  const std::uint64_t low = r_low * n_low;
  const std::uint64_t middle = r_high * n_low + (low >> 32);
  const std::uint64_t cross = r_low * n_high + (middle & 0xffffffffu);
  const std::uint64_t high = r_high * n_high + (middle >> 32) + (cross >> 32);  // bits 64 and up
  return (high << 11) | ((cross & 0xffffffffu) >> 21);                          // product >> 53
}

// Standard normal number `index` of the stream (key, stream): Box-Muller on one philox block.
inline float philox_normal(std::uint64_t key, std::uint64_t stream, std::uint64_t index) {
  const std::uint64_t pair = index / 2;
  const PhiloxBlock r =
      philox(key, {static_cast<std::uint32_t>(pair), static_cast<std::uint32_t>(pair >> 32),
                   static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)});
  const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(uniform(r[0]))));
  const double angle = 6.283185307179586 * static_cast<double>(uniform(r[1]));
  return static_cast<float>(radius * (index % 2 == 0 ? std::cos(angle) : std::sin(angle)));
}

// FNV-1a, 64 bits: names to philox streams.
constexpr std::uint64_t hash_name(std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (const char c : name) {
    h ^= static_cast<unsigned char>(c);
    h *= 0x100000001b3ull;
  }
  return h;
}

}  // namespace nibble
