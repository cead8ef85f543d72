#include "engine/anatomy.h"

namespace nibble {
namespace {

constexpr std::int32_t kOutside = -1;  // of segments
constexpr std::int32_t kShared = -2;   // by several of them
constexpr std::int32_t kUnread = -3;

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

// Who reads a value of the forward pass.
struct Readers {
  bool backward = false, other_segment = false;
};

// The segment that alone reads a frozen or trained weight in the forward pass, by node.
std::vector<std::int32_t> segments_of_weights(const Plan& plan, std::int32_t loss) {
  const Graph& graph = *plan.graph;
  std::vector<std::int32_t> segments(index(graph.size()), kUnread);
  for (const std::int32_t id : plan.steps) {
    if (id >= loss) break;
    const Node& n = graph.node(id);
    for (int i = 0; i < n.n_inputs; ++i) {
      std::int32_t& segment = segments[index(n.inputs[index(i)].node)];
      segment = segment == kUnread || segment == n.segment ? n.segment : kShared;
    }
  }
  return segments;
}

}  // namespace

std::vector<Purpose> purposes(const Plan& plan, std::int32_t loss) {
  const Graph& graph = *plan.graph;
  std::vector<std::array<Readers, Node::kMaxOutputs>> readers(index(graph.size()));
  for (const std::int32_t id : plan.steps) {
    const Node& n = graph.node(id);
    for (int i = 0; i < n.n_inputs; ++i) {
      const Ref in = n.inputs[index(i)];
      Readers& r = readers[index(in.node)][index(in.output)];
      if (id > loss) {
        r.backward = true;
      } else if (n.segment != graph.node(in.node).segment) {
        r.other_segment = true;
      }
    }
  }
  std::vector<Purpose> result;
  for (const Plan::Stay& stay : plan.stays) {
    const Node& n = graph.node(stay.holder.node);
    if (stay.holder.output < 0) {
      result.push_back(Purpose::scratch);
    } else if (n.op == OpId::page_in) {
      result.push_back(Purpose::returned);
    } else if (n.clone_of >= 0) {
      result.push_back(Purpose::recomputed);
    } else if (stay.holder.node >= loss) {
      result.push_back(Purpose::gradient);
    } else {
      const Readers& r = readers[index(stay.holder.node)][index(stay.holder.output)];
      result.push_back(!r.backward       ? Purpose::passing
                       : r.other_segment ? Purpose::block_input
                                         : Purpose::stored);
    }
  }
  return result;
}

// A backward step belongs where the values that it repeats or the weights that it reads belong, and
// otherwise where the step before it does: the walk leaves a segment for good.
std::vector<std::int32_t> blocks(const Plan& plan, std::int32_t loss) {
  const Graph& graph = *plan.graph;
  const std::vector<std::int32_t> weights = segments_of_weights(plan, loss);
  std::vector<std::int32_t> result;
  std::int32_t current = kOutside;
  for (const std::int32_t id : plan.steps) {
    const Node& n = graph.node(id);
    if (id < loss) {
      current = n.segment;
    } else if (n.clone_of >= 0) {
      current = graph.node(n.clone_of).segment;
    } else {
      for (int i = 0; i < n.n_inputs; ++i) {
        const Ref in = n.inputs[index(i)];
        const NodeKind kind = graph.node(in.node).kind;
        const bool is_weight = kind == NodeKind::weight || kind == NodeKind::parameter;
        if (is_weight && weights[index(in.node)] >= kOutside) current = weights[index(in.node)];
      }
    }
    result.push_back(current);
  }
  return result;
}

}  // namespace nibble
