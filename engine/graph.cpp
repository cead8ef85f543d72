#include "engine/graph.h"

#include <algorithm>

#include "engine/error.h"
#include "engine/op.h"
#include "engine/ops.h"

namespace nibble {

Graph::Graph(DType compute) : compute_(compute) {
  if (compute != DType::F64 && compute != DType::F32 && compute != DType::BF16) {
    throw ShapeError("a graph computes in F64, F32 or BF16, not " +
                     std::string(nibble::name(compute)));
  }
}

Tensor Graph::leaf(NodeKind kind, std::string_view name, const TensorType& type) {
  if (const Tensor existing = find(name)) {
    const Node& node = nodes_[static_cast<std::size_t>(existing.node)];
    if (node.kind != kind || !(node.outputs[0] == type)) {
      throw ShapeError("\"" + std::string(name) + "\" is already a leaf of another kind or type, " +
                       node.outputs[0].str() + "; wanted " + type.str());
    }
    return existing;
  }
  bytes(type);  // throws when the shape does not fit the storage type
  Node node;
  node.kind = kind;
  node.n_outputs = 1;
  node.outputs[0] = type;
  node.needs_grad = kind == NodeKind::parameter;
  node.name = static_cast<std::int32_t>(names_.size());
  names_.emplace_back(name);
  nodes_.push_back(node);
  leaves_.emplace(name, size() - 1);
  return {this, size() - 1, 0};
}

Tensor Graph::input(std::string_view name, const TensorType& type) {
  return leaf(NodeKind::input, name, type);
}
Tensor Graph::weight(std::string_view name, const TensorType& type) {
  if (const auto found = streamed_values_.find(name); found != streamed_values_.end()) {
    return {this, found->second, 0};
  }
  return leaf(NodeKind::weight, name, type);
}
Tensor Graph::parameter(std::string_view name, const TensorType& type) {
  return leaf(NodeKind::parameter, name, type);
}
Tensor Graph::state(std::string_view name, const TensorType& type) {
  return leaf(NodeKind::state, name, type);
}

Tensor Graph::page(std::string_view name, const TensorType& type) {
  return leaf(NodeKind::page, name, type);
}

void Graph::offload(Tensor x, std::string_view name, std::int64_t group) {
  const Tensor stored = page_out(page(name, x.type()), x);
  offloaded_.push_back({{x.node, x.output}, {stored.node, stored.output}, group});
}

Tensor Graph::stream(std::string_view name, const TensorType& type, std::int64_t group) {
  const Tensor stored = page(name, type);
  const Tensor value = page_in(stored);
  streamed_.push_back({{value.node, value.output}, {stored.node, stored.output}, group});
  streamed_values_.emplace(name, value.node);
  return value;
}

Tensor Graph::find(std::string_view name) const {
  const auto found = leaves_.find(name);
  if (found == leaves_.end()) return {};
  return {const_cast<Graph*>(this), found->second, 0};
}

const std::string& Graph::name(std::int32_t id) const {
  static const std::string none;
  const std::int32_t index = node(id).name;
  return index < 0 ? none : names_[static_cast<std::size_t>(index)];
}

Tensor Graph::append(OpId op, std::span<const Tensor> inputs,
                     const std::array<std::byte, Node::kParamBytes>& params) {
  const OpDef& def = op_def(op);
  if (inputs.size() > Node::kMaxInputs) {
    throw ShapeError(std::string(def.name) + ": more than " + std::to_string(Node::kMaxInputs) +
                     " inputs");
  }
  Node node;
  node.op = op;
  node.n_inputs = static_cast<std::uint8_t>(inputs.size());
  node.segment = open_segment_;
  node.params = params;
  std::array<TensorType, Node::kMaxInputs> types;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& t = inputs[i];
    if (t.graph != this) {
      throw ShapeError(std::string(def.name) + ": input " + std::to_string(i) +
                       (t ? " belongs to another graph" : " is empty"));
    }
    node.inputs[i] = {t.node, t.output};
    types[i] = t.type();
    node.needs_grad = node.needs_grad || nodes_[static_cast<std::size_t>(t.node)].needs_grad;
  }
  InferArgs args{compute_, {types.data(), inputs.size()}, node, node.outputs};
  def.infer(args);
  node.n_outputs = static_cast<std::uint8_t>(args.n_outputs);
  return {this, add_node(node), 0};
}

std::int32_t Graph::add_node(const Node& node) {
  for (std::size_t i = 0; i < node.n_inputs; ++i) {
    ++nodes_[static_cast<std::size_t>(node.inputs[i].node)].uses;
  }
  nodes_.push_back(node);
  return size() - 1;
}

std::int32_t Graph::clone(std::int32_t id, std::span<const Ref> inputs) {
  Node node = nodes_[static_cast<std::size_t>(id)];
  for (std::size_t i = 0; i < inputs.size(); ++i) node.inputs[i] = inputs[i];
  node.segment = -1;
  node.clone_of = id;
  node.needs_grad = false;
  node.uses = 0;
  return add_node(node);
}

void Graph::begin_segment(Rung rung) {
  if (open_segment_ >= 0) throw Error("recompute segments do not nest");
  open_segment_ = static_cast<std::int32_t>(segments_.size());
  segments_.push_back({rung});
}

void Graph::mark_recomputing(std::int32_t id, std::int32_t original) {
  Node& node = nodes_[static_cast<std::size_t>(id)];
  node.clone_of = original;
  node.needs_grad = false;
}

void Graph::require_grad(Tensor leaf) {
  nodes_[static_cast<std::size_t>(leaf.node)].needs_grad = true;
}

void Graph::end_segment() { open_segment_ = -1; }

void Graph::keep(Tensor tensor) {
  const Ref ref{tensor.node, tensor.output};
  if (std::find(kept_.begin(), kept_.end(), ref) == kept_.end()) kept_.push_back(ref);
}

Ref state_root(const Graph& graph, Ref ref) {
  while (true) {
    const Node& node = graph.node(ref.node);
    if (node.kind != NodeKind::op || ref.output != 0) return ref;
    const int updated = updated_input(op_def(node.op));
    if (updated < 0) return ref;
    ref = node.inputs[static_cast<std::size_t>(updated)];
  }
}

void Graph::check() const {
  // newest[root] = the node that last updated that memory.
  std::vector<std::int32_t> newest(nodes_.size(), -1);
  for (std::int32_t id = 0; id < size(); ++id) {
    newest[static_cast<std::size_t>(id)] = id;
    const Node& n = node(id);
    if (n.kind != NodeKind::op) continue;
    for (int i = 0; i < n.n_inputs; ++i) {
      const Ref in = n.inputs[static_cast<std::size_t>(i)];
      const Ref root = state_root(*this, in);
      if (in.output == 0 && newest[static_cast<std::size_t>(root.node)] != in.node) {
        throw Error(std::string(op_def(n.op).name) + " (node " + std::to_string(id) +
                    ") reads an outdated version of %" + std::to_string(root.node) + " \"" +
                    name(root.node) + "\"");
      }
    }
    const int updated = updated_input(op_def(n.op));
    if (updated >= 0) {
      const Ref root = state_root(*this, n.inputs[static_cast<std::size_t>(updated)]);
      newest[static_cast<std::size_t>(root.node)] = id;
    }
  }
}

std::string Graph::str() const {
  std::string text;
  for (std::int32_t id = 0; id < size(); ++id) {
    const Node& n = node(id);
    text += "%" + std::to_string(id) + " = ";
    if (n.kind == NodeKind::op) {
      text += std::string(op_def(n.op).name) + "(";
      for (int i = 0; i < n.n_inputs; ++i) {
        const Ref in = n.inputs[static_cast<std::size_t>(i)];
        text += (i > 0 ? ", %" : "%") + std::to_string(in.node);
        if (in.output > 0) text += "." + std::to_string(in.output);
      }
      text += ")";
    } else {
      constexpr std::array kinds = {"input", "weight", "parameter", "state", "page"};
      text += std::string(kinds[static_cast<std::size_t>(n.kind)]) + " \"" + name(id) + "\"";
    }
    for (int i = 0; i < n.n_outputs; ++i) {
      text += (i == 0 ? " : " : ", ") + n.outputs[static_cast<std::size_t>(i)].str();
    }
    if (n.segment >= 0) text += "  segment " + std::to_string(n.segment);
    if (n.clone_of >= 0) text += "  recomputes %" + std::to_string(n.clone_of);
    text += "\n";
  }
  return text;
}

}  // namespace nibble
