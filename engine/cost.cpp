#include "engine/cost.h"

namespace nibble {
namespace {

double elements(const TensorType& type) { return static_cast<double>(type.elements()); }
const TensorType& in(const OpCall& call, int i) {
  return call.in_types[static_cast<std::size_t>(i)];
}

// Of the products alone; everything else is limited by its bytes.
double flops(const OpCall& call, double average_span) {
  const double rows = in(call, 0).shape.rank() > 0 ? static_cast<double>(in(call, 0).shape[0]) : 0;
  switch (call.node->op) {
    case OpId::linear:
    case OpId::linear_dx:
      return 2 * rows * elements(in(call, 1));
    case OpId::linear_dw:
    case OpId::lora_linear_da:
      return 2 * static_cast<double>(in(call, 1).shape[0]) * elements(in(call, 0));
    case OpId::lora_linear:
      return 2 * rows * (elements(in(call, 1)) + elements(in(call, 2)) + elements(in(call, 3)));
    case OpId::lora_linear_y:
    case OpId::lora_linear_dx:
      return 2 * rows * (elements(in(call, 1)) + elements(in(call, 3)));
    case OpId::attention:  // two products over half of the span's square
      return 2 * elements(in(call, 0)) * average_span;
    case OpId::attention_backward:
      return 5 * elements(in(call, 0)) * average_span;
    case OpId::attention_cached:
      return 4 * elements(in(call, 0)) * static_cast<double>(in(call, 1).shape[1]);
    case OpId::linear_cross_entropy:
      return (call.n_outputs > 2 ? 4 : 2) * static_cast<double>(in(call, 3).shape[0]) *
             elements(in(call, 1));
    case OpId::linear_cross_entropy_dw:
      return 4 * static_cast<double>(in(call, 4).shape[0]) * elements(in(call, 2));
    default:
      return 0;
  }
}

// Of an input, as far as it is read.
double bytes_read(const OpCall& call, int i) {
  const OpId op = call.node->op;
  const bool some_rows = (op == OpId::embedding && i == 1) || op == OpId::slice_rows;
  return static_cast<double>(bytes(some_rows ? call.out_types[0] : in(call, i)));
}

}  // namespace

OpCost op_cost(const OpCall& call, double average_span) {
  OpCost cost;
  cost.flops = flops(call, average_span);
  if (call.node->op == OpId::add_rows) {  // in place
    cost.bytes = 3 * bytes_read(call, 1);
    return cost;
  }
  for (int i = 0; i < call.n_inputs; ++i) {
    const bool written = (op_def(call.node->op).also_writes >> i & 1) != 0;
    cost.bytes += (written ? 2 : 1) * bytes_read(call, i);
  }
  for (int i = 0; i < call.n_outputs; ++i) {
    cost.bytes += static_cast<double>(bytes(call.out_types[static_cast<std::size_t>(i)]));
  }
  return cost;
}

}  // namespace nibble
