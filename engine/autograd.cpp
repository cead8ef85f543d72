#include "engine/autograd.h"

#include "engine/error.h"
#include "engine/op.h"
#include "engine/ops.h"

namespace nibble {
namespace {

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

// One walk over the forward nodes in reverse. Holds the gradients so far, the recomputing clones
// and the parameter accumulators, and is what gradient rules see as VjpArgs.
class Walker final : public VjpArgs {
 public:
  explicit Walker(Graph& graph)
      : graph_(graph),
        forward_(graph.size()),
        grads_(index(forward_)),
        clones_(index(forward_), -1),
        boundary_(index(forward_)),
        accumulators_(index(forward_)),
        waiting_(graph.offloaded().size()),
        brought_(waiting_) {
    find_boundary();
  }

  void seed(const Seed& s) {
    if (!(s.value.type().shape == s.gradient.type().shape)) {
      throw ShapeError("the gradient of a " + s.value.type().str() + " cannot be a " +
                       s.gradient.type().str());
    }
    boundary_[index(s.value.node)][index(s.value.output)] = true;
    contribute({s.value.node, s.value.output}, s.gradient);
  }

  Backward walk() {
    if (waiting_ > 0) bring_in(graph_.offloaded().back().group);
    for (current_ = forward_ - 1; current_ >= 0; --current_) {
      const Node& n = graph_.node(current_);
      if (n.kind != NodeKind::op || !n.needs_grad || !has_gradient(current_)) continue;
      const OpDef& def = op_def(n.op);
      if (def.vjp == nullptr) {
        throw Unsupported(std::string(def.name) + " (node " + std::to_string(current_) +
                          ") has no gradient rule, and a parameter's gradient passes through it");
      }
      node_ = n;
      def.vjp(*this);
    }
    return result();
  }

  Graph& graph() override { return graph_; }
  const Node& node() const override { return node_; }
  Tensor in(int i) override { return value(node_.inputs[index(i)]); }
  Tensor out(int i) override { return value({current_, i}); }
  Tensor grad(int output) override { return grads_[index(current_)][index(output)]; }
  bool wants(int i) const override { return graph_.node(node_.inputs[index(i)].node).needs_grad; }
  bool is_parameter(int i) const override {
    return graph_.node(node_.inputs[index(i)].node).kind == NodeKind::parameter;
  }

  void add(int i, Tensor gradient) override {
    if (!wants(i)) return;
    const Ref target = node_.inputs[index(i)];
    if (is_parameter(i)) {
      accumulated(i, accumulate(accumulator(i), gradient));
    } else {
      contribute(target, gradient);
    }
  }

  Tensor accumulator(int i) override {
    Accumulator& a = accumulators_[index(node_.inputs[index(i)].node)];
    if (!a.leaf) {
      const std::int32_t parameter = node_.inputs[index(i)].node;
      a.leaf = graph_.state(graph_.name(parameter) + ".grad",
                            {graph_.accumulate(), graph_.node(parameter).outputs[0].shape, {}});
      a.newest = a.leaf;
    }
    return a.newest;
  }

  void accumulated(int i, Tensor newest) override {
    accumulators_[index(node_.inputs[index(i)].node)].newest = newest;
  }

 private:
  struct Accumulator {
    Tensor leaf, newest;
  };
  using Outputs = std::array<Tensor, Node::kMaxOutputs>;

  // An output of a segment that is read from outside it, or kept, is stored and never recomputed.
  void find_boundary() {
    for (std::int32_t id = 0; id < forward_; ++id) {
      const Node& n = graph_.node(id);
      for (int i = 0; i < n.n_inputs; ++i) {
        const Ref in = n.inputs[index(i)];
        if (graph_.node(in.node).segment != n.segment) {
          boundary_[index(in.node)][index(in.output)] = true;
        }
      }
    }
    for (const Ref ref : graph_.kept()) boundary_[index(ref.node)][index(ref.output)] = true;
  }

  bool dropped(Ref ref) const {
    const Node& n = graph_.node(ref.node);
    if (n.kind != NodeKind::op || n.segment < 0) return false;
    if (boundary_[index(ref.node)][index(ref.output)]) return false;
    const OpDef& def = op_def(n.op);
    if (def.updates != 0) return false;  // an update cannot be repeated
    if ((def.stored >> ref.output & 1) != 0) return false;
    switch (graph_.segments()[index(n.segment)].rung) {
      case Rung::store:
        return false;
      case Rung::cheap:
        return def.cheap;
      case Rung::block:
        return true;
    }
    return false;
  }

  // Offloaded values come back in reverse order, group by group. When one is read, the group before
  // its own starts to come.
  void bring_in(std::int64_t group) {
    while (waiting_ > 0 && graph_.offloaded()[waiting_ - 1].group >= group) {
      --waiting_;
      brought_[waiting_] = page_in(graph_.tensor(graph_.offloaded()[waiting_].page));
    }
  }
  Tensor offloaded(Ref ref) {
    const std::span<const Graph::Offloaded> all = graph_.offloaded();
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (!(all[i].value == ref)) continue;
      bring_in(all[i].group - 1);
      return brought_[i];
    }
    return {};
  }

  // The value to read in the backward pass. Clones read what a clone should: dropped inputs are
  // recomputed in turn.
  Tensor value(Ref ref) {
    if (const Tensor brought = offloaded(ref)) return brought;
    if (!dropped(ref)) return graph_.tensor(ref);
    std::int32_t& clone = clones_[index(ref.node)];
    if (clone < 0) {
      const Node n = graph_.node(ref.node);
      clone = recompute(ref.node, n);
      ++recomputed_;
    }
    return {&graph_, clone, ref.output};
  }

  std::int32_t recompute(std::int32_t id, const Node& n) {
    std::array<Tensor, Node::kMaxInputs> inputs;
    std::array<Ref, Node::kMaxInputs> refs;
    for (int i = 0; i < n.n_inputs; ++i) {
      inputs[index(i)] = value(n.inputs[index(i)]);
      refs[index(i)] = {inputs[index(i)].node, inputs[index(i)].output};
    }
    const OpDef& def = op_def(n.op);
    if (def.recompute == nullptr) return graph_.clone(id, {refs.data(), n.n_inputs});
    const Tensor repeated = def.recompute(graph_, id, {inputs.data(), n.n_inputs});
    graph_.mark_recomputing(repeated.node, id);
    return repeated.node;
  }

  void contribute(Ref target, Tensor gradient) {
    Tensor& sum = grads_[index(target.node)][index(target.output)];
    sum = sum ? nibble::add(sum, gradient) : gradient;
  }

  bool has_gradient(std::int32_t id) const {
    for (const Tensor& g : grads_[index(id)]) {
      if (g) return true;
    }
    return false;
  }

  Backward result() {
    Backward backward;
    backward.recomputed = recomputed_;
    backward.inputs.resize(index(forward_));
    for (std::int32_t id = 0; id < forward_; ++id) {
      const NodeKind kind = graph_.node(id).kind;
      if (kind == NodeKind::parameter && accumulators_[index(id)].leaf) {
        const Accumulator& a = accumulators_[index(id)];
        backward.parameters.push_back({id, a.leaf, a.newest});
      } else if (kind == NodeKind::input) {
        backward.inputs[index(id)] = grads_[index(id)][0];
      }
    }
    return backward;
  }

  Graph& graph_;
  std::int32_t forward_;  // number of forward nodes
  std::int32_t current_ = 0;
  Node node_;  // a copy: appending moves the graph's vector
  std::vector<Outputs> grads_;
  std::vector<std::int32_t> clones_;
  std::vector<std::array<bool, Node::kMaxOutputs>> boundary_;
  std::vector<Accumulator> accumulators_;
  std::size_t waiting_;          // offloaded values that have not come back
  std::vector<Tensor> brought_;  // the others
  std::int32_t recomputed_ = 0;
};

}  // namespace

Backward append_backward(Graph& graph, std::span<const Seed> seeds) {
  Walker walker(graph);
  for (const Seed& s : seeds) walker.seed(s);
  return walker.walk();
}

}  // namespace nibble
