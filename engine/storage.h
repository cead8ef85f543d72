// What the blocks of a model keep for the backward pass, and where: all stand on one rung, or those
// before one depth on a leaner rung than the rest; activations and frozen weights may wait in host
// memory.
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

// How many streamed blocks ahead of the one in use are on their way, forward and backward.
inline constexpr std::int64_t kStreamedAhead = 2;
// Rows of which the loss's sums are formed: its chunks are multiples.
inline constexpr std::int64_t kLossTile = 512;

struct StoragePolicy {
  Rung rung = Rung::store;
  Rung lean = Rung::store;  // of the first `split` blocks
  std::int64_t split = 0;
  Offload offload = Offload::none;
  std::int64_t offload_split = 0;  // not 0: of the first so many blocks, the rest one level less
  std::int64_t streamed = 0;       // blocks whose weights come from the host for each use
  std::int64_t loss_rows = 0;      // the most whose logits exist at a time; 0: what is fastest

  Rung of(std::int64_t block) const { return block < split ? lean : rung; }
  Offload offload_of(std::int64_t block) const {
    if (offload_split == 0 || block < offload_split) return offload;
    return static_cast<Offload>(static_cast<int>(offload) - 1);
  }
  // The streamed blocks are spread evenly over all, and the copies over the step.
  bool streams(std::int64_t block, std::int64_t blocks) const {
    return (block + 1) * streamed / blocks > block * streamed / blocks;
  }
  // "store", or "cheap:12+store": the first 12 blocks stand on cheap, the rest on store; then
  // ",offload:inputs", ":attention" or ":gate", perhaps with ":12", then ",stream:12", then
  // ",loss:512" may follow.
  std::string str() const;
  // None if the text is not what str() writes.
  static std::optional<StoragePolicy> parse(std::string_view text);

  bool operator==(const StoragePolicy&) const = default;
};

}  // namespace nibble
