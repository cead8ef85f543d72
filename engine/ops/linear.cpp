// A linear layer with a weight in any storage format, and its two gradients.
//
//   y = scale * x W^T        x [T, in], W [out, in], y [T, out]
//   dx = scale * dy W        dW += scale * dy^T x
//
// The gradient with respect to x is a product with the same stored weight, so a quantized frozen
// weight is as differentiable in x as a dense one (QLoRA, arXiv 2305.14314, section 3). y may be a
// statistic (F32): the logits, whose differences a BF16 result would lose.
#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor linear(Tensor x, Tensor w, float scale) {
  Graph& graph = check::graph_of(x, "linear");
  return graph.emit(OpId::linear, {x, w}, LinearParams{scale, graph.compute()});
}
Tensor linear_stat(Tensor x, Tensor w) {
  Graph& graph = check::graph_of(x, "linear");
  return graph.emit(OpId::linear, {x, w}, LinearParams{1.0f, graph.accumulate()});
}
Tensor linear_dx(Tensor dy, Tensor w, float scale) {
  Graph& graph = check::graph_of(dy, "linear_dx");
  return graph.emit(OpId::linear_dx, {dy, w}, LinearParams{scale, graph.compute()});
}
Tensor linear_dw(Tensor acc, Tensor x, Tensor dy, float scale) {
  Graph& graph = check::graph_of(acc, "linear_dw");
  return graph.emit(OpId::linear_dw, {acc, x, dy}, LinearParams{scale, graph.accumulate()});
}

namespace {

void check_weight(const InferArgs& args, int i) {
  check::weight(args, i, "w");
  check::rank(args, i, "w", 2, "a matrix [out, in]");
}

void infer(InferArgs& args) {
  check::count(args, 2);
  check::activation(args, 0, "x");
  check_weight(args, 1);
  const Shape& x = check::in(args, 0).shape;
  const Shape& w = check::in(args, 1).shape;
  check::shape(args, 1, "w", Shape{w[0], x[1]}, "[out, in] with in = the channels of x");
  const DType out = args.node.get<LinearParams>().out;
  if (out != args.compute && out != check::stat(args)) {
    throw ShapeError("linear: y is to be " + std::string(name(out)) + ", wanted " +
                     std::string(name(args.compute)) + " or " +
                     std::string(name(check::stat(args))));
  }
  args.outputs[0] = {out, {x[0], w[0]}, {}};
}

void infer_dx(InferArgs& args) {
  check::count(args, 2);
  check::rank(args, 0, "dy", 2, "a matrix [rows, out]");
  check::activation_or_stat(args, 0, "dy");
  check_weight(args, 1);
  const Shape& dy = check::in(args, 0).shape;
  const Shape& w = check::in(args, 1).shape;
  check::shape(args, 1, "w", Shape{dy[1], w[1]}, "[out, in] with out = the channels of dy");
  args.outputs[0] = {args.compute, {dy[0], w[1]}, {}};
}

void infer_dw(InferArgs& args) {
  check::count(args, 3);
  check::activation(args, 1, "x");
  check::rank(args, 2, "dy", 2, "a matrix [rows, out]");
  check::activation_or_stat(args, 2, "dy");
  const Shape& x = check::in(args, 1).shape;
  const Shape& dy = check::in(args, 2).shape;
  check::shape(args, 2, "dy", Shape{x[0], dy[1]}, "as many rows as x");
  check::statistic(args, 0, "acc", Shape{dy[1], x[1]}, "[channels of dy, channels of x]");
  args.outputs[0] = check::in(args, 0);
}

void vjp(VjpArgs& args) {
  const float scale = args.node().get<LinearParams>().scale;
  const Tensor dy = args.grad(0);
  if (!dy) return;
  if (args.wants(1) && !args.is_parameter(1)) {
    throw ShapeError("linear: w is computed by an op; its gradient exists only for a parameter");
  }
  // dx last: x, often read for the last time here, is gone by then.
  if (args.wants(1)) args.accumulated(1, linear_dw(args.accumulator(1), args.in(0), dy, scale));
  if (args.wants(0)) args.add(0, linear_dx(dy, args.in(1), scale));
}

void reference(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto inner = static_cast<std::size_t>(args.in_types[0].shape[1]);
  const auto outer = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const double scale = args.node.get<LinearParams>().scale;
  const std::vector<double>&x = args.in[0], &w = args.in[1];
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t n = 0; n < outer; ++n) {
      double sum = 0;
      for (std::size_t k = 0; k < inner; ++k) sum += x[t * inner + k] * w[n * inner + k];
      args.out[0][t * outer + n] = scale * sum;
    }
  }
}

void reference_dx(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto outer = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const auto inner = static_cast<std::size_t>(args.in_types[1].shape[1]);
  const double scale = args.node.get<LinearParams>().scale;
  const std::vector<double>&dy = args.in[0], &w = args.in[1];
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t k = 0; k < inner; ++k) {
      double sum = 0;
      for (std::size_t n = 0; n < outer; ++n) sum += dy[t * outer + n] * w[n * inner + k];
      args.out[0][t * inner + k] = scale * sum;
    }
  }
}

void reference_dw(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const auto inner = static_cast<std::size_t>(args.in_types[1].shape[1]);
  const auto outer = static_cast<std::size_t>(args.in_types[2].shape[1]);
  const double scale = args.node.get<LinearParams>().scale;
  const std::vector<double>&x = args.in[1], &dy = args.in[2];
  for (std::size_t n = 0; n < outer; ++n) {
    for (std::size_t k = 0; k < inner; ++k) {
      double sum = 0;
      for (std::size_t t = 0; t < rows; ++t) sum += dy[t * outer + n] * x[t * inner + k];
      args.out[0][n * inner + k] += scale * sum;
    }
  }
}

using Role = Sample::Role;

Sample sample(std::string_view label, Role w, std::int64_t rows, std::int64_t outer,
              std::int64_t inner) {
  return {label,
          {{Role::activation, {rows, inner}}, {w, {outer, inner}}},
          [](Graph&, std::span<const Tensor> in) { return linear(in[0], in[1], 0.5f); },
          inner};
}

Sample logits(std::string_view label, Role w, std::int64_t rows, std::int64_t outer,
              std::int64_t inner) {
  return {label,
          {{Role::activation, {rows, inner}}, {w, {outer, inner}}},
          [](Graph&, std::span<const Tensor> in) { return linear_stat(in[0], in[1]); },
          inner};
}

std::vector<Sample> samples() {
  return {sample("frozen", Role::weight, 3, 4, 5),
          sample("trained", Role::parameter, 5, 3, 7),
          logits("logits, trained", Role::parameter, 2, 9, 4),
          sample("one row", Role::weight, 1, 70, 256),
          sample("edge tiles", Role::weight, 67, 97, 320),
          logits("logits", Role::weight, 19, 131, 64),
          sample("trained, three tiles", Role::parameter, 1030, 21, 18)};
}

Sample sample_dx(std::string_view label, std::int64_t rows, std::int64_t outer,
                 std::int64_t inner) {
  return {label,
          {{Role::activation, {rows, outer}}, {Role::weight, {outer, inner}}},
          [](Graph&, std::span<const Tensor> in) { return linear_dx(in[0], in[1], 0.5f); },
          outer};
}

std::vector<Sample> samples_dx() {
  return {sample_dx("odd", 3, 4, 5),
          sample_dx("one row", 1, 70, 256),
          sample_dx("edge tiles", 67, 97, 320),
          sample_dx("many rows, narrow", 2049, 136, 40),
          {"from a statistic",
           {{Role::statistic, {13, 33}}, {Role::weight, {33, 32}}},
           [](Graph&, std::span<const Tensor> in) { return linear_dx(in[0], in[1]); },
           33}};
}

Sample sample_dw(std::string_view label, Role dy, std::int64_t rows, std::int64_t outer,
                 std::int64_t inner) {
  return {label,
          {{Role::state, {outer, inner}}, {Role::activation, {rows, inner}}, {dy, {rows, outer}}},
          [](Graph&, std::span<const Tensor> in) { return linear_dw(in[0], in[1], in[2], 0.5f); },
          rows};
}

std::vector<Sample> samples_dw() {
  return {sample_dw("odd", Role::activation, 3, 4, 5),
          sample_dw("one tile", Role::activation, 512, 17, 33),
          sample_dw("three tiles", Role::activation, 1025, 16, 70),
          sample_dw("whole packs", Role::activation, 1030, 168, 40),
          sample_dw("very wide", Role::activation, 70, 8512, 40),
          sample_dw("from a statistic", Role::statistic, 513, 37, 9)};
}

}  // namespace

extern const OpDef linear_op{
    .name = "linear", .infer = infer, .vjp = vjp, .reference = reference, .samples = samples};
extern const OpDef linear_dx_op{
    .name = "linear_dx", .infer = infer_dx, .reference = reference_dx, .samples = samples_dx};
extern const OpDef linear_dw_op{.name = "linear_dw",
                                .infer = infer_dw,
                                .reference = reference_dw,
                                .samples = samples_dw,
                                .updates = 0b001};

}  // namespace nibble
