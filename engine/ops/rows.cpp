// Some rows of a whole, so that ops may work on a part of the tokens at a time.
//
//   slice_rows  y = x[first .. first + count)        dx = dy in those rows, 0 elsewhere
//   add_rows    y = a, y[first .. first + R) += b    da = dy, db = dy[first .. first + R)
#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor slice_rows(Tensor x, std::int64_t first, std::int64_t count) {
  return check::graph_of(x, "slice_rows").emit(OpId::slice_rows, {x}, RowsParams{first, count});
}
Tensor add_rows(Tensor a, Tensor b, std::int64_t first) {
  const std::int64_t count = b && b.shape().rank() > 0 ? b.shape()[0] : 0;
  return check::graph_of(a, "add_rows").emit(OpId::add_rows, {a, b}, RowsParams{first, count});
}

namespace {

void check_range(const InferArgs& args, std::int64_t rows) {
  const auto p = args.node.get<RowsParams>();
  if (p.first >= 0 && p.count >= 0 && p.count <= rows - p.first) return;
  throw ShapeError(check::op_name(args) + ": rows " + std::to_string(p.first) + " to " +
                   std::to_string(p.first + p.count) + " are wanted, of " + std::to_string(rows));
}

void infer_slice(InferArgs& args) {
  check::count(args, 1);
  const TensorType& x = check::in(args, 0);
  const int rank = x.shape.rank();
  if (rank != 1 && rank != 2) check::fail(args, 0, "x", "rows, [T] or [T, channels]");
  if (x.dtype != DType::I32) check::activation_or_stat(args, 0, "x");
  check_range(args, x.shape[0]);
  const std::int64_t count = args.node.get<RowsParams>().count;
  args.outputs[0] = {x.dtype, rank == 1 ? Shape{count} : Shape{count, x.shape[1]}, {}};
}

void infer_add(InferArgs& args) {
  check::count(args, 2);
  check::rank(args, 0, "a", 2, "a matrix [rows, channels]");
  check::activation_or_stat(args, 0, "a");
  check::dtype(args, 1, "b", check::in(args, 0).dtype);
  const std::int64_t count = args.node.get<RowsParams>().count;
  check::shape(args, 1, "b", Shape{count, check::in(args, 0).shape[1]}, "rows like those of a");
  check_range(args, check::in(args, 0).shape[0]);
  args.outputs[0] = check::in(args, 0);
}

void vjp_slice(VjpArgs& args) {
  if (const Tensor dy = args.grad(0)) args.add_rows(0, dy, args.node().get<RowsParams>().first);
}

void vjp_add(VjpArgs& args) {
  const Tensor dy = args.grad(0);
  if (!dy) return;
  if (args.wants(0)) args.add(0, dy);
  const auto p = args.node().get<RowsParams>();
  if (args.wants(1)) args.add(1, slice_rows(dy, p.first, p.count));
}

// Elements before row `first` of a tensor like `type`.
std::size_t start(const ReferenceArgs& args) {
  const Shape& shape = args.in_types[0].shape;
  const std::int64_t cols = shape.rank() == 1 ? 1 : shape[1];
  return static_cast<std::size_t>(args.node.get<RowsParams>().first * cols);
}

void reference_slice(const ReferenceArgs& args) {
  for (std::size_t i = 0; i < args.out[0].size(); ++i) {
    args.out[0][i] = args.in[0][start(args) + i];
  }
}

void reference_add(const ReferenceArgs& args) {
  args.out[0] = args.in[0];
  for (std::size_t i = 0; i < args.in[1].size(); ++i) args.out[0][start(args) + i] += args.in[1][i];
}

using Role = Sample::Role;

Sample sample_slice(std::string_view label, Role role, Shape shape, std::int64_t first,
                    std::int64_t count) {
  return {label, {{role, shape}}, [=](Graph&, std::span<const Tensor> in) {
            return slice_rows(in[0], first, count);
          }};
}
std::vector<Sample> samples_slice() {
  Sample numbers = sample_slice("numbers", Role::index, {23}, 3, 17);
  numbers.inputs[0].indices = [](std::int64_t i) { return i * 7; };
  return {sample_slice("tiny", Role::activation, {5, 3}, 1, 3),
          sample_slice("all", Role::activation, {4, 8}, 0, 4),
          sample_slice("none", Role::activation, {4, 8}, 4, 0),
          sample_slice("statistics", Role::statistic, {9, 2}, 7, 2),
          numbers,
          sample_slice("several tasks", Role::activation, {9, 4112}, 2, 6)};
}

Sample sample_add(std::string_view label, Role role, Shape a, Shape b, std::int64_t first) {
  return {label, {{role, a}, {role, b}}, [=](Graph&, std::span<const Tensor> in) {
            return add_rows(in[0], in[1], first);
          }};
}
std::vector<Sample> samples_add() {
  return {sample_add("tiny", Role::activation, {5, 3}, {2, 3}, 1),
          sample_add("all", Role::activation, {4, 8}, {4, 8}, 0),
          sample_add("none", Role::activation, {4, 8}, {0, 8}, 4),
          sample_add("statistics", Role::statistic, {9, 2}, {2, 2}, 7),
          sample_add("several tasks", Role::activation, {9, 4112}, {6, 4112}, 2)};
}

}  // namespace

extern const OpDef slice_rows_op{.name = "slice_rows",
                                 .infer = infer_slice,
                                 .vjp = vjp_slice,
                                 .reference = reference_slice,
                                 .samples = samples_slice,
                                 .cheap = true};
extern const OpDef add_rows_op{.name = "add_rows",
                               .infer = infer_add,
                               .vjp = vjp_add,
                               .reference = reference_add,
                               .samples = samples_add,
                               .in_place = {0b01}};

}  // namespace nibble
