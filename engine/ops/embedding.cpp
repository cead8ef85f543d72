// Rows of a table, picked by number, and the gradient of the table.
//
//   y[t] = table[ids[t]]            dtable[v] = sum over t with ids[t] = v of dy[t]
//
// The sum runs over t in ascending order, so that splitting the rows of a step between several
// runs changes nothing. A trainable table adds into its accumulator in place; a table that is an
// activation (rows picked out of a sequence) gets a gradient of its own, cleared first.
#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor embedding(Tensor ids, Tensor table) {
  return table.graph->emit(OpId::embedding, {ids, table}, EmbeddingParams{table.graph->compute()});
}
Tensor embedding_dw(Tensor acc, Tensor ids, Tensor dy) {
  return acc.graph->emit(OpId::embedding_dw, {acc, ids, dy});
}

namespace {

void check_ids(const InferArgs& args, int i) {
  check::rank(args, i, "ids", 1, "a vector [rows]");
  check::dtype(args, i, "ids", DType::I32);
}

void infer(InferArgs& args) {
  check::count(args, 2);
  check_ids(args, 0);
  check::rank(args, 1, "table", 2, "a matrix [entries, channels]");
  check::weight(args, 1, "table");
  args.outputs[0] = {args.node.get<EmbeddingParams>().out,
                     {check::in(args, 0).shape[0], check::in(args, 1).shape[1]},
                     {}};
}

void infer_dw(InferArgs& args) {
  check::count(args, 3);
  check_ids(args, 1);
  check::rank(args, 0, "acc", 2, "a matrix [entries, channels]");
  check::dtype(args, 0, "acc", check::stat(args));
  check::activation_like(args, 2, "dy", {check::in(args, 1).shape[0], check::in(args, 0).shape[1]},
                         "a row per id and the channels of acc");
  args.outputs[0] = check::in(args, 0);
}

void vjp(VjpArgs& args) {
  const Tensor dy = args.grad(0);
  if (!dy || !args.wants(1)) return;
  if (args.is_parameter(1)) {
    args.accumulated(1, embedding_dw(args.accumulator(1), args.in(0), dy));
    return;
  }
  Graph& graph = args.graph();
  const TensorType table = graph.type(args.node().inputs[1]);
  const Tensor zero = fill(graph, {graph.accumulate(), table.shape, {}}, 0);
  const Tensor sum = embedding_dw(zero, args.in(0), dy);
  args.add(1, table.dtype == sum.dtype() ? sum : convert(fill(graph, table, 0), sum));
}

void reference(const ReferenceArgs& args) {
  const std::int64_t rows = args.out_types[0].shape[0], channels = args.out_types[0].shape[1];
  for (std::int64_t t = 0; t < rows; ++t) {
    const auto id = static_cast<std::int64_t>(args.in[0][static_cast<std::size_t>(t)]);
    for (std::int64_t c = 0; c < channels; ++c) {
      args.out[0][static_cast<std::size_t>(t * channels + c)] =
          args.in[1][static_cast<std::size_t>(id * channels + c)];
    }
  }
}

void reference_dw(const ReferenceArgs& args) {
  const std::int64_t rows = args.in_types[2].shape[0], channels = args.in_types[2].shape[1];
  for (std::int64_t t = 0; t < rows; ++t) {
    const auto id = static_cast<std::int64_t>(args.in[1][static_cast<std::size_t>(t)]);
    for (std::int64_t c = 0; c < channels; ++c) {
      args.out[0][static_cast<std::size_t>(id * channels + c)] +=
          args.in[2][static_cast<std::size_t>(t * channels + c)];
    }
  }
}

using Role = Sample::Role;

Sample sample(std::string_view label, Role table, std::int64_t rows, std::int64_t entries,
              std::int64_t channels) {
  // Ids repeat and skip entries.
  const auto ids = [entries](std::int64_t t) { return (t * t + 1) % entries; };
  return {label,
          {{Role::index, {rows}, ids}, {table, {entries, channels}}},
          [](Graph&, std::span<const Tensor> in) { return embedding(in[0], in[1]); },
          rows};
}

std::vector<Sample> samples() {
  return {sample("trained table", Role::parameter, 7, 5, 6),
          sample("rows of an activation", Role::activation, 4, 6, 5),
          sample("one row", Role::parameter, 1, 3, 7),
          sample("stored table", Role::weight, 37, 19, 256),
          sample("stored table, odd width", Role::weight, 5, 9, 33),
          sample("many rows", Role::parameter, 1025, 131, 65)};
}

Sample sample_dw(std::string_view label, std::int64_t rows, std::int64_t entries,
                 std::int64_t channels) {
  const auto ids = [entries](std::int64_t t) { return (t * t + 1) % entries; };
  return {label,
          {{Role::state, {entries, channels}},
           {Role::index, {rows}, ids},
           {Role::activation, {rows, channels}}},
          [](Graph&, std::span<const Tensor> in) { return embedding_dw(in[0], in[1], in[2]); },
          rows};
}

std::vector<Sample> samples_dw() {
  return {sample_dw("odd", 7, 5, 3), sample_dw("one entry", 9, 1, 33),
          sample_dw("several tiles of rows", 1025, 61, 130)};
}

}  // namespace

extern const OpDef embedding_op{
    .name = "embedding", .infer = infer, .vjp = vjp, .reference = reference, .samples = samples};
extern const OpDef embedding_dw_op{.name = "embedding_dw",
                                   .infer = infer_dw,
                                   .reference = reference_dw,
                                   .samples = samples_dw,
                                   .updates = 0b001};

}  // namespace nibble
