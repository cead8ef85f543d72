// A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685), and its gradients.
//
//   u = drop(x) A^T,  y = x W^T + scale * u B^T      W [out, in] frozen, A [r, in], B [out, r]
// With m[t,c] the dropout factor, 0 or 1/(1-p):
//   du = scale * dy B           (linear_dx)          dB += scale * dy^T u     (linear_dw)
//   dx = dy W + m * (du A)      (lora_linear_dx)     dA += du^T (m * x)       (lora_linear_da)
//
// One op, so that a backend can run [x | u] [W | scale B]^T as a single product. u is the second
// output because dB needs it, and stored on every rung: it is small, and without it the product
// with W would be repeated for nothing. y is computed from the rounded u, so a y recomputed from
// the stored u (lora_linear_y) is the same y. Dropout sits in front of A alone, as in the paper's
// code; its numbers are drawn anew wherever they are needed (engine/dropout.h).
#include "engine/dropout.h"
#include "engine/ops.h"
#include "engine/ops/check.h"
#include "engine/ops/round.h"

namespace nibble {

namespace {

// Emits with or without the two inputs that dropout adds.
Tensor emit(OpId op, std::string_view name, std::initializer_list<Tensor> inputs, float scale,
            const LoraDropout& dropout) {
  Graph& graph = check::graph_of(*inputs.begin(), name);
  std::array<Tensor, Node::kMaxInputs> all;
  std::size_t n = 0;
  for (const Tensor& input : inputs) all[n++] = input;
  if (dropout.p != 0) {
    all[n++] = dropout.rng;
    all[n++] = dropout.ordinal;
  }
  const LoraParams params{scale, dropout.p, dropout.adapter};
  std::array<std::byte, Node::kParamBytes> bytes{};
  std::memcpy(bytes.data(), &params, sizeof params);
  return graph.append(op, std::span<const Tensor>(all.data(), n), bytes);
}

}  // namespace

Tensor lora_linear(Tensor x, Tensor w, Tensor a, Tensor b, float scale,
                   const LoraDropout& dropout) {
  return emit(OpId::lora_linear, "lora_linear", {x, w, a, b}, scale, dropout);
}
Tensor lora_linear_y(Tensor x, Tensor w, Tensor u, Tensor b, float scale) {
  return emit(OpId::lora_linear_y, "lora_linear_y", {x, w, u, b}, scale, {});
}
Tensor lora_linear_dx(Tensor dy, Tensor w, Tensor du, Tensor a, const LoraDropout& dropout) {
  return emit(OpId::lora_linear_dx, "lora_linear_dx", {dy, w, du, a}, 1.0f, dropout);
}
Tensor lora_linear_da(Tensor acc, Tensor x, Tensor du, const LoraDropout& dropout) {
  return emit(OpId::lora_linear_da, "lora_linear_da", {acc, x, du}, 1.0f, dropout);
}

namespace {

// Checks the inputs from `first` on that dropout adds, for `rows` tokens.
void check_dropout(const InferArgs& args, int first, std::int64_t rows) {
  const float p = args.node.get<LoraParams>().dropout;
  if (!(p >= 0 && p < 1)) {
    throw ShapeError(check::op_name(args) + ": dropout is " + std::to_string(p) +
                     ", wanted 0 <= p < 1");
  }
  check::count(args, static_cast<std::size_t>(first + (p > 0 ? 2 : 0)));
  if (p == 0) return;
  check::dtype(args, first, "rng", DType::I64);
  check::shape(args, first, "rng", Shape{2}, "the seed and the optimizer step");
  check::dtype(args, first + 1, "ordinal", DType::I32);
  check::shape(args, first + 1, "ordinal", Shape{rows}, "one number per token");
}

void check_matrix(const InferArgs& args, int i, std::string_view input, const Shape& wanted,
                  std::string_view why) {
  check::weight(args, i, input);
  check::shape(args, i, input, wanted, why);
}

// The dimensions that inputs 2 and 3 or the outputs must agree on.
void check_inputs(const InferArgs& args, std::size_t wanted) {
  if (args.inputs.size() < wanted) check::count(args, wanted);
}

void infer(InferArgs& args) {
  check_inputs(args, 4);
  check::activation(args, 0, "x");
  const Shape& x = check::in(args, 0).shape;
  check::rank(args, 1, "w", 2, "a matrix [out, in]");
  check::rank(args, 2, "a", 2, "a matrix [rank, in]");
  const std::int64_t outer = check::in(args, 1).shape[0], rank = check::in(args, 2).shape[0];
  check_matrix(args, 1, "w", Shape{outer, x[1]}, "[out, in] with in = the channels of x");
  check_matrix(args, 2, "a", Shape{rank, x[1]}, "[rank, in] with in = the channels of x");
  check_matrix(args, 3, "b", Shape{outer, rank}, "[rows of w, rows of a]");
  check_dropout(args, 4, x[0]);
  args.outputs[0] = {args.compute, {x[0], outer}, {}};
  args.outputs[1] = {args.compute, {x[0], rank}, {}};
  args.n_outputs = 2;
}

void infer_y(InferArgs& args) {
  check::count(args, 4);
  check::activation(args, 0, "x");
  check::activation(args, 2, "u");
  const Shape& x = check::in(args, 0).shape;
  const Shape& u = check::in(args, 2).shape;
  check::shape(args, 2, "u", Shape{x[0], u[1]}, "as many rows as x");
  check::rank(args, 1, "w", 2, "a matrix [out, in]");
  const std::int64_t outer = check::in(args, 1).shape[0];
  check_matrix(args, 1, "w", Shape{outer, x[1]}, "[out, in] with in = the channels of x");
  check_matrix(args, 3, "b", Shape{outer, u[1]}, "[rows of w, channels of u]");
  args.outputs[0] = {args.compute, {x[0], outer}, {}};
}

Tensor recompute(Graph& graph, std::int32_t node, std::span<const Tensor> in) {
  const float scale = graph.node(node).get<LoraParams>().scale;
  return lora_linear_y(in[0], in[1], graph.tensor({node, 1}), in[3], scale);
}

void infer_dx(InferArgs& args) {
  check_inputs(args, 4);
  check::activation(args, 0, "dy");
  check::activation(args, 2, "du");
  const Shape& dy = check::in(args, 0).shape;
  const Shape& du = check::in(args, 2).shape;
  check::shape(args, 2, "du", Shape{dy[0], du[1]}, "as many rows as dy");
  check::rank(args, 1, "w", 2, "a matrix [out, in]");
  const std::int64_t inner = check::in(args, 1).shape[1];
  check_matrix(args, 1, "w", Shape{dy[1], inner}, "[out, in] with out = the channels of dy");
  check_matrix(args, 3, "a", Shape{du[1], inner}, "[channels of du, columns of w]");
  check_dropout(args, 4, dy[0]);
  args.outputs[0] = {args.compute, {dy[0], inner}, {}};
}

void infer_da(InferArgs& args) {
  check_inputs(args, 3);
  check::activation(args, 1, "x");
  check::activation(args, 2, "du");
  const Shape& x = check::in(args, 1).shape;
  const Shape& du = check::in(args, 2).shape;
  check::shape(args, 2, "du", Shape{x[0], du[1]}, "as many rows as x");
  check::statistic(args, 0, "acc", Shape{du[1], x[1]}, "[channels of du, channels of x]");
  check_dropout(args, 3, x[0]);
  args.outputs[0] = check::in(args, 0);
}

void vjp(VjpArgs& args) {
  const auto params = args.node().get<LoraParams>();
  Tensor dy = args.grad(0);
  const Tensor from_u = args.grad(1);  // only when something besides y reads u
  if (!dy && !from_u) return;
  if (!dy) dy = fill(args.graph(), args.node().outputs[0], 0);
  LoraDropout dropout;
  dropout.p = params.dropout;
  dropout.adapter = params.adapter;
  if (params.dropout > 0) {
    dropout.rng = args.in(4);
    dropout.ordinal = args.in(5);
  }
  for (const int i : {1, 2, 3}) {
    if (args.wants(i) && !args.is_parameter(i)) {
      throw ShapeError("lora_linear: input " + std::to_string(i) +
                       " is computed by an op; its gradient exists only for a parameter");
    }
  }
  Tensor du;
  if (args.wants(0) || args.wants(2)) {
    du = linear_dx(dy, args.in(3), params.scale);
    if (from_u) du = add(du, from_u);
  }
  // dx last: x, often read for the last time here, is gone by then.
  if (args.wants(2)) {
    args.accumulated(2, lora_linear_da(args.accumulator(2), args.in(0), du, dropout));
  }
  if (args.wants(1)) args.accumulated(1, linear_dw(args.accumulator(1), args.in(0), dy));
  if (args.wants(3)) {
    args.accumulated(3, linear_dw(args.accumulator(3), args.out(1), dy, params.scale));
  }
  if (args.wants(0)) args.add(0, lora_linear_dx(dy, args.in(1), du, args.in(2), dropout));
}

// m[t,c]: what dropout multiplies element (t, c) by. `first` is the input that holds rng.
double dropout_factor(const ReferenceArgs& args, std::size_t first, std::size_t t, std::size_t c) {
  const auto params = args.node.get<LoraParams>();
  if (params.dropout == 0) return 1;
  const DropoutKey key{static_cast<std::uint64_t>(static_cast<std::int64_t>(args.in[first][0])),
                       static_cast<std::uint32_t>(static_cast<std::int64_t>(args.in[first][1])),
                       static_cast<std::uint32_t>(params.adapter)};
  const auto ordinal = static_cast<std::uint32_t>(static_cast<std::int32_t>(args.in[first + 1][t]));
  const bool keep = dropout_keeps(key, ordinal, static_cast<std::int64_t>(c), params.dropout);
  return keep ? 1 / (1 - static_cast<double>(params.dropout)) : 0;
}

void reference(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto inner = static_cast<std::size_t>(args.in_types[0].shape[1]);
  const auto outer = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const auto rank = static_cast<std::size_t>(args.in_types[2].shape[0]);
  const double scale = args.node.get<LoraParams>().scale;
  const std::vector<double>&x = args.in[0], &w = args.in[1], &a = args.in[2], &b = args.in[3];
  std::vector<double>&y = args.out[0], &u = args.out[1];
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t c = 0; c < inner; ++c) {
      const double dropped = x[t * inner + c] * dropout_factor(args, 4, t, c);
      for (std::size_t j = 0; j < rank; ++j) u[t * rank + j] += dropped * a[j * inner + c];
    }
    for (std::size_t j = 0; j < rank; ++j) {
      u[t * rank + j] = rounded_to(args.out_types[1].dtype, u[t * rank + j]);
    }
    for (std::size_t n = 0; n < outer; ++n) {
      double sum = 0, low_rank = 0;
      for (std::size_t c = 0; c < inner; ++c) sum += x[t * inner + c] * w[n * inner + c];
      for (std::size_t j = 0; j < rank; ++j) low_rank += u[t * rank + j] * b[n * rank + j];
      y[t * outer + n] = sum + scale * low_rank;
    }
  }
}

void reference_y(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto inner = static_cast<std::size_t>(args.in_types[0].shape[1]);
  const auto outer = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const auto rank = static_cast<std::size_t>(args.in_types[2].shape[1]);
  const double scale = args.node.get<LoraParams>().scale;
  const std::vector<double>&x = args.in[0], &w = args.in[1], &u = args.in[2], &b = args.in[3];
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t n = 0; n < outer; ++n) {
      double sum = 0, low_rank = 0;
      for (std::size_t c = 0; c < inner; ++c) sum += x[t * inner + c] * w[n * inner + c];
      for (std::size_t j = 0; j < rank; ++j) low_rank += u[t * rank + j] * b[n * rank + j];
      args.out[0][t * outer + n] = sum + scale * low_rank;
    }
  }
}

void reference_dx(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto outer = static_cast<std::size_t>(args.in_types[0].shape[1]);
  const auto inner = static_cast<std::size_t>(args.in_types[1].shape[1]);
  const auto rank = static_cast<std::size_t>(args.in_types[3].shape[0]);
  const std::vector<double>&dy = args.in[0], &w = args.in[1], &du = args.in[2], &a = args.in[3];
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t c = 0; c < inner; ++c) {
      double sum = 0, low_rank = 0;
      for (std::size_t n = 0; n < outer; ++n) sum += dy[t * outer + n] * w[n * inner + c];
      for (std::size_t j = 0; j < rank; ++j) low_rank += du[t * rank + j] * a[j * inner + c];
      args.out[0][t * inner + c] = sum + dropout_factor(args, 4, t, c) * low_rank;
    }
  }
}

void reference_da(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const auto inner = static_cast<std::size_t>(args.in_types[1].shape[1]);
  const auto rank = static_cast<std::size_t>(args.in_types[2].shape[1]);
  const std::vector<double>&x = args.in[1], &du = args.in[2];
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t c = 0; c < inner; ++c) {
      const double dropped = x[t * inner + c] * dropout_factor(args, 3, t, c);
      for (std::size_t j = 0; j < rank; ++j) {
        args.out[0][j * inner + c] += du[t * rank + j] * dropped;
      }
    }
  }
}

using Role = Sample::Role;

struct Dims {
  std::int64_t rows, outer, inner, rank;
};

void add_dropout_inputs(std::vector<Sample::Input>& inputs, std::int64_t rows) {
  // A seed past 32 bits, a step, and ordinals as a later part of a batch has them.
  inputs.push_back({Role::counter, {2}, [](std::int64_t i) {
                      return i == 0 ? std::int64_t{0x1234567890} : std::int64_t{7};
                    }});
  inputs.push_back({Role::index, {rows}, [](std::int64_t i) { return 1000 + i; }});
}

LoraDropout dropout_of(float p, std::span<const Tensor> in, std::size_t first) {
  if (p == 0) return {};
  return {.p = p, .adapter = 3, .rng = in[first], .ordinal = in[first + 1]};
}

Sample sample(std::string_view label, Role adapter, float p, Dims d) {
  std::vector<Sample::Input> inputs = {{Role::activation, {d.rows, d.inner}},
                                       {Role::weight, {d.outer, d.inner}},
                                       {adapter, {d.rank, d.inner}},
                                       {adapter, {d.outer, d.rank}}};
  if (p > 0) add_dropout_inputs(inputs, d.rows);
  return {label, inputs,
          [p](Graph&, std::span<const Tensor> in) {
            return lora_linear(in[0], in[1], in[2], in[3], 0.5f, dropout_of(p, in, 4));
          },
          d.inner + d.rank};
}

std::vector<Sample> samples() {
  return {sample("tiny", Role::parameter, 0, {3, 4, 5, 2}),
          sample("tiny, dropout", Role::parameter, 0.25f, {4, 3, 7, 2}),
          sample("frozen adapter", Role::weight, 0, {5, 3, 6, 1}),
          sample("one row", Role::parameter, 0, {1, 33, 256, 16}),
          sample("edge tiles, dropout", Role::parameter, 0.1f, {67, 45, 160, 9}),
          sample("several chunks, dropout", Role::parameter, 0.5f, {1030, 19, 64, 8}),
          sample("short last chunk, dropout", Role::parameter, 0.1f, {543, 16, 1024, 4}),
          sample("many rows", Role::parameter, 0, {2049, 24, 72, 40}),
          sample("many rows, wide adapter", Role::parameter, 0, {2080, 16, 136, 72})};
}

Sample sample_y(std::string_view label, Dims d) {
  return {label,
          {{Role::activation, {d.rows, d.inner}},
           {Role::weight, {d.outer, d.inner}},
           {Role::activation, {d.rows, d.rank}},
           {Role::parameter, {d.outer, d.rank}}},
          [](Graph&, std::span<const Tensor> in) {
            return lora_linear_y(in[0], in[1], in[2], in[3], 0.5f);
          },
          d.inner + d.rank};
}

std::vector<Sample> samples_y() {
  return {sample_y("tiny", {3, 4, 5, 2}), sample_y("one row", {1, 33, 256, 16}),
          sample_y("edge tiles", {67, 45, 160, 9}), sample_y("whole packs", {130, 72, 128, 8})};
}

Sample sample_dx(std::string_view label, float p, Dims d) {
  std::vector<Sample::Input> inputs = {{Role::activation, {d.rows, d.outer}},
                                       {Role::weight, {d.outer, d.inner}},
                                       {Role::activation, {d.rows, d.rank}},
                                       {Role::parameter, {d.rank, d.inner}}};
  if (p > 0) add_dropout_inputs(inputs, d.rows);
  return {label, inputs,
          [p](Graph&, std::span<const Tensor> in) {
            return lora_linear_dx(in[0], in[1], in[2], in[3], dropout_of(p, in, 4));
          },
          d.outer + d.rank};
}

std::vector<Sample> samples_dx() {
  return {sample_dx("tiny", 0, {3, 4, 5, 2}), sample_dx("tiny, dropout", 0.25f, {4, 3, 7, 2}),
          sample_dx("edge tiles", 0, {67, 45, 256, 9}),
          sample_dx("several chunks, dropout", 0.1f, {1030, 19, 96, 8}),
          sample_dx("short last chunk, dropout", 0.1f, {543, 512, 32, 4})};
}

Sample sample_da(std::string_view label, float p, Dims d) {
  std::vector<Sample::Input> inputs = {{Role::state, {d.rank, d.inner}},
                                       {Role::activation, {d.rows, d.inner}},
                                       {Role::activation, {d.rows, d.rank}}};
  if (p > 0) add_dropout_inputs(inputs, d.rows);
  return {label, inputs,
          [p](Graph&, std::span<const Tensor> in) {
            return lora_linear_da(in[0], in[1], in[2], dropout_of(p, in, 3));
          },
          d.rows};
}

std::vector<Sample> samples_da() {
  return {sample_da("tiny", 0, {3, 0, 5, 2}),
          sample_da("tiny, dropout", 0.25f, {4, 0, 7, 2}),
          sample_da("one tile", 0, {512, 0, 70, 16}),
          sample_da("three tiles, dropout", 0.1f, {1025, 0, 70, 9}),
          sample_da("whole packs", 0, {1030, 0, 168, 40}),
          sample_da("wide adapter", 0, {600, 0, 136, 136})};
}

}  // namespace

extern const OpDef lora_linear_op{.name = "lora_linear",
                                  .infer = infer,
                                  .vjp = vjp,
                                  .reference = reference,
                                  .samples = samples,
                                  .stored = 0b10,
                                  .recompute = recompute};
extern const OpDef lora_linear_y_op{
    .name = "lora_linear_y", .infer = infer_y, .reference = reference_y, .samples = samples_y};
extern const OpDef lora_linear_dx_op{
    .name = "lora_linear_dx", .infer = infer_dx, .reference = reference_dx, .samples = samples_dx};
extern const OpDef lora_linear_da_op{.name = "lora_linear_da",
                                     .infer = infer_da,
                                     .reference = reference_da,
                                     .samples = samples_da,
                                     .updates = 0b001};

}  // namespace nibble
