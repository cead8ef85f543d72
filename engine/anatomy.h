// The anatomy of a planned training program: what each stay in the arena is for, and which block of
// the model each step works for. Derived from the graph alone; nothing is marked for it.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/plan.h"

namespace nibble {

enum class Purpose : std::uint8_t {
  block_input,  // of the forward pass, kept for the backward; handed from one block to the next
  stored,       // of the forward pass, kept for the backward; any other
  passing,      // of the forward pass, read by it alone
  recomputed,   // of the forward pass, computed again in the backward
  gradient,
  returned,  // copied back from the host
  scratch,   // of a kernel
  count
};
constexpr std::size_t kPurposes = static_cast<std::size_t>(Purpose::count);

// One per stay of the plan. The nodes before `loss` are the forward pass.
std::vector<Purpose> purposes(const Plan& plan, std::int32_t loss);

// By step: the segment of the graph that it belongs to or, in the backward pass, whose gradients it
// computes; -1 outside of segments.
std::vector<std::int32_t> blocks(const Plan& plan, std::int32_t loss);

}  // namespace nibble
