// Which elements an adapter's dropout keeps: the one definition behind lora_linear and its
// gradients (ops.h). Nothing is stored; every pass draws the same numbers.
//
// Element (t, c) takes word c % 4 of philox(seed, {step, adapter, ordinal[t], c / 4}). The numbers
// depend on the token's ordinal within the optimizer step, not on its row, so they are the same
// for any split of a batch. Only the low 32 bits of step enter.
#pragma once

#include <cstdint>

#include "engine/philox.h"

namespace nibble {

struct DropoutKey {
  std::uint64_t seed;
  std::uint32_t step, adapter;
};

inline bool dropout_keeps(const DropoutKey& key, std::uint32_t ordinal, std::int64_t channel,
                          float p) {
  const PhiloxBlock words =
      philox(key.seed, {key.step, key.adapter, ordinal, static_cast<std::uint32_t>(channel / 4)});
  return uniform(words[static_cast<std::size_t>(channel % 4)]) >= p;
}

}  // namespace nibble
