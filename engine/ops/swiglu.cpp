// The gated unit of llama's feed-forward layer, SwiGLU (arXiv 2002.05202), and its gradient.
//
//   y = g * s * u          with s = sigmoid(g), g the gate and u the up projection
//   dg = dy * u * s * (1 + g * (1 - s))          du = dy * g * s
// 1 - s is sigmoid(-g): the difference of nearly equal numbers would be multiplied by a large g.
#include <cmath>

#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor swiglu(Tensor gate, Tensor up) {
  return check::graph_of(gate, "swiglu").emit(OpId::swiglu, {gate, up});
}
Tensor swiglu_backward(Tensor gate, Tensor up, Tensor dy) {
  return check::graph_of(gate, "swiglu_backward").emit(OpId::swiglu_backward, {gate, up, dy});
}

namespace {

void infer(InferArgs& args) {
  check::count(args, 2);
  check::dtype(args, 0, "gate", args.compute);
  check::activation_like(args, 1, "up", check::in(args, 0).shape, "the shape of gate");
  args.outputs[0] = check::in(args, 0);
}

void infer_backward(InferArgs& args) {
  check::count(args, 3);
  check::dtype(args, 0, "gate", args.compute);
  check::activation_like(args, 1, "up", check::in(args, 0).shape, "the shape of gate");
  check::activation_like(args, 2, "dy", check::in(args, 0).shape, "the shape of gate");
  args.outputs[0] = args.outputs[1] = check::in(args, 0);
  args.n_outputs = 2;
}

void vjp(VjpArgs& args) {
  const Tensor dy = args.grad(0);
  if (!dy || (!args.wants(0) && !args.wants(1))) return;
  const Tensor dgate = swiglu_backward(args.in(0), args.in(1), dy);
  if (args.wants(0)) args.add(0, dgate);
  if (args.wants(1)) args.add(1, args.graph().output_of(dgate, 1));
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void reference(const ReferenceArgs& args) {
  const std::vector<double>&gate = args.in[0], &up = args.in[1];
  for (std::size_t i = 0; i < gate.size(); ++i) {
    args.out[0][i] = gate[i] * sigmoid(gate[i]) * up[i];
  }
}

void reference_backward(const ReferenceArgs& args) {
  const std::vector<double>&gate = args.in[0], &up = args.in[1], &dy = args.in[2];
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double s = sigmoid(gate[i]);
    args.out[0][i] = dy[i] * up[i] * s * (1 + gate[i] * sigmoid(-gate[i]));
    args.out[1][i] = dy[i] * gate[i] * s;
  }
}

using Role = Sample::Role;

Sample sample(std::string_view label, Shape shape, double gate_scale) {
  return {label,
          {{Role::activation, shape, {}, gate_scale}, {Role::activation, shape}},
          [](Graph&, std::span<const Tensor> in) { return swiglu(in[0], in[1]); }};
}

std::vector<Sample> samples() {
  return {sample("tiny", {3, 5}, 1), sample("flat", {7}, 2),
          sample("saturated gates", {13, 37}, 60), sample("several tasks", {9, 1537}, 3)};
}

Sample sample_backward(std::string_view label, Shape shape, double gate_scale) {
  return {label,
          {{Role::activation, shape, {}, gate_scale},
           {Role::activation, shape},
           {Role::activation, shape}},
          [](Graph&, std::span<const Tensor> in) { return swiglu_backward(in[0], in[1], in[2]); }};
}

std::vector<Sample> samples_backward() {
  return {sample_backward("tiny", {3, 5}, 1), sample_backward("saturated gates", {13, 37}, 60),
          sample_backward("several tasks", {9, 1537}, 3)};
}

}  // namespace

extern const OpDef swiglu_op{.name = "swiglu",
                             .infer = infer,
                             .vjp = vjp,
                             .reference = reference,
                             .samples = samples,
                             .in_place = {0b11},
                             .cheap = true};
extern const OpDef swiglu_backward_op{.name = "swiglu_backward",
                                      .infer = infer_backward,
                                      .reference = reference_backward,
                                      .samples = samples_backward,
                                      .in_place = {0b111, 0b111}};

}  // namespace nibble
