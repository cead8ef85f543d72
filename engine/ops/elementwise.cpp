// The elementwise ops without weights.
//
//   add         y = a + b                 da = dy, db = dy
//   scale       y = x * factor[0]         dx = dy * factor[0]; the factor is a constant
//   fill        y = value                 no inputs
//   accumulate  acc = acc + x             an update, not differentiable
//   convert     target = x in another floating point type; an update, not differentiable
#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor add(Tensor a, Tensor b) { return check::graph_of(a, "add").emit(OpId::add, {a, b}); }
Tensor scale(Tensor x, Tensor factor) {
  return check::graph_of(x, "scale").emit(OpId::scale, {x, factor});
}
Tensor accumulate(Tensor acc, Tensor x) {
  return check::graph_of(acc, "accumulate").emit(OpId::accumulate, {acc, x});
}
Tensor convert(Tensor target, Tensor x) {
  return check::graph_of(target, "convert").emit(OpId::convert, {target, x});
}

Tensor fill(Graph& graph, const TensorType& type, double value) {
  FillParams params{value, {}, type.shape.rank(), type.dtype};
  for (int i = 0; i < params.rank; ++i) params.extents[static_cast<std::size_t>(i)] = type.shape[i];
  return graph.emit(OpId::fill, {}, params);
}

namespace {

void infer_add(InferArgs& args) {
  check::count(args, 2);
  check::activation_or_stat(args, 0, "a");
  check::dtype(args, 1, "b", check::in(args, 0).dtype);
  check::shape(args, 1, "b", check::in(args, 0).shape, "the shape of a");
  args.outputs[0] = check::in(args, 0);
}

void infer_scale(InferArgs& args) {
  check::count(args, 2);
  check::activation_or_stat(args, 0, "x");
  check::statistic(args, 1, "factor", Shape{1}, "one number");
  args.outputs[0] = check::in(args, 0);
}

void infer_fill(InferArgs& args) {
  check::count(args, 0);
  const auto p = args.node.get<FillParams>();
  if (p.dtype != DType::F64 && p.dtype != DType::F32 && p.dtype != DType::BF16) {
    throw ShapeError("fill: the type is " + std::string(name(p.dtype)) +
                     ", wanted F64, F32 or BF16");
  }
  const auto& e = p.extents;
  const Shape shape = p.rank == 0   ? Shape{}
                      : p.rank == 1 ? Shape{e[0]}
                      : p.rank == 2 ? Shape{e[0], e[1]}
                      : p.rank == 3 ? Shape{e[0], e[1], e[2]}
                                    : Shape{e[0], e[1], e[2], e[3]};
  args.outputs[0] = {p.dtype, shape, {}};
}

void infer_accumulate(InferArgs& args) {
  check::count(args, 2);
  check::activation_or_stat(args, 1, "x");
  check::statistic(args, 0, "acc", check::in(args, 1).shape, "the shape of x");
  args.outputs[0] = check::in(args, 0);
}

void infer_convert(InferArgs& args) {
  check::count(args, 2);
  for (const int i : {0, 1}) {
    const DType d = check::in(args, i).dtype;
    if (d != DType::F64 && d != DType::F32 && d != DType::BF16) {
      check::fail(args, i, i == 0 ? "target" : "x", "elements of F64, F32 or BF16");
    }
  }
  check::shape(args, 0, "target", check::in(args, 1).shape, "the shape of x");
  args.outputs[0] = check::in(args, 0);
}

void vjp_add(VjpArgs& args) {
  const Tensor dy = args.grad(0);
  if (!dy) return;
  if (args.wants(0)) args.add(0, dy);
  if (args.wants(1)) args.add(1, dy);
}

void vjp_scale(VjpArgs& args) {
  if (args.wants(1)) {
    throw ShapeError("scale: the factor needs a gradient, wanted a constant or an input");
  }
  const Tensor dy = args.grad(0);
  if (dy && args.wants(0)) args.add(0, scale(dy, args.in(1)));
}

void reference_add(const ReferenceArgs& args) {
  for (std::size_t i = 0; i < args.out[0].size(); ++i) {
    args.out[0][i] = args.in[0][i] + args.in[1][i];
  }
}

void reference_scale(const ReferenceArgs& args) {
  for (std::size_t i = 0; i < args.out[0].size(); ++i) {
    args.out[0][i] = args.in[0][i] * args.in[1][0];
  }
}

void reference_fill(const ReferenceArgs& args) {
  for (double& v : args.out[0]) v = args.node.get<FillParams>().value;
}

void reference_accumulate(const ReferenceArgs& args) {
  for (std::size_t i = 0; i < args.out[0].size(); ++i) args.out[0][i] += args.in[1][i];
}

void reference_convert(const ReferenceArgs& args) { args.out[0] = args.in[1]; }

using Role = Sample::Role;

Sample sample_add(std::string_view label, Role role, Shape shape) {
  return {label, {{role, shape}, {role, shape}}, [](Graph&, std::span<const Tensor> in) {
            return add(in[0], in[1]);
          }};
}
std::vector<Sample> samples_add() {
  return {sample_add("tiny", Role::activation, {3, 5}),
          sample_add("statistics", Role::statistic, {7}),
          {"a value and itself",
           {{Role::activation, {5, 3}}},
           [](Graph&, std::span<const Tensor> in) { return add(in[0], in[0]); }},
          sample_add("several tasks", Role::activation, {3, 4111})};
}

Sample sample_scale(std::string_view label, Role role, Shape shape) {
  return {label, {{role, shape}, {Role::constant, {1}}}, [](Graph&, std::span<const Tensor> in) {
            return scale(in[0], in[1]);
          }};
}
std::vector<Sample> samples_scale() {
  return {sample_scale("tiny", Role::activation, {3, 5}),
          sample_scale("statistics", Role::statistic, {7}),
          sample_scale("several tasks", Role::activation, {3, 4111})};
}

std::vector<Sample> samples_fill() {
  return {{"compute dtype",
           {},
           [](Graph& g, std::span<const Tensor>) {
             return fill(g, {g.compute(), {3, 4111}, {}}, 0.75);
           }},
          {"statistic",
           {},
           [](Graph& g, std::span<const Tensor>) {
             return fill(g, {g.accumulate(), {1}, {}}, -1.1);
           }},
          {"four extents", {}, [](Graph& g, std::span<const Tensor>) {
             return fill(g, {g.compute(), {2, 3, 1, 5}, {}}, 0);
           }}};
}

Sample sample_accumulate(std::string_view label, Role x, Shape shape) {
  return {label, {{Role::state, shape}, {x, shape}}, [](Graph&, std::span<const Tensor> in) {
            return accumulate(in[0], in[1]);
          }};
}
std::vector<Sample> samples_accumulate() {
  return {sample_accumulate("tiny", Role::activation, {3, 5}),
          sample_accumulate("statistics", Role::statistic, {7}),
          sample_accumulate("several tasks", Role::activation, {3, 4111})};
}

Sample sample_convert(std::string_view label, Role target, Role x, Shape shape) {
  return {label, {{target, shape}, {x, shape}}, [](Graph&, std::span<const Tensor> in) {
            return convert(in[0], in[1]);
          }};
}
std::vector<Sample> samples_convert() {
  return {sample_convert("master to copy", Role::cache, Role::statistic, {3, 4111}),
          sample_convert("copy to master", Role::state, Role::activation, {7, 5}),
          sample_convert("from F64", Role::cache, Role::total, {9})};
}

}  // namespace

extern const OpDef add_op{.name = "add",
                          .infer = infer_add,
                          .vjp = vjp_add,
                          .reference = reference_add,
                          .samples = samples_add,
                          .in_place = {0b11}};
extern const OpDef scale_op{.name = "scale",
                            .infer = infer_scale,
                            .vjp = vjp_scale,
                            .reference = reference_scale,
                            .samples = samples_scale,
                            .in_place = {0b01}};
extern const OpDef fill_op{
    .name = "fill", .infer = infer_fill, .reference = reference_fill, .samples = samples_fill};
extern const OpDef accumulate_op{.name = "accumulate",
                                 .infer = infer_accumulate,
                                 .reference = reference_accumulate,
                                 .samples = samples_accumulate,
                                 .updates = 0b01};
extern const OpDef convert_op{.name = "convert",
                              .infer = infer_convert,
                              .reference = reference_convert,
                              .samples = samples_convert,
                              .updates = 0b01};

}  // namespace nibble
