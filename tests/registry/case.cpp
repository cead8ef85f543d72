#include "tests/registry/case.h"

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/philox.h"
#include "engine/runtime.h"

namespace nibble::registry {
namespace {

using Role = Sample::Role;

// Storage types of frozen weights. F64 belongs to F64 graphs alone: no file holds it.
std::vector<TensorType> stored_types(DType compute) {
  std::vector<TensorType> types;
  if (compute == DType::F64) types.push_back({DType::F64, {}, {}});
  for (const DType d : {DType::F32, DType::F16, DType::BF16}) types.push_back({d, {}, {}});
  types.push_back({DType::NF4, {}, {.block = 64, .double_quant = true}});
  types.push_back({DType::NF4, {}, {.block = 32, .double_quant = false}});
  for (const DType d : {DType::Q8_0, DType::Q4_0, DType::Q4_1}) types.push_back({d, {}, {}});
  return types;
}

bool fits(const Case& c) {
  for (std::size_t i = 0; i < c.sample.inputs.size(); ++i) {
    if (c.sample.inputs[i].role != Role::weight) continue;
    const TensorType type = c.input_type(i);
    if (is_block(type.dtype) && type.shape.cols() % info(type.dtype).block != 0) return false;
  }
  return true;
}

}  // namespace

std::string Case::str() const {
  std::string text = std::string(op_def(op).name) + ", " + std::string(sample.label) + ", " +
                     std::string(name(compute));
  if (!has_weight) return text;
  text += ", weights " + std::string(name(stored.dtype));
  if (!is_plane(stored.dtype)) return text;
  return text + "/" + std::to_string(stored.quant.block) +
         (stored.quant.double_quant ? " double" : " single");
}

TensorType Case::input_type(std::size_t i) const {
  const Sample::Input& input = sample.inputs[i];
  const DType statistic = compute == DType::F64 ? DType::F64 : DType::F32;
  switch (input.role) {
    case Role::activation:
    case Role::parameter:
    case Role::cache:
      return {compute, input.shape, {}};
    case Role::statistic:
    case Role::constant:
    case Role::state:
      return {statistic, input.shape, {}};
    case Role::total:
      return {DType::F64, input.shape, {}};
    case Role::index:
      return {DType::I32, input.shape, {}};
    case Role::counter:
      return {DType::I64, input.shape, {}};
    case Role::bytes:
      return {DType::U8, input.shape, {}};
    case Role::weight:
      return {stored.dtype, input.shape, stored.quant};
  }
  throw Error("a sample input has no role");
}

bool Case::differentiable(std::size_t i) const {
  const Role role = sample.inputs[i].role;
  return role == Role::activation || role == Role::statistic || role == Role::parameter;
}

std::vector<Case> cases_of(OpId op) {
  std::vector<Case> cases;
  const OpDef& def = op_def(op);
  if (def.samples == nullptr) return cases;
  int number = 0;
  for (const Sample& sample : def.samples()) {
    Case c{op, sample, number++, DType::F32, {}, false};
    for (const Sample::Input& input : sample.inputs) {
      c.has_weight = c.has_weight || input.role == Role::weight;
    }
    for (const DType compute : kComputes) {
      c.compute = compute;
      for (const TensorType& stored : stored_types(compute)) {
        c.stored = stored;
        if (fits(c)) cases.push_back(c);
        if (!c.has_weight) break;
      }
    }
  }
  return cases;
}

OpGraph build(const Case& c) {
  OpGraph built{std::make_unique<Graph>(c.compute), {}, {}};
  Graph& g = *built.graph;
  for (std::size_t i = 0; i < c.sample.inputs.size(); ++i) {
    const std::string name = "in" + std::to_string(i);
    const TensorType type = c.input_type(i);
    switch (c.sample.inputs[i].role) {
      case Role::weight:
        built.inputs.push_back(g.weight(name, type));
        break;
      case Role::parameter:
        built.inputs.push_back(g.parameter(name, type));
        break;
      case Role::state:
      case Role::total:
      case Role::cache:
      case Role::bytes:
        built.inputs.push_back(g.state(name, type));
        break;
      default:
        built.inputs.push_back(g.input(name, type));
    }
    if (c.differentiable(i)) g.require_grad(built.inputs.back());
  }
  built.output = c.sample.build(g, built.inputs);
  if (built.output.node != g.size() - 1 || g.node(built.output.node).op != c.op ||
      g.size() != static_cast<std::int32_t>(built.inputs.size()) + 1) {
    throw Error(c.str() + ": the sample must append one node, of its own op");
  }
  return built;
}

std::vector<double> normal_values(std::string_view name, std::int64_t count) {
  std::vector<double> values(static_cast<std::size_t>(count));
  const std::uint64_t stream = hash_name(name);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(philox_normal(0x4e6962626c65, stream, i));
  }
  return values;
}

std::vector<double> raw_values(const Case& c, std::size_t i) {
  const Sample::Input& input = c.sample.inputs[i];
  const std::int64_t count = input.shape.elements();
  if (input.role == Role::index || input.role == Role::counter || input.role == Role::bytes) {
    std::vector<double> values(static_cast<std::size_t>(count));
    for (std::int64_t k = 0; k < count && input.indices; ++k) {
      values[static_cast<std::size_t>(k)] = static_cast<double>(input.indices(k));
    }
    return values;
  }
  std::vector<double> values = normal_values(
      std::string(op_def(c.op).name) + "/" + std::string(c.sample.label) + "/" + std::to_string(i),
      count);
  for (double& v : values) v = input.shift + input.scale * v;
  return values;
}

Inputs make_inputs(const Case& c) {
  Inputs inputs;
  for (std::size_t i = 0; i < c.sample.inputs.size(); ++i) {
    const TensorType type = c.input_type(i);
    inputs.bytes.push_back(encode(type, raw_values(c, i)));
    inputs.rounded.push_back(decode(type, inputs.bytes.back().data()));
  }
  return inputs;
}

std::vector<std::vector<double>> rounded_weights(const Case& c, const Inputs& inputs) {
  std::vector<std::vector<double>> values = inputs.rounded;
  // Norms take their factors in F32, and so do products of statistics.
  const bool is_product = c.op != OpId::rms_norm && c.op != OpId::rms_norm_dx &&
                          !(c.op == OpId::linear_dx && c.input_type(0).dtype != DType::BF16);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!is_product || c.sample.inputs[i].role != Role::weight) continue;
    for (double& v : values[i]) v = to_float(to_bf16(static_cast<float>(v)));
  }
  return values;
}

std::vector<std::vector<double>> reference_outputs(const Graph& graph, std::int32_t id,
                                                   const std::vector<std::vector<double>>& inputs) {
  const Node& node = graph.node(id);
  const OpDef& def = op_def(node.op);
  std::vector<TensorType> in_types, out_types;
  std::vector<std::vector<double>> in, out;
  for (int i = 0; i < node.n_inputs; ++i) {
    const Ref ref = node.inputs[static_cast<std::size_t>(i)];
    in_types.push_back(graph.type(ref));
    in.push_back(inputs[static_cast<std::size_t>(ref.node)]);  // leaves come first, in order
  }
  for (int i = 0; i < node.n_outputs; ++i) {
    out_types.push_back(node.outputs[static_cast<std::size_t>(i)]);
    out.emplace_back(static_cast<std::size_t>(out_types.back().elements()));
  }
  if (const int updated = updated_input(def); updated >= 0) {
    out[0] = in[static_cast<std::size_t>(updated)];
  }
  def.reference({node, in_types, out_types, in, out});
  return out;
}

unsigned written_inputs(OpId op) { return op_def(op).updates | op_def(op).also_writes; }

}  // namespace nibble::registry
