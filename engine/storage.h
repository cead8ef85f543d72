// What the blocks of a model keep for the backward pass: all stand on one rung, or those before one
// depth on a leaner rung than the rest.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "engine/graph.h"

namespace nibble {

// What waits in host memory for the backward pass, each with those before it.
enum class Offload : std::uint8_t {
  none,
  inputs,     // of blocks
  attention,  // its outputs, so that it need not be repeated
  gate,       // the gate's outputs, of the MLP
};

struct StoragePolicy {
  Rung rung = Rung::store;
  Rung lean = Rung::store;  // of the first `split` blocks
  std::int64_t split = 0;
  Offload offload = Offload::none;

  Rung of(std::int64_t block) const { return block < split ? lean : rung; }
  // "store", or "cheap:12+store": the first 12 blocks stand on cheap, the rest on store; either may
  // end in ",offload:inputs", ":attention" or ":gate".
  std::string str() const;
  // None if the text is not what str() writes.
  static std::optional<StoragePolicy> parse(std::string_view text);

  bool operator==(const StoragePolicy&) const = default;
};

}  // namespace nibble
