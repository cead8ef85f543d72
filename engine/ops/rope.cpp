// Rotary position embedding (RoFormer, arXiv 2104.09864).
//
// Each head of a row is d/2 pairs (a, b); pair i of row t turns by w = positions[t] *
// frequencies[i]:
//   a' = a cos w - b sin w        b' = a sin w + b cos w
// The gradient turns back: the same op with direction -1. Pairs lie half a head apart (Hugging
// Face) or side by side (GGUF llama). Frequencies are an input, so scaled variants (linear, llama3)
// are the caller's business. The angle is formed and reduced in F64: an F32 product would be off
// by 1e-4 at position 2000.
#include <cmath>

#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor rope(Tensor x, Tensor positions, Tensor frequencies, std::int32_t head_dim, RopePairs pairs,
            float direction) {
  return x.graph->emit(OpId::rope, {x, positions, frequencies},
                       RopeParams{head_dim, pairs, direction});
}

namespace {

void infer(InferArgs& args) {
  check::count(args, 3);
  check::activation(args, 0, "x");
  const auto params = args.node.get<RopeParams>();
  if (params.head_dim <= 0 || params.head_dim % 2 != 0) {
    throw ShapeError("rope: head_dim is " + std::to_string(params.head_dim) +
                     ", wanted an even number above 0");
  }
  if (params.pairs != RopePairs::half && params.pairs != RopePairs::adjacent) {
    throw ShapeError("rope: pairs is neither half nor adjacent");
  }
  if (params.direction != 1.0f && params.direction != -1.0f) {
    throw ShapeError("rope: direction is " + std::to_string(params.direction) + ", wanted 1 or -1");
  }
  const Shape x = check::in(args, 0).shape;
  if (x[1] % params.head_dim != 0) {
    check::fail(args, 0, "x", "whole heads of " + std::to_string(params.head_dim) + " channels");
  }
  check::shape(args, 1, "positions", {x[0]}, "one per row of x");
  check::dtype(args, 1, "positions", DType::I32);
  check::statistic(args, 2, "frequencies", {params.head_dim / 2}, "one per pair of a head");
  args.outputs[0] = check::in(args, 0);
}

void vjp(VjpArgs& args) {
  const Tensor dy = args.grad(0);
  if (!dy) return;
  if (args.wants(2)) {
    throw ShapeError("rope: frequencies have no gradient; bind them as an input");
  }
  if (!args.wants(0)) return;
  const auto params = args.node().get<RopeParams>();
  args.add(0, rope(dy, args.in(1), args.in(2), params.head_dim, params.pairs, -params.direction));
}

void reference(const ReferenceArgs& args) {
  const auto params = args.node.get<RopeParams>();
  const std::int64_t rows = args.in_types[0].shape[0], channels = args.in_types[0].shape[1];
  const std::int64_t d = params.head_dim;
  const bool half = params.pairs == RopePairs::half;
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t head = 0; head < channels / d; ++head) {
      for (std::int64_t i = 0; i < d / 2; ++i) {
        const double angle = params.direction * args.in[1][static_cast<std::size_t>(t)] *
                             args.in[2][static_cast<std::size_t>(i)];
        const std::int64_t base = t * channels + head * d;
        const auto first = static_cast<std::size_t>(base + (half ? i : 2 * i));
        const auto second = static_cast<std::size_t>(base + (half ? i + d / 2 : 2 * i + 1));
        const double a = args.in[0][first], b = args.in[0][second];
        args.out[0][first] = a * std::cos(angle) - b * std::sin(angle);
        args.out[0][second] = a * std::sin(angle) + b * std::cos(angle);
      }
    }
  }
}

using Role = Sample::Role;

Sample sample(std::string_view label, std::int64_t rows, std::int64_t heads, std::int32_t head_dim,
              RopePairs pairs, float direction, std::int64_t first_position) {
  const auto position = [first_position](std::int64_t t) { return first_position + t % 300; };
  return {label,
          {{Role::activation, {rows, heads * head_dim}},
           {Role::index, {rows}, position},
           {Role::constant, {head_dim / 2}}},
          [head_dim, pairs, direction](Graph&, std::span<const Tensor> in) {
            return rope(in[0], in[1], in[2], head_dim, pairs, direction);
          },
          2};
}

std::vector<Sample> samples() {
  return {sample("half", 3, 2, 6, RopePairs::half, 1, 0),
          sample("adjacent", 3, 2, 6, RopePairs::adjacent, 1, 5),
          sample("smallest head, backwards", 2, 1, 2, RopePairs::half, -1, 1),
          sample("half, model width", 67, 9, 64, RopePairs::half, 1, 0),
          sample("adjacent, odd head, far", 33, 3, 38, RopePairs::adjacent, -1, 100000)};
}

}  // namespace

extern const OpDef rope_op{.name = "rope",
                           .infer = infer,
                           .vjp = vjp,
                           .reference = reference,
                           .samples = samples,
                           .in_place = {0b001},
                           .cheap = true};

}  // namespace nibble
