// Reverse-mode differentiation, graph to graph: the backward pass is more nodes of the same
// program. Values that the recompute segments dropped are repeated by clones appended on demand,
// so what no gradient asks for is never recomputed.
#pragma once

#include <span>
#include <vector>

#include "engine/graph.h"

namespace nibble {

// d(objective)/d(value), where differentiation starts.
struct Seed {
  Tensor value, gradient;
};

struct ParameterGradient {
  std::int32_t parameter;  // node id of the leaf
  Tensor accumulator;      // state leaf NAME.grad, added to by every run
  Tensor updated;          // its newest version
};

struct Backward {
  std::vector<ParameterGradient> parameters;  // in the order of the parameter leaves
  std::vector<Tensor> inputs;                 // by node id, for leaves with require_grad()
  std::int32_t recomputed = 0;                // nodes that were cloned
};

// Appends the backward pass of `graph`. Every parameter that the seeds reach gets an accumulator
// state of type {graph.accumulate(), its shape}. Throws Unsupported for an op without a gradient
// rule on the way, naming it.
Backward append_backward(Graph& graph, std::span<const Seed> seeds);

}  // namespace nibble
