// The key-value cache of text generation: appending to it, and attention over it.
//
//   kv_append:        cache[h, position + t] = x[t, h]
//   attention_cached: row t of q stands at position + t and sees cache rows 0 .. position + t;
//                     o as in attention.cpp
// The position is a value on the device, so that one program serves every step. The caller keeps
// position + T <= context. Neither op has a gradient. A row's result is the same whether it runs
// alone (generation) or with others (a chunk of the prompt).
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/ops.h"
#include "engine/ops/attention_check.h"

namespace nibble {

Tensor kv_append(Tensor cache, Tensor x, Tensor position, std::int32_t head_dim) {
  return cache.graph->emit(OpId::kv_append, {cache, x, position}, KvAppendParams{head_dim});
}
Tensor attention_cached(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position,
                        const AttentionParams& params) {
  return q.graph->emit(OpId::attention_cached, {q, k_cache, v_cache, position}, params);
}

namespace {

// Input i is a cache that has room for `rows` rows.
void check_cache(const InferArgs& args, int i, std::string_view input, std::int64_t d,
                 std::int64_t rows) {
  check::rank(args, i, input, 3, "[key-value heads, context, head_dim]");
  check::dtype(args, i, input, args.compute);
  const Shape cache = check::in(args, i).shape;
  if (cache[0] == 0 || cache[1] < rows || cache[2] != d) {
    check::fail(args, i, input,
                "at least one head, a context of at least " + std::to_string(rows) +
                    " rows, and head_dim " + std::to_string(d));
  }
}

void check_position(const InferArgs& args, int i) {
  check::shape(args, i, "position", {1}, "one number");
  check::dtype(args, i, "position", DType::I32);
}

void infer_append(InferArgs& args) {
  check::count(args, 3);
  const std::int64_t d = check::head_dim(args, args.node.get<KvAppendParams>().head_dim);
  check::activation(args, 1, "x");
  check_cache(args, 0, "cache", d, check::in(args, 1).shape[0]);
  if (check::whole_heads(args, 1, "x", check::in(args, 1).shape[1], d) !=
      check::in(args, 0).shape[0]) {
    check::fail(args, 1, "x", "the heads of the cache, " + check::in(args, 0).shape.str());
  }
  check_position(args, 2);
  args.outputs[0] = check::in(args, 0);
}

void infer(InferArgs& args) {
  check::count(args, 4);
  const std::int64_t d = check::attention_head_dim(args);
  check::activation(args, 0, "q");
  check_cache(args, 1, "k_cache", d, check::in(args, 0).shape[0]);
  check::activation_like(args, 2, "v_cache", check::in(args, 1).shape, "the shape of k_cache");
  check::grouped(args, check::whole_heads(args, 0, "q", check::in(args, 0).shape[1], d),
                 check::in(args, 1).shape[0]);
  check_position(args, 3);
  args.outputs[0] = check::in(args, 0);
}

void reference_append(const ReferenceArgs& args) {
  const Shape cache = args.in_types[0].shape;
  const std::int64_t rows = args.in_types[1].shape[0], heads = cache[0], d = cache[2];
  const auto position = static_cast<std::int64_t>(args.in[2][0]);
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t c = 0; c < d; ++c) {
        args.out[0][static_cast<std::size_t>((h * cache[1] + position + t) * d + c)] =
            args.in[1][static_cast<std::size_t>((t * heads + h) * d + c)];
      }
    }
  }
}

void reference(const ReferenceArgs& args) {
  const Shape cache = args.in_types[1].shape;
  const std::int64_t d = cache[2], rows = args.in_types[0].shape[0];
  const std::int64_t heads = args.in_types[0].shape[1] / d, group = heads / cache[0];
  const auto position = static_cast<std::int64_t>(args.in[3][0]);
  const auto params = args.node.get<AttentionParams>();
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const auto row = static_cast<std::size_t>((t * heads + h) * d);
      const auto key = [&](std::int64_t j) {
        return static_cast<std::size_t>((h / group * cache[1] + j) * d);
      };
      const auto score = [&](std::int64_t j) {
        double dot = 0;
        for (std::size_t c = 0; c < static_cast<std::size_t>(d); ++c) {
          dot += args.in[0][row + c] * args.in[1][key(j) + c];
        }
        return attention_score(params, dot);
      };
      double largest = -std::numeric_limits<double>::infinity(), sum = 0;
      for (std::int64_t j = 0; j <= position + t; ++j) largest = std::max(largest, score(j));
      for (std::int64_t j = 0; j <= position + t; ++j) sum += std::exp(score(j) - largest);
      for (std::int64_t j = 0; j <= position + t; ++j) {
        const double p = std::exp(score(j) - largest) / sum;
        for (std::size_t c = 0; c < static_cast<std::size_t>(d); ++c) {
          args.out[0][row + c] += p * args.in[2][key(j) + c];
        }
      }
    }
  }
}

using Role = Sample::Role;

struct Case {
  std::string_view label;
  std::int64_t rows, position, heads, kv_heads, context;
  std::int32_t head_dim;
  float soft_cap = 0;
};

constexpr Case kCases[] = {
    {"first row", 1, 0, 2, 1, 5, 4},      {"one row", 1, 77, 9, 3, 131, 64},
    {"prompt", 70, 0, 4, 2, 128, 20},     {"chunk of a prompt", 17, 111, 6, 2, 128, 33},
    {"full cache", 3, 126, 2, 2, 129, 7}, {"soft cap", 2, 60, 4, 2, 70, 64, 1.5f},
};

std::vector<Sample> samples_append() {
  std::vector<Sample> all;
  for (const Case& c : kCases) {
    const auto position = [p = c.position](std::int64_t) { return p; };
    all.push_back({c.label,
                   {{Role::cache, {c.kv_heads, c.context, c.head_dim}},
                    {Role::activation, {c.rows, c.kv_heads * c.head_dim}},
                    {Role::index, {1}, position}},
                   [c](Graph&, std::span<const Tensor> in) {
                     return kv_append(in[0], in[1], in[2], c.head_dim);
                   },
                   1});
  }
  return all;
}

std::vector<Sample> samples() {
  std::vector<Sample> all;
  for (const Case& c : kCases) {
    const auto position = [p = c.position](std::int64_t) { return p; };
    all.push_back(
        {c.label,
         {{Role::activation, {c.rows, c.heads * c.head_dim}},
          {Role::cache, {c.kv_heads, c.context, c.head_dim}},
          {Role::cache, {c.kv_heads, c.context, c.head_dim}},
          {Role::index, {1}, position}},
         [c](Graph&, std::span<const Tensor> in) {
           return attention_cached(in[0], in[1], in[2], in[3], {c.head_dim, 0.2f, c.soft_cap});
         },
         c.context + c.head_dim});
  }
  return all;
}

}  // namespace

extern const OpDef kv_append_op{.name = "kv_append",
                                .infer = infer_append,
                                .reference = reference_append,
                                .samples = samples_append,
                                .updates = 0b001};
extern const OpDef attention_cached_op{
    .name = "attention_cached", .infer = infer, .reference = reference, .samples = samples};

}  // namespace nibble
