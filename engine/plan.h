// A Plan says which nodes run, in which order, and where every value lies. It is pure bookkeeping:
// no memory is touched, and the same graph and backend description always give the same plan.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/backend.h"
#include "engine/graph.h"
#include "engine/place.h"

namespace nibble {

// Where a value lies: in the memory of a leaf, or at an offset of the arena, or nowhere because
// nothing reads it.
struct Location {
  enum class Kind : std::uint8_t { none, leaf, arena } kind = Kind::none;
  std::int32_t leaf = -1;
  std::int64_t offset = 0;
};

struct Plan {
  const Graph* graph = nullptr;
  std::vector<std::int32_t> steps;  // node ids, ascending
  std::vector<bool> fused;          // by step: runs in one kernel with the step before it
  std::vector<std::array<Location, Node::kMaxOutputs>> locations;  // by node
  std::vector<std::int64_t> scratch;                               // by node: arena offset, or -1
  std::int64_t arena_bytes = 0;
  std::int64_t lower_bound_bytes = 0;  // no placement can be smaller
  std::int64_t unshared_bytes = 0;     // if no two values ever shared memory
  std::size_t search = 0;              // that found the layout (Placement)
  std::int64_t copied_bytes = 0;       // between device and host, both ways, by a run

  // Who holds `bytes` of the arena from `offset` on during nodes first..last, both included: a
  // value until nothing reads it any more or another takes its memory over in place, or a kernel's
  // scratch. No two stays overlap.
  struct Stay {
    Ref holder;  // output -1: the scratch of the node
    std::int64_t offset, bytes;
    std::int32_t first, last;
  };
  std::vector<Stay> stays;  // empty without a layout

  const Location& at(Ref ref) const {
    return locations[static_cast<std::size_t>(ref.node)][static_cast<std::size_t>(ref.output)];
  }
};

// How the arena is laid out: by a search, or not at all; then arena_bytes is the lower bound, which
// the search meets on training graphs, and the plan cannot be run.
enum class Layout : std::uint8_t { search, bound };

// Copies to the host that may be under way before a step waits: what each reads keeps its memory
// until so many more have started. All but one of those that a block sends, so that its large
// values get a block's time; the optimizer's pages take turns.
std::size_t copies_in_flight(const Graph& graph);

// Plans `graph` for `backend`. Nodes that neither update a state nor lead to a kept value are left
// out. Throws Unsupported naming op, dtypes and backend when a kernel is missing.
Plan make_plan(const Graph& graph, const Backend& backend, Layout layout = Layout::search,
               const PlaceHint& hint = {});

}  // namespace nibble
