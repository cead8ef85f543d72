#include "engine/plan.h"

#include <algorithm>
#include <deque>

#include "engine/error.h"

namespace nibble {
namespace {

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

class Planner {
 public:
  Planner(const Graph& graph, const Backend& backend, Layout layout, const PlaceHint& hint)
      : graph_(graph),
        backend_(backend),
        layout_(layout),
        hint_(hint),
        alignment_(backend.info().alignment) {}

  Plan run() {
    graph_.check();
    plan_.graph = &graph_;
    plan_.locations.resize(index(graph_.size()));
    plan_.scratch.assign(index(graph_.size()), -1);
    find_steps();
    find_fused();
    find_last_reads();
    for (const std::int32_t id : plan_.steps) assign_storage(id);
    place_all();
    return std::move(plan_);
  }

 private:
  using PerOutput = std::array<std::int32_t, Node::kMaxOutputs>;

  // Nodes worth running: those that update a state, and all that they and the kept values need.
  void find_steps() {
    std::vector<bool> needed(index(graph_.size()));
    for (const Ref ref : graph_.kept()) needed[index(ref.node)] = true;
    for (std::int32_t id = graph_.size() - 1; id >= 0; --id) {
      const Node& n = graph_.node(id);
      if (n.kind != NodeKind::op) continue;
      if (updates_state(id)) needed[index(id)] = true;
      if (!needed[index(id)]) continue;
      for (int i = 0; i < n.n_inputs; ++i) needed[index(n.inputs[index(i)].node)] = true;
    }
    for (std::int32_t id = 0; id < graph_.size(); ++id) {
      if (graph_.node(id).kind == NodeKind::op) {
        if (needed[index(id)]) plan_.steps.push_back(id);
      } else {
        plan_.locations[index(id)][0] = {Location::Kind::leaf, id, 0};
      }
    }
  }

  // Steps that the backend runs as one kernel. All their reads count as happening in the first,
  // all their writes as lasting through the last.
  void find_fused() {
    plan_.fused.assign(plan_.steps.size(), false);
    group_first_.resize(index(graph_.size()) + 1);
    group_last_.resize(index(graph_.size()) + 1);
    for (std::int32_t id = 0; id <= graph_.size(); ++id) {
      group_first_[index(id)] = group_last_[index(id)] = id;
    }
    const std::span<const std::int32_t> steps = plan_.steps;
    for (std::size_t first = 0; first < steps.size();) {
      std::size_t end = first + 1;
      while (end < steps.size() &&
             backend_.fuses(graph_, steps.subspan(first, end - first), steps[end])) {
        plan_.fused[end++] = true;
      }
      for (std::size_t i = first; i < end; ++i) {
        group_first_[index(steps[i])] = steps[first];
        group_last_[index(steps[i])] = steps[end - 1];
      }
      first = end;
    }
  }

  bool updates_state(std::int32_t id) const {
    const Node& n = graph_.node(id);
    if (updated_input(op_def(n.op)) < 0) return false;
    const NodeKind kind = graph_.node(state_root(graph_, {id, 0}).node).kind;
    return kind == NodeKind::state || kind == NodeKind::page;
  }

  void find_last_reads() {
    last_read_.assign(index(graph_.size()), PerOutput{-1, -1, -1});
    for (const std::int32_t id : plan_.steps) {
      const Node& n = graph_.node(id);
      for (int i = 0; i < n.n_inputs; ++i) {
        const Ref in = n.inputs[index(i)];
        last_read_[index(in.node)][index(in.output)] = id;
      }
    }
    for (const Ref ref : graph_.kept()) {
      last_read_[index(ref.node)][index(ref.output)] = graph_.size();
    }
    keep_while_copied();
    storage_.assign(index(graph_.size()), PerOutput{-1, -1, -1});
  }

  // A copy to the host runs beside the steps after it: what it reads stays for a while, or those
  // steps would wait for the memory.
  void keep_while_copied() {
    std::deque<Ref> copied;
    for (const std::int32_t id : plan_.steps) {
      const Node& n = graph_.node(id);
      if (n.op != OpId::page_out) continue;
      copied.push_back(n.inputs[1]);
      if (copied.size() <= copies_in_flight(graph_)) continue;
      const Ref value = copied.front();
      copied.pop_front();
      std::int32_t& last = last_read_[index(value.node)][index(value.output)];
      last = std::max(last, id);
    }
  }

  // Gives each output of node `id` a storage: that of the input it updates or may overwrite, or a
  // new one. Kernel scratch is a storage that lives for one step.
  void assign_storage(std::int32_t id) {
    const Node& n = graph_.node(id);
    const OpCall call = describe(graph_, id);
    if (!backend_.supports(call)) throw Unsupported(missing_kernel(call));
    if (n.op == OpId::page_in || n.op == OpId::page_out) plan_.copied_bytes += bytes(n.outputs[0]);
    for (int output = 0; output < n.n_outputs; ++output) {
      const int reused = reusable_input(id, output);
      if (reused >= 0) {
        const Ref in = n.inputs[index(reused)];
        const Location& from = plan_.at(in);
        std::int32_t& storage = storage_[index(id)][index(output)];
        plan_.locations[index(id)][index(output)] = from;
        storage = storage_[index(in.node)][index(in.output)];
        if (storage < 0) continue;
        extend(storage, id, output);
        holders_.push_back({{id, output}, storage});
        continue;
      }
      const std::int64_t size = bytes(n.outputs[index(output)]);
      storage_[index(id)][index(output)] =
          add_storage({id, output}, std::max<std::int64_t>(size, 1));
      extend(storage_[index(id)][index(output)], id, output);
      plan_.locations[index(id)][index(output)] = {Location::Kind::arena, -1, 0};
    }
    const std::int64_t scratch = backend_.scratch_bytes(call);
    if (scratch > 0) add_storage({id, -1}, scratch);
  }

  std::int32_t add_storage(Ref holder, std::int64_t size) {
    const auto storage = static_cast<std::int32_t>(lifetimes_.size());
    lifetimes_.push_back({size, holder.node, holder.node});
    holders_.push_back({holder, storage});
    return storage;
  }

  void extend(std::int32_t storage, std::int32_t id, int output) {
    Lifetime& life = lifetimes_[index(storage)];
    life.last = std::max({life.last, id, last_read_[index(id)][index(output)]});
  }

  // The input whose memory an output takes over, or -1.
  int reusable_input(std::int32_t id, int output) const {
    const Node& n = graph_.node(id);
    const OpDef& def = op_def(n.op);
    const int updated = updated_input(def);
    if (output == 0 && updated >= 0) return updated;
    for (int i = 0; i < n.n_inputs; ++i) {
      if ((def.in_place[index(output)] >> i & 1) == 0) continue;
      const Ref in = n.inputs[index(i)];
      const PerOutput& taken = storage_[index(id)];
      const std::int32_t storage = storage_[index(in.node)][index(in.output)];
      if (std::find(taken.begin(), taken.begin() + output, storage) != taken.begin() + output) {
        continue;
      }
      if (plan_.at(in).kind != Location::Kind::arena) continue;
      if (last_read_[index(in.node)][index(in.output)] != id) continue;
      if (bytes(graph_.type(in)) != bytes(n.outputs[index(output)])) continue;
      return i;
    }
    return -1;
  }

  void place_all() {
    for (Lifetime& life : lifetimes_) {
      life.first = group_first_[index(life.first)];
      life.last = group_last_[index(life.last)];
    }
    const Placement placement = layout_ == Layout::search ? place(lifetimes_, alignment_, hint_)
                                                          : bound_placement(lifetimes_, alignment_);
    plan_.arena_bytes = placement.bytes;
    plan_.lower_bound_bytes = placement.lower_bound;
    plan_.search = placement.search;
    for (const Lifetime& life : lifetimes_)
      plan_.unshared_bytes += round_up(life.bytes, alignment_);
    for (const auto& [holder, storage] : holders_) {
      const std::int64_t offset = placement.offsets[index(storage)];
      if (holder.output < 0) {
        plan_.scratch[index(holder.node)] = offset;
      } else {
        plan_.locations[index(holder.node)][index(holder.output)].offset = offset;
      }
    }
    if (layout_ == Layout::search) record_stays(placement);
  }

  // The holders of a storage follow each other without a gap: each is read where it is taken over.
  void record_stays(const Placement& placement) {
    std::vector<std::int32_t> newest(lifetimes_.size(), -1);  // by storage: its last stay so far
    for (const auto& [holder, storage] : holders_) {
      const Lifetime& life = lifetimes_[index(storage)];
      Plan::Stay stay{holder, placement.offsets[index(storage)], round_up(life.bytes, alignment_),
                      life.first, life.last};
      std::int32_t& before = newest[index(storage)];
      if (before >= 0) {
        plan_.stays[index(before)].last = holder.node - 1;
        stay.first = holder.node;
      }
      before = static_cast<std::int32_t>(plan_.stays.size());
      plan_.stays.push_back(stay);
    }
  }

  std::string missing_kernel(const OpCall& call) const {
    std::string types;
    for (int i = 0; i < call.n_inputs; ++i) {
      types += (i > 0 ? ", " : "") + std::string(name(call.in_types[index(i)].dtype));
    }
    return "backend " + backend_.info().name + " has no kernel for " +
           std::string(op_def(call.node->op).name) + "(" + types + ")";
  }

  const Graph& graph_;
  const Backend& backend_;
  Layout layout_;
  PlaceHint hint_;
  std::int64_t alignment_;
  Plan plan_;
  std::vector<PerOutput> last_read_, storage_;
  std::vector<std::int32_t> group_first_, group_last_;  // by node: of its kernel
  std::vector<Lifetime> lifetimes_;
  std::vector<std::pair<Ref, std::int32_t>> holders_;  // of each storage, in program order
};

}  // namespace

void check_memory_limit(std::string_view purpose, MemoryKind kind, std::int64_t bytes,
                        std::int64_t allocated, std::int64_t limit) {
  if (limit == 0 || allocated + bytes <= limit) return;
  throw OutOfMemory(std::string(purpose) + ": " + std::to_string(bytes) + " bytes do not fit; " +
                        std::to_string(allocated) + " of " + std::to_string(limit) + " are in use",
                    kind, allocated + bytes, limit);
}

std::size_t copies_in_flight(const Graph& graph) {
  const std::span<const Graph::OnHost> all = graph.offloaded();
  const auto of_first = std::count_if(all.begin(), all.end(), [&](const Graph::OnHost& value) {
    return value.group == all.front().group;
  });
  return static_cast<std::size_t>(std::max<std::ptrdiff_t>(1, of_first - 1));
}

Plan make_plan(const Graph& graph, const Backend& backend, Layout layout, const PlaceHint& hint) {
  return Planner(graph, backend, layout, hint).run();
}

}  // namespace nibble
