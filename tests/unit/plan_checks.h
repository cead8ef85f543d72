// Plans are checked by walking their steps with a map of who owns which addresses: a value that
// loses an address before its last reader came is found there, whatever the planner thought.
#pragma once

#include <string>
#include <vector>

#include "engine/op.h"
#include "engine/plan.h"

namespace nibble::test {

// Addresses of the arena in use, each range with its owner: a value, or the scratch of a step.
class Owners {
 public:
  explicit Owners(const Plan& plan) : plan_(plan), graph_(*plan.graph) {}

  // Empty, or the first thing that is wrong with the plan.
  std::string check(const Backend& backend) {
    for (const std::int32_t id : plan_.steps) {
      const Node& n = graph_.node(id);
      for (int i = 0; i < n.n_inputs; ++i) {
        if (!owns(n.inputs[static_cast<std::size_t>(i)])) {
          return "%" + std::to_string(id) + " reads input " + std::to_string(i) + " too late";
        }
      }
      if (const std::string problem = write_outputs(id, backend); !problem.empty()) {
        return "%" + std::to_string(id) + " " + problem;
      }
    }
    for (const Ref ref : graph_.kept()) {
      if (!owns(ref)) return "kept value %" + std::to_string(ref.node) + " is gone at the end";
    }
    return {};
  }

 private:
  struct Range {
    std::int64_t begin, end;
    bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
  };
  struct Owned {
    Range range;
    Ref owner;
  };

  Range range_of(Ref ref) const {
    const std::int64_t offset = plan_.at(ref).offset;
    return {offset, offset + bytes(graph_.type(ref))};
  }
  bool owns(Ref ref) const {
    const Location& at = plan_.at(ref);
    if (at.kind == Location::Kind::leaf) return true;
    if (at.kind == Location::Kind::none) return false;
    for (const Owned& o : owned_) {
      if (o.owner == ref) return true;
    }
    return false;
  }
  // Inputs whose memory an output takes over by the op's own rules.
  bool may_share(const Node& n, int i, int output) const {
    const OpDef& def = op_def(n.op);
    const int updates = output == 0 ? def.updates : 0;
    return ((updates | def.in_place[static_cast<std::size_t>(output)]) >> i & 1) != 0;
  }

  std::string write_outputs(std::int32_t id, const Backend& backend) {
    const Node& n = graph_.node(id);
    std::vector<Owned> written;
    for (int o = 0; o < n.n_outputs; ++o) {
      const Ref ref{id, o};
      if (plan_.at(ref).kind == Location::Kind::none) return "has an output without a place";
      if (plan_.at(ref).kind == Location::Kind::arena) written.push_back({range_of(ref), ref});
    }
    const std::int64_t scratch = plan_.scratch[static_cast<std::size_t>(id)];
    const std::int64_t wanted = backend.scratch_bytes(describe(graph_, id));
    if ((wanted > 0) != (scratch >= 0)) return "asked for scratch and got none, or the reverse";
    if (wanted > 0) written.push_back({{scratch, scratch + wanted}, {}});
    for (std::size_t a = 0; a < written.size(); ++a) {
      if (written[a].range.end > plan_.arena_bytes) return "writes past the arena";
      for (std::size_t b = 0; b < a; ++b) {
        if (written[a].range.meets(written[b].range)) return "writes two things to one place";
      }
      if (const std::string problem = overwritten_input(id, written[a]); !problem.empty()) {
        return problem;
      }
    }
    for (const Owned& w : written) {
      std::erase_if(owned_, [&](const Owned& o) { return o.range.meets(w.range); });
    }
    for (const Owned& w : written) {
      if (w.owner.node >= 0) owned_.push_back(w);
    }
    return {};
  }

  std::string overwritten_input(std::int32_t id, const Owned& w) const {
    const Node& n = graph_.node(id);
    for (int i = 0; i < n.n_inputs; ++i) {
      const Ref in = n.inputs[static_cast<std::size_t>(i)];
      if (plan_.at(in).kind != Location::Kind::arena || !w.range.meets(range_of(in))) continue;
      const bool whole = w.range.begin == range_of(in).begin && w.range.end == range_of(in).end;
      if (w.owner.node != id || !may_share(n, i, w.owner.output) || !whole) {
        return "overwrites its input " + std::to_string(i);
      }
    }
    return {};
  }

  const Plan& plan_;
  const Graph& graph_;
  std::vector<Owned> owned_;
};

// Empty, or what is wrong with the stays of a plan: they fill each value's memory from the step
// that writes it on, none overlaps another, and at most the lower bound is held at a time.
inline std::string wrong_with_stays(const Plan& plan, const Backend& backend) {
  const Graph& graph = *plan.graph;
  std::size_t expected = 0;
  for (const std::int32_t id : plan.steps) {
    expected += plan.scratch[static_cast<std::size_t>(id)] >= 0;
    for (int o = 0; o < graph.node(id).n_outputs; ++o) {
      expected += plan.at({id, o}).kind == Location::Kind::arena;
    }
  }
  if (plan.stays.size() != expected) return "a holder has no stay, or two";
  std::vector<std::int64_t> change(static_cast<std::size_t>(graph.size()) + 2);
  for (std::size_t i = 0; i < plan.stays.size(); ++i) {
    const Plan::Stay& a = plan.stays[i];
    const std::string who = "the stay of %" + std::to_string(a.holder.node);
    const bool scratch = a.holder.output < 0;
    const std::int64_t offset =
        scratch ? plan.scratch[static_cast<std::size_t>(a.holder.node)] : plan.at(a.holder).offset;
    const std::int64_t size = scratch ? backend.scratch_bytes(describe(graph, a.holder.node))
                                      : bytes(graph.type(a.holder));
    if (a.offset != offset || a.bytes < size) return who + " is not where its holder lies";
    if (a.offset < 0 || a.offset + a.bytes > plan.arena_bytes) return who + " leaves the arena";
    if (a.first > a.holder.node || a.last < a.holder.node) return who + " misses its step";
    change[static_cast<std::size_t>(a.first)] += a.bytes;
    change[static_cast<std::size_t>(a.last) + 1] -= a.bytes;
    for (std::size_t k = 0; k < i; ++k) {
      const Plan::Stay& b = plan.stays[k];
      const bool together = a.first <= b.last && b.first <= a.last;
      if (together && a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes) {
        return who + " overlaps that of %" + std::to_string(b.holder.node);
      }
    }
  }
  std::int64_t held = 0, most = 0;
  for (const std::int64_t c : change) most = std::max(most, held += c);
  return most == plan.lower_bound_bytes ? "" : "the stays do not add up to the lower bound";
}

// Empty, or the first thing that is wrong with a plan.
inline std::string wrong_with(const Plan& plan, const Backend& backend) {
  const std::string problem = Owners(plan).check(backend);
  return problem.empty() ? wrong_with_stays(plan, backend) : problem;
}

}  // namespace nibble::test
