// Which storage policy and how much paging a run gets: the fastest that fits.
#pragma once

#include <cstdint>
#include <optional>

#include "tools/finetune_setup.h"

namespace nibble {

// How a step runs: what its blocks keep, and how many of the optimizer's elements are on the host.
struct Policy {
  StoragePolicy storage;
  std::int64_t paged = 0;
  bool embedding_on_host = false;
};

// Plans the programs of `setup` for a policy that fits the device and, as far as something leaves
// for it, the host: the fastest by the device's figures, or the leanest where none fits. `forced`:
// this storage, with as much paging as it needs. `sample_context`: rows that a decoder beside the
// training programs has room for, 0: none.
void choose_policy(FinetuneSetup& setup, std::int64_t sample_context,
                   const std::optional<StoragePolicy>& forced);

// What choose_policy() looks at. A draft has no layout and leaves out what only small programs
// need; it is right to about a thousandth.
enum class Plans { draft, all };
void plan_policy(FinetuneSetup& setup, const Policy& policy, std::int64_t sample_context,
                 Plans plans);
// Bytes that the last plan takes too many.
std::int64_t excess(const FinetuneSetup& setup);

}  // namespace nibble
