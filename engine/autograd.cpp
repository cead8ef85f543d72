#include "engine/autograd.h"

#include <map>
#include <utility>

#include "engine/error.h"
#include "engine/op.h"
#include "engine/ops.h"
#include "engine/storage.h"

namespace nibble {
namespace {

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

// How many groups ahead of the one that is read come back from the host: activations take much
// memory, and a block's time is enough for them.
constexpr std::int64_t kActivationsAhead = 1;

// Values in host memory that come back for the backward pass, in reverse order, group by group.
class Returning {
 public:
  Returning(Graph& graph, std::span<const Graph::OnHost> values, std::int64_t ahead)
      : graph_(graph),
        values_(values),
        ahead_(ahead),
        brought_(values.size()),
        waiting_(values.size()) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      number_[{values[i].value.node, values[i].value.output}] = i;
      const bool next_group = i > 0 && values[i].group != values[i - 1].group;
      group_.push_back(i == 0 ? 0 : group_.back() + (next_group ? 1 : 0));
    }
  }

  // The last groups start to come.
  void start() {
    if (waiting_ > 0) bring(group_.back() - ahead_ + 1);
  }

  // The value as it came back, or an empty Tensor when it never left. The groups before its own
  // start to come.
  Tensor find(Ref ref) {
    const auto found = number_.find({ref.node, ref.output});
    if (found == number_.end()) return {};
    bring(group_[found->second] - ahead_);
    return brought_[found->second];
  }

 private:
  // All groups from this one on.
  void bring(std::int64_t group) {
    while (waiting_ > 0 && group_[waiting_ - 1] >= group) {
      --waiting_;
      brought_[waiting_] = page_in(graph_.tensor(values_[waiting_].page));
    }
  }

  Graph& graph_;
  std::span<const Graph::OnHost> values_;
  std::int64_t ahead_;
  std::vector<std::int64_t> group_;  // by value: 0, 1, ... whatever the caller's numbers are
  std::map<std::pair<std::int32_t, std::int32_t>, std::size_t> number_;
  std::vector<Tensor> brought_;
  std::size_t waiting_;  // the first so many have not come back
};

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
        offloaded_(graph, graph.offloaded(), kActivationsAhead),
        streamed_(graph, graph.streamed(), kStreamedAhead) {
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
    offloaded_.start();
    streamed_.start();
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

  void add_rows(int i, Tensor gradient, std::int64_t first) override {
    if (!wants(i)) return;
    const Ref target = node_.inputs[index(i)];
    const TensorType& type = graph_.type(target);
    if (is_parameter(i)) {
      const Tensor zeros = fill(graph_, {gradient.dtype(), type.shape, {}}, 0);
      return add(i, nibble::add_rows(zeros, gradient, first));
    }
    Tensor& sum = grads_[index(target.node)][index(target.output)];
    if (!sum) sum = fill(graph_, {gradient.dtype(), type.shape, {}}, 0);
    sum = nibble::add_rows(sum, gradient, first);
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
      case Rung::attention:
        return !def.dear;
      case Rung::block:
        return true;
    }
    return false;
  }

  // The value to read in the backward pass. Clones read what a clone should: dropped inputs are
  // recomputed in turn.
  Tensor value(Ref ref) {
    for (Returning* const values : {&offloaded_, &streamed_}) {
      if (const Tensor brought = values->find(ref)) return brought;
    }
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
  Returning offloaded_, streamed_;
  std::int32_t recomputed_ = 0;
};

}  // namespace

Backward append_backward(Graph& graph, std::span<const Seed> seeds) {
  Walker walker(graph);
  for (const Seed& s : seeds) walker.seed(s);
  return walker.walk();
}

}  // namespace nibble
