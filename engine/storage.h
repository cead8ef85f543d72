// What the blocks of a model keep for the backward pass: all stand on one rung, or those before one
// depth on a leaner rung than the rest.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "engine/graph.h"

namespace nibble {

struct StoragePolicy {
  Rung rung = Rung::store;
  Rung lean = Rung::store;  // of the first `split` blocks
  std::int64_t split = 0;
  bool offload = false;  // block inputs wait in host memory for the backward pass

  Rung of(std::int64_t block) const { return block < split ? lean : rung; }
  // "store", or "cheap:12+store": the first 12 blocks stand on cheap, the rest on store; either may
  // end in ",offload".
  std::string str() const;
  // None if the text is not what str() writes.
  static std::optional<StoragePolicy> parse(std::string_view text);

  bool operator==(const StoragePolicy&) const = default;
};

}  // namespace nibble
