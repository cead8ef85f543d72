// Causal attention within documents, and its gradient (FlashAttention-2, arXiv 2307.08691, for
// the form of the backward pass: probabilities are recomputed from the log-sum-exp).
//
// Per query head h, with its key-value head and j running over the keys that row t sees,
// span_begin[t] <= j <= t:
//   x[t,j] = scale * q[t] . k[j]      s[t,j] = x[t,j], or cap tanh(x[t,j] / cap) with a soft cap
//   lse[t] = log sum_j exp(s[t,j])
//   p[t,j] = exp(s[t,j] - lse[t])     o[t] = sum_j p[t,j] v[j]
// Gradient for upstream dy of o:
//   D[t] = dy[t] . o[t]               ds[t,j] = p[t,j] (dy[t] . v[j] - D[t])
//   dx[t,j] = ds[t,j], with a soft cap times 1 - (s[t,j] / cap)^2
//   dq[t] = scale * sum_j dx[t,j] k[j]
//   dk[j] = scale * sum_t dx[t,j] q[t]        dv[j] = sum_t p[t,j] dy[t]
// dk and dv also sum over the query heads that share the key-value head: heads in ascending order
// outside, queries in ascending order inside. lse is kept for the gradient alone: it has none
// itself.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/ops.h"
#include "engine/ops/attention_check.h"

namespace nibble {

Tensor attention(Tensor q, Tensor k, Tensor v, Tensor span_begin, const AttentionParams& params) {
  return q.graph->emit(OpId::attention, {q, k, v, span_begin}, params);
}
Tensor attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor dy,
                          Tensor span_begin, const AttentionParams& params) {
  return q.graph->emit(OpId::attention_backward, {q, k, v, o, lse, dy, span_begin}, params);
}

namespace {

// q, k and v are inputs 0 to 2. Returns the number of query heads.
std::int64_t check_qkv(const InferArgs& args) {
  const std::int64_t d = check::attention_head_dim(args);
  check::activation(args, 0, "q");
  check::activation(args, 1, "k");
  const std::int64_t heads = check::whole_heads(args, 0, "q", check::in(args, 0).shape[1], d);
  const std::int64_t kv_heads = check::whole_heads(args, 1, "k", check::in(args, 1).shape[1], d);
  check::grouped(args, heads, kv_heads);
  if (check::in(args, 1).shape[0] != check::in(args, 0).shape[0]) {
    check::fail(args, 1, "k", "as many rows as q, " + check::in(args, 0).shape.str());
  }
  check::activation_like(args, 2, "v", check::in(args, 1).shape, "the shape of k");
  return heads;
}

void check_spans(const InferArgs& args, int i) {
  check::shape(args, i, "span_begin", {check::in(args, 0).shape[0]}, "one per row of q");
  check::dtype(args, i, "span_begin", DType::I32);
}

void infer(InferArgs& args) {
  check::count(args, 4);
  const std::int64_t heads = check_qkv(args);
  check_spans(args, 3);
  args.outputs[0] = check::in(args, 0);
  args.outputs[1] = {check::stat(args), {check::in(args, 0).shape[0], heads}, {}};
  args.n_outputs = 2;
}

void infer_backward(InferArgs& args) {
  check::count(args, 7);
  const std::int64_t heads = check_qkv(args);
  const Shape q = check::in(args, 0).shape;
  check::activation_like(args, 3, "o", q, "the shape of q");
  check::statistic(args, 4, "lse", {q[0], heads}, "one per row and query head");
  check::activation_like(args, 5, "dy", q, "the shape of q");
  check_spans(args, 6);
  for (int i = 0; i < 3; ++i) args.outputs[static_cast<std::size_t>(i)] = check::in(args, i);
  args.n_outputs = 3;
}

void vjp(VjpArgs& args) {
  if (args.grad(1)) {
    throw ShapeError("attention: the log-sum-exp, output 1, has no gradient; use output 0 only");
  }
  const Tensor dy = args.grad(0);
  if (!dy) return;
  const Tensor dq = attention_backward(args.in(0), args.in(1), args.in(2), args.out(0), args.out(1),
                                       dy, args.in(3), args.node().get<AttentionParams>());
  for (int i = 0; i < 3; ++i) {
    if (args.wants(i)) args.add(i, args.graph().output_of(dq, i));
  }
}

// The heads of one call as the formulas index them.
struct Heads {
  explicit Heads(const ReferenceArgs& args)
      : params(args.node.get<AttentionParams>()),
        d(params.head_dim),
        rows(args.in_types[0].shape[0]),
        heads(args.in_types[0].shape[1] / d),
        kv_heads(args.in_types[1].shape[1] / d) {}
  std::size_t query(std::int64_t t, std::int64_t h) const {
    return static_cast<std::size_t>((t * heads + h) * d);
  }
  std::size_t key(std::int64_t j, std::int64_t h) const {
    return static_cast<std::size_t>((j * kv_heads + h / (heads / kv_heads)) * d);
  }
  double dot(const std::vector<double>& a, std::size_t i, const std::vector<double>& b,
             std::size_t j) const {
    double sum = 0;
    for (std::size_t c = 0; c < static_cast<std::size_t>(d); ++c) sum += a[i + c] * b[j + c];
    return sum;
  }
  AttentionParams params;
  std::int64_t d, rows, heads, kv_heads;
};

void reference(const ReferenceArgs& args) {
  const Heads n(args);
  const auto &q = args.in[0], &k = args.in[1], &v = args.in[2];
  for (std::int64_t t = 0; t < n.rows; ++t) {
    const auto begin = static_cast<std::int64_t>(args.in[3][static_cast<std::size_t>(t)]);
    for (std::int64_t h = 0; h < n.heads; ++h) {
      const auto score = [&](std::int64_t j) {
        return attention_score(n.params, n.dot(q, n.query(t, h), k, n.key(j, h)));
      };
      double largest = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::int64_t j = begin; j <= t; ++j) largest = std::max(largest, score(j));
      for (std::int64_t j = begin; j <= t; ++j) sum += std::exp(score(j) - largest);
      for (std::int64_t j = begin; j <= t; ++j) {
        const double p = std::exp(score(j) - largest) / sum;
        for (std::size_t c = 0; c < static_cast<std::size_t>(n.d); ++c) {
          args.out[0][n.query(t, h) + c] += p * v[n.key(j, h) + c];
        }
      }
      args.out[1][static_cast<std::size_t>(t * n.heads + h)] = largest + std::log(sum);
    }
  }
}

void reference_backward(const ReferenceArgs& args) {
  const Heads n(args);
  const auto &q = args.in[0], &k = args.in[1], &v = args.in[2], &o = args.in[3], &dy = args.in[5];
  for (std::int64_t t = 0; t < n.rows; ++t) {
    const auto begin = static_cast<std::int64_t>(args.in[6][static_cast<std::size_t>(t)]);
    for (std::int64_t h = 0; h < n.heads; ++h) {
      const std::size_t row = n.query(t, h);
      const double lse = args.in[4][static_cast<std::size_t>(t * n.heads + h)];
      const double sum = n.dot(dy, row, o, row);
      for (std::int64_t j = begin; j <= t; ++j) {
        const std::size_t key = n.key(j, h);
        const double s = attention_score(n.params, n.dot(q, row, k, key)), p = std::exp(s - lse);
        const double dx =
            p * (n.dot(dy, row, v, key) - sum) * attention_slope(n.params, s) * n.params.scale;
        for (std::size_t c = 0; c < static_cast<std::size_t>(n.d); ++c) {
          args.out[0][row + c] += dx * k[key + c];
          args.out[1][key + c] += dx * q[row + c];
          args.out[2][key + c] += p * dy[row + c];
        }
      }
    }
  }
}

using Role = Sample::Role;

struct Case {
  std::string_view label;
  std::int64_t rows, heads, kv_heads;
  std::int32_t head_dim;
  std::int64_t document;  // rows of each packed document; the last one may be shorter
  float scale;
  std::int64_t window = 0;  // rows that a row sees of its document, itself included; 0: all
  float soft_cap = 0;

  std::int64_t begin(std::int64_t t) const {
    const std::int64_t first = t / document * document;
    return window > 0 ? std::max(first, t + 1 - window) : first;
  }
  AttentionParams params() const { return {head_dim, scale, soft_cap}; }
  std::int64_t longest() const { return window > 0 ? window : document; }
};

// The first is small enough for finite differences; then grouped heads, one shared head, one-row
// documents (padding), lengths around the tiles of 64 rows that kernels use, a window, soft caps.
constexpr Case kCases[] = {
    {"one document", 5, 2, 2, 3, 5, 0.6f},
    {"grouped heads", 6, 4, 2, 2, 4, 0.7f},
    {"documents of one row", 3, 1, 1, 2, 1, 1.0f},
    {"packed documents", 150, 6, 2, 20, 47, 0.25f},
    {"past two tiles", 193, 3, 1, 64, 193, 0.125f},
    {"one wide head", 65, 1, 1, 129, 64, 0.09f},
    {"sliding window", 200, 2, 1, 64, 150, 0.125f, 70},
    {"soft cap", 5, 2, 1, 3, 4, 0.6f, 0, 1.5f},
    {"soft cap, two tiles", 90, 4, 2, 64, 70, 0.3f, 0, 2.0f},
};

std::vector<Sample> samples() {
  std::vector<Sample> all;
  for (const Case& c : kCases) {
    const auto begin = [c](std::int64_t t) { return c.begin(t); };
    all.push_back({c.label,
                   {{Role::activation, {c.rows, c.heads * c.head_dim}},
                    {Role::activation, {c.rows, c.kv_heads * c.head_dim}},
                    {Role::activation, {c.rows, c.kv_heads * c.head_dim}},
                    {Role::index, {c.rows}, begin}},
                   [c](Graph&, std::span<const Tensor> in) {
                     return attention(in[0], in[1], in[2], in[3], c.params());
                   },
                   c.longest() + c.head_dim});
  }
  return all;
}

std::vector<Sample> samples_backward() {
  std::vector<Sample> all;
  for (const Case& c : kCases) {
    const auto begin = [c](std::int64_t t) { return c.begin(t); };
    const Shape q{c.rows, c.heads * c.head_dim}, kv{c.rows, c.kv_heads * c.head_dim};
    // Independent random o and lse do not belong together; the formulas hold all the same, and a
    // log-sum-exp near log(span) + 1 keeps probabilities at the size they really have.
    const double lse = std::log(static_cast<double>(c.longest())) + 1;
    all.push_back({c.label,
                   {{Role::activation, q},
                    {Role::activation, kv},
                    {Role::activation, kv},
                    {Role::activation, q},
                    {Role::statistic, {c.rows, c.heads}, {}, 0.1, lse},
                    {Role::activation, q},
                    {Role::index, {c.rows}, begin}},
                   [c](Graph&, std::span<const Tensor> in) {
                     return attention_backward(in[0], in[1], in[2], in[3], in[4], in[5], in[6],
                                               c.params());
                   },
                   c.longest() * (c.heads / c.kv_heads) + c.head_dim});
  }
  return all;
}

}  // namespace

extern const OpDef attention_op{.name = "attention",
                                .infer = infer,
                                .vjp = vjp,
                                .reference = reference,
                                .samples = samples,
                                .dear = true};
extern const OpDef attention_backward_op{.name = "attention_backward",
                                         .infer = infer_backward,
                                         .reference = reference_backward,
                                         .samples = samples_backward};

}  // namespace nibble
