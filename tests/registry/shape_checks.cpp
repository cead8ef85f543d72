#include <array>

#include "engine/error.h"
#include "tests/registry/registry.h"

namespace nibble::registry {
namespace {

using Role = Sample::Role;

// Appends the op of `built` once more, to a graph whose leaves have these types. Empty when that is
// refused by a ShapeError that starts with the op's name; otherwise what happened instead.
std::string refusal(const OpGraph& built, const std::vector<TensorType>& types) {
  const Node& node = built.graph->node(built.output.node);
  const std::string op(op_def(node.op).name);
  Graph g(built.graph->compute());
  std::vector<Tensor> inputs;
  for (std::size_t i = 0; i < types.size(); ++i) {
    inputs.push_back(g.input("in" + std::to_string(i), types[i]));
  }
  try {
    g.append(node.op, inputs, node.params);
  } catch (const ShapeError& e) {
    const std::string message = e.what();
    if (message.starts_with(op + ": ")) return {};
    return "the ShapeError does not start with the op's name: " + message;
  } catch (const std::exception& e) {
    return std::string("refused, but not by a ShapeError: ") + e.what();
  }
  return "accepted";
}

// Ops that sum over, scale or copy whatever shape they are given.
bool any_rank(OpId op, int input) {
  return op == OpId::page_in || (op == OpId::scale && input == 0) || (op == OpId::sum_squares && input == 1);
}

std::optional<TensorType> with_another_rank(const TensorType& type) {
  if (type.shape.rank() == 4) return std::nullopt;
  std::array<std::int64_t, 4> extents{1, 1, 1, 1};
  for (int a = 0; a < type.shape.rank(); ++a) {
    extents[static_cast<std::size_t>(a + 1)] = type.shape[a];
  }
  TensorType wrong = type;
  wrong.shape = Shape({extents.data(), static_cast<std::size_t>(type.shape.rank() + 1)});
  return wrong;
}

void check_refusals(const Case& c, const OpGraph& built, Problems& problems) {
  const Node& node = built.graph->node(built.output.node);
  std::vector<TensorType> types;
  for (int i = 0; i < node.n_inputs; ++i) {
    types.push_back(built.graph->type(node.inputs[static_cast<std::size_t>(i)]));
  }
  const auto expect_refusal = [&](const std::vector<TensorType>& wrong, const std::string& what) {
    const std::string found = refusal(built, wrong);
    if (!found.empty()) problems.push_back(c.str() + ": " + what + ": " + found);
  };
  for (std::size_t i = 0; i < types.size(); ++i) {
    const std::string input = "input " + std::to_string(i);
    std::vector<TensorType> wrong = types;
    if (const auto type = with_another_rank(types[i]);
        type && !any_rank(c.op, static_cast<int>(i))) {
      wrong[i] = *type;
      expect_refusal(wrong, input + " with a rank too many");
    }
    wrong[i] = types[i];
    wrong[i].dtype = types[i].dtype == DType::I8 ? DType::U8 : DType::I8;
    expect_refusal(wrong, input + " of dtype " + std::string(name(wrong[i].dtype)));
  }
  std::vector<TensorType> wrong = types;
  wrong.push_back({DType::F32, {1}, {}});
  expect_refusal(wrong, "an input too many");
  if (types.empty()) return;
  wrong = types;
  wrong.pop_back();
  expect_refusal(wrong, "an input too few");
}

}  // namespace

Problems check_shape_rule(OpId op) {
  const OpDef& def = op_def(op);
  const std::string name(def.name);
  if (def.infer == nullptr || def.reference == nullptr || def.samples == nullptr) {
    return {name + ": wanted a shape rule, a reference and samples"};
  }
  Problems problems;
  const std::vector<Case> cases = cases_of(op);
  if (cases.empty()) problems.push_back(name + ": no samples");
  for (const Case& c : cases) {
    try {
      const OpGraph built = build(c);
      const Node& node = built.graph->node(built.output.node);
      if (node.n_outputs < 1 || node.n_outputs > Node::kMaxOutputs) {
        problems.push_back(c.str() + ": " + std::to_string(node.n_outputs) + " outputs");
      }
      if (const int i = updated_input(def); i >= 0) {
        const Ref in = node.inputs[static_cast<std::size_t>(i)];
        if (!(node.outputs[0] == built.graph->type(in))) {
          problems.push_back(c.str() + ": output 0 is " + node.outputs[0].str() +
                             ", not the type of the input that it updates");
        }
      }
      check_refusals(c, built, problems);
    } catch (const Error& e) {
      problems.push_back(c.str() + ": " + e.what());
    }
  }
  return problems;
}

}  // namespace nibble::registry
