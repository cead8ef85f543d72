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

// What may wait in host memory for the backward pass.
enum class Activation : std::uint8_t {
  input = 1,      // of a block
  attention = 2,  // its outputs, so that it need not be repeated
  gate = 4,       // the outputs of the MLP's gate
  up = 8,         // and of its up projection
};
// Which of them do, as a set. What the MLP has spares most work by the byte; attention's outputs
// are smaller.
enum class Offload : std::uint8_t {
  none = 0,
  inputs = 1,
  attention = 3,
  inputs_gate = 5,
  gate = 7,
  inputs_gate_up = 13,
  up = 15
};
inline bool has(Offload set, Activation what) {
  return (static_cast<unsigned>(set) & static_cast<unsigned>(what)) != 0;
}
// Without the last of them in the order of Activation.
Offload one_less(Offload offload);

// How many streamed blocks ahead of the one in use are on their way, forward and backward.
inline constexpr std::int64_t kStreamedAhead = 2;
// Rows of which sums over tokens are formed: what works on some rows at a time takes multiples.
inline constexpr std::int64_t kRowTile = 512;

struct StoragePolicy {
  Rung rung = Rung::store;
  Rung lean = Rung::store;  // of the first `split` blocks
  std::int64_t split = 0;
  Offload offload = Offload::none;
  std::int64_t offload_split = 0;  // not 0: of the first so many blocks, the rest one_less()
  std::int64_t streamed = 0;       // blocks whose weights come from the host for each use
  std::int64_t mlp_rows = 0;       // the most that an MLP works on at a time; 0: all
  std::int64_t loss_rows = 0;      // the most whose logits exist at a time; 0: what is fastest

  Rung of(std::int64_t block) const { return block < split ? lean : rung; }
  bool offloads(std::int64_t block, Activation what) const {
    const bool all = offload_split == 0 || block < offload_split;
    return has(all ? offload : one_less(offload), what);
  }
  // The streamed blocks are spread evenly over all, and the copies over the step.
  bool streams(std::int64_t block, std::int64_t blocks) const {
    return (block + 1) * streamed / blocks > block * streamed / blocks;
  }
  // "store", or "cheap:12+store": the first 12 blocks stand on cheap, the rest on store; then
  // ",offload:inputs", ":attention", ":inputs+gate", ":gate" (these three), ":inputs+gate+up" or
  // ":up" (all), perhaps with ":12", then ",stream:12", then ",mlp:8192", then ",loss:512" may
  // follow.
  std::string str() const;
  // None if the text is not what str() writes.
  static std::optional<StoragePolicy> parse(std::string_view text);

  bool operator==(const StoragePolicy&) const = default;
};

}  // namespace nibble
