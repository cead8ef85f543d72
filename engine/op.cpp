#include "engine/op.h"

#include <bit>

#include "engine/backend.h"

namespace nibble {

#define NIBBLE_OP(name) extern const OpDef name##_op;
#include "engine/ops.def"
#undef NIBBLE_OP

const OpDef& op_def(OpId op) {
  static const std::array<const OpDef*, static_cast<std::size_t>(OpId::count)> table = {
#define NIBBLE_OP(name) &name##_op,
#include "engine/ops.def"
#undef NIBBLE_OP
  };
  return *table[static_cast<std::size_t>(op)];
}

int updated_input(const OpDef& def) {
  return def.updates == 0 ? -1 : std::countr_zero(def.updates);
}

bool Backend::fuses(const Graph&, std::span<const std::int32_t>, std::int32_t) const {
  return false;
}

OpCall describe(const Graph& graph, std::int32_t id) {
  const Node& node = graph.node(id);
  OpCall call;
  call.node = &node;
  call.n_inputs = node.n_inputs;
  call.n_outputs = node.n_outputs;
  for (int i = 0; i < node.n_inputs; ++i) {
    call.in_types[static_cast<std::size_t>(i)] =
        graph.type(node.inputs[static_cast<std::size_t>(i)]);
  }
  for (int i = 0; i < node.n_outputs; ++i) {
    call.out_types[static_cast<std::size_t>(i)] = node.outputs[static_cast<std::size_t>(i)];
  }
  return call;
}

}  // namespace nibble
