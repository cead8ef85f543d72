// Cross-entropy of the logits of a linear layer, fused so that the logits [rows, vocabulary] exist
// for a chunk of rows at a time only.
//
//   z[r] = W x[row_r]        loss[r] = log sum_v exp z[r,v] - z[r, label_r]
//   dz[r,v] = exp(z[r,v]) / sum_u exp(z[r,u]) - [v = label_r]
//   dx[row_r] = dz[r] W      dW = sum over r of dz[r]^T x[row_r]
//
// row_r runs over loss_rows, the rows that have a label; -1 pads the list, and a row whose label is
// negative counts as padding. The upstream gradient of a sum of losses is a scalar, nearly always
// 1, so dx is computed while the logits are at hand and the gradient rule multiplies it. dW needs
// the logits once more: only full finetuning asks for it.
//
// The sum of the losses is formed in F64 in the order of loss_rows from the losses as they are
// returned. The idea: Liger kernels (arXiv 2410.10989), section 3.2.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor linear_cross_entropy(Tensor x, Tensor w, Tensor labels, Tensor loss_rows, bool keep_dx,
                            std::int64_t chunk_rows) {
  return x.graph->emit(OpId::linear_cross_entropy, {x, w, labels, loss_rows},
                       CrossEntropyParams{keep_dx ? 1 : 0, static_cast<std::int32_t>(chunk_rows)});
}
Tensor linear_cross_entropy_dw(Tensor acc, Tensor x, Tensor w, Tensor labels, Tensor loss_rows,
                               Tensor dloss, std::int64_t chunk_rows) {
  return acc.graph->emit(OpId::linear_cross_entropy_dw, {acc, x, w, labels, loss_rows, dloss},
                         CrossEntropyParams{0, static_cast<std::int32_t>(chunk_rows)});
}

namespace {

// x, w, labels and loss_rows are inputs first, first + 1, ...
void check_inputs(const InferArgs& args, int first) {
  const std::int32_t chunk_rows = args.node.get<CrossEntropyParams>().chunk_rows;
  if (chunk_rows < 0 || chunk_rows % 512 != 0) {
    throw ShapeError("linear_cross_entropy: chunks of " + std::to_string(chunk_rows) +
                     " rows; a multiple of 512 keeps every sum in its order");
  }
  check::activation(args, first, "x");
  check::rank(args, first + 1, "w", 2, "a matrix [vocabulary, channels]");
  check::weight(args, first + 1, "w");
  const Shape x = check::in(args, first).shape, w = check::in(args, first + 1).shape;
  if (w[0] == 0 || w[1] != x[1]) {
    check::fail(args, first + 1, "w", "some rows of " + std::to_string(x[1]) + " channels");
  }
  check::shape(args, first + 2, "labels", {x[0]}, "one per row of x");
  check::dtype(args, first + 2, "labels", DType::I32);
  check::rank(args, first + 3, "loss_rows", 1, "a vector [rows to score]");
  check::dtype(args, first + 3, "loss_rows", DType::I32);
}

void infer(InferArgs& args) {
  check::count(args, 4);
  check_inputs(args, 0);
  const DType stat = check::stat(args);
  args.outputs[0] = {stat, {1}, {}};
  args.outputs[1] = {stat, check::in(args, 3).shape, {}};
  args.outputs[2] = check::in(args, 0);
  args.n_outputs = args.node.get<CrossEntropyParams>().keep_dx != 0 ? 3 : 2;
}

void infer_dw(InferArgs& args) {
  check::count(args, 6);
  check_inputs(args, 1);
  check::statistic(args, 0, "acc", check::in(args, 2).shape, "the shape of w");
  check::statistic(args, 5, "dloss", {1}, "one number");
  args.outputs[0] = check::in(args, 0);
}

bool is_one(const Graph& graph, Tensor t) {
  const Node& node = graph.node(t.node);
  return node.kind == NodeKind::op && node.op == OpId::fill && node.get<FillParams>().value == 1.0;
}

void vjp(VjpArgs& args) {
  if (args.grad(1) || (args.node().n_outputs > 2 && args.grad(2))) {
    throw ShapeError(
        "linear_cross_entropy: only output 0, the sum of the losses, has a gradient; "
        "the loss must not depend on outputs 1 and 2");
  }
  const Tensor dloss = args.grad(0);
  if (!dloss) return;
  if (args.wants(0)) {
    if (args.node().get<CrossEntropyParams>().keep_dx == 0) {
      throw ShapeError("linear_cross_entropy: x needs a gradient; build the loss with keep_dx");
    }
    args.add(0, is_one(args.graph(), dloss) ? args.out(2) : scale(args.out(2), dloss));
  }
  if (!args.wants(1)) return;
  if (!args.is_parameter(1)) {
    throw ShapeError(
        "linear_cross_entropy: w is computed by an op; its gradient exists only for a parameter");
  }
  args.accumulated(1, linear_cross_entropy_dw(args.accumulator(1), args.in(0), args.in(1),
                                              args.in(2), args.in(3), dloss,
                                              args.node().get<CrossEntropyParams>().chunk_rows));
}

// One entry of loss_rows: its row of x, label, and softmax of the logits.
struct Scored {
  std::int64_t row, label;
  std::vector<double> p;
  double loss;
};

// False for padding. `first` is the index of x among the inputs.
bool score(const ReferenceArgs& args, std::size_t first, std::size_t entry, Scored& s) {
  const auto &x = args.in[first], &w = args.in[first + 1];
  const std::int64_t channels = args.in_types[first].shape[1];
  const std::int64_t vocabulary = args.in_types[first + 1].shape[0];
  s.row = static_cast<std::int64_t>(args.in[first + 3][entry]);
  if (s.row < 0) return false;
  s.label = static_cast<std::int64_t>(args.in[first + 2][static_cast<std::size_t>(s.row)]);
  if (s.label < 0) return false;
  s.p.assign(static_cast<std::size_t>(vocabulary), 0);
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    double& z = s.p[static_cast<std::size_t>(v)];
    for (std::int64_t c = 0; c < channels; ++c) {
      z += x[static_cast<std::size_t>(s.row * channels + c)] *
           w[static_cast<std::size_t>(v * channels + c)];
    }
    largest = std::max(largest, z);
  }
  for (const double z : s.p) sum += std::exp(z - largest);
  s.loss = largest + std::log(sum) - s.p[static_cast<std::size_t>(s.label)];
  for (double& z : s.p) z = std::exp(z - largest) / sum;
  return true;
}

void reference(const ReferenceArgs& args) {
  const std::int64_t channels = args.in_types[0].shape[1];
  Scored s;
  for (std::size_t entry = 0; entry < args.in[3].size(); ++entry) {
    if (!score(args, 0, entry, s)) continue;
    args.out[0][0] += s.loss;
    args.out[1][entry] = s.loss;
    if (args.out.size() < 3) continue;
    s.p[static_cast<std::size_t>(s.label)] -= 1;
    for (std::int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (std::size_t v = 0; v < s.p.size(); ++v) {
        sum += s.p[v] *
               args.in[1][v * static_cast<std::size_t>(channels) + static_cast<std::size_t>(c)];
      }
      args.out[2][static_cast<std::size_t>(s.row * channels + c)] = sum;
    }
  }
}

void reference_dw(const ReferenceArgs& args) {
  const auto channels = static_cast<std::size_t>(args.in_types[1].shape[1]);
  const double dloss = args.in[5][0];
  Scored s;
  for (std::size_t entry = 0; entry < args.in[4].size(); ++entry) {
    if (!score(args, 1, entry, s)) continue;
    s.p[static_cast<std::size_t>(s.label)] -= 1;
    for (std::size_t v = 0; v < s.p.size(); ++v) {
      for (std::size_t c = 0; c < channels; ++c) {
        args.out[0][v * channels + c] +=
            dloss * s.p[v] * args.in[1][static_cast<std::size_t>(s.row) * channels + c];
      }
    }
  }
}

using Role = Sample::Role;

struct Case {
  std::string_view label;
  std::int64_t rows, channels, vocabulary, entries;
  Role w;
  bool keep_dx;
  std::int64_t chunk_rows = 0;
};

// Every third row has no label and is left out of loss_rows; what is left over of loss_rows is
// padding.
std::int64_t label_of(std::int64_t t, std::int64_t vocabulary) {
  return t % 3 == 2 ? -100 : (t * 7 + 1) % vocabulary;
}
std::int64_t row_of(std::int64_t entry, std::int64_t rows) {
  const std::int64_t row = entry / 2 * 3 + entry % 2;
  return row < rows ? row : -1;
}

std::vector<Sample::Input> inputs(const Case& c) {
  const auto label = [v = c.vocabulary](std::int64_t t) { return label_of(t, v); };
  const auto row = [n = c.rows](std::int64_t entry) { return row_of(entry, n); };
  return {{Role::activation, {c.rows, c.channels}},
          {c.w, {c.vocabulary, c.channels}, {}, 1 / std::sqrt(static_cast<double>(c.channels))},
          {Role::index, {c.rows}, label},
          {Role::index, {c.entries}, row}};
}

std::vector<Sample> samples() {
  constexpr Case cases[] = {
      {"frozen head", 5, 4, 7, 4, Role::weight, true},
      {"trained head, padded", 4, 3, 5, 6, Role::parameter, true},
      {"evaluation", 7, 5, 11, 8, Role::weight, false},
      {"one row", 1, 33, 129, 1, Role::weight, true},
      {"stored head", 20, 256, 301, 14, Role::weight, true},
      {"two chunks of rows", 601, 24, 70, 410, Role::parameter, true},
      {"small chunks", 901, 24, 70, 600, Role::weight, true, 512},
  };
  std::vector<Sample> all;
  for (const Case& c : cases) {
    all.push_back({c.label, inputs(c),
                   [c](Graph&, std::span<const Tensor> in) {
                     return linear_cross_entropy(in[0], in[1], in[2], in[3], c.keep_dx,
                                                 c.chunk_rows);
                   },
                   c.vocabulary + c.channels + c.entries});
  }
  return all;
}

std::vector<Sample> samples_dw() {
  constexpr Case cases[] = {
      {"padded", 4, 3, 5, 6, Role::parameter, false},
      {"stored head", 20, 256, 301, 14, Role::weight, false},
      {"three tiles of rows", 1201, 24, 70, 820, Role::parameter, false},
      {"small chunks", 1201, 24, 70, 820, Role::parameter, false, 512},
  };
  std::vector<Sample> all;
  for (const Case& c : cases) {
    std::vector<Sample::Input> in = inputs(c);
    in.insert(in.begin(), {Role::state, {c.vocabulary, c.channels}});
    in.push_back({Role::statistic, {1}});
    all.push_back({c.label, std::move(in),
                   [c](Graph&, std::span<const Tensor> t) {
                     return linear_cross_entropy_dw(t[0], t[1], t[2], t[3], t[4], t[5],
                                                    c.chunk_rows);
                   },
                   c.entries + c.channels + c.vocabulary});
  }
  return all;
}

}  // namespace

extern const OpDef linear_cross_entropy_op{.name = "linear_cross_entropy",
                                           .infer = infer,
                                           .vjp = vjp,
                                           .reference = reference,
                                           .samples = samples};
extern const OpDef linear_cross_entropy_dw_op{.name = "linear_cross_entropy_dw",
                                              .infer = infer_dw,
                                              .reference = reference_dw,
                                              .samples = samples_dw,
                                              .updates = 0b001};

}  // namespace nibble
