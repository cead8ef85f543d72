// The optimizer's two ops. Neither is differentiable.
//
//   sum_squares  acc[0] += sum x^2, the squared norm of the gradients, in F64 whatever x is
//   adamw        one step of AdamW (arXiv 1711.05101) in PyTorch's order: decay first
//
// With g = grad / tokens * coef, coef = min(1, clip / (sqrt(norm) / tokens + 1e-6)) (1 when clip is
// 0), and lr_b = lr * the block's learning rate scale:
//   m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr_b decay_b) - lr_b (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Only the master is an output; m, v and grad are memory that adamw alone writes after the
// gradients are complete, so no other node may read their old versions behind it.
#include <algorithm>
#include <cmath>

#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor sum_squares(Tensor acc, Tensor x) {
  return check::graph_of(acc, "sum_squares").emit(OpId::sum_squares, {acc, x});
}
Tensor adamw(Tensor master, Tensor m, Tensor v, Tensor grad, Tensor block_table, Tensor scalars,
             Tensor norm) {
  return check::graph_of(master, "adamw")
      .emit(OpId::adamw, {master, m, v, grad, block_table, scalars, norm});
}

namespace {

constexpr std::int64_t kBlock = 4096;

void check_total(const InferArgs& args, int i, std::string_view input) {
  check::dtype(args, i, input, DType::F64);
  check::shape(args, i, input, Shape{1}, "one number");
}

void infer_sum_squares(InferArgs& args) {
  check::count(args, 2);
  check_total(args, 0, "acc");
  check::dtype(args, 1, "x", check::stat(args));
  args.outputs[0] = check::in(args, 0);
}

void infer_adamw(InferArgs& args) {
  check::count(args, 7);
  check::rank(args, 0, "master", 1, "a flat array [n]");
  const Shape& flat = check::in(args, 0).shape;
  if (flat[0] % kBlock != 0) check::fail(args, 0, "master", "a multiple of 4096 elements");
  check::statistic(args, 0, "master", flat, "");
  check::statistic(args, 1, "m", flat, "the shape of master");
  check::statistic(args, 2, "v", flat, "the shape of master");
  check::statistic(args, 3, "grad", flat, "the shape of master");
  check::statistic(args, 4, "block_table", Shape{flat[0] / kBlock, 2},
                   "{learning rate scale, weight decay} per 4096 elements");
  check::statistic(args, 5, "scalars", Shape{8},
                   "{lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, 1 / tokens, clip}");
  check_total(args, 6, "norm");
  args.outputs[0] = check::in(args, 0);
}

void reference_sum_squares(const ReferenceArgs& args) {
  for (const double v : args.in[1]) args.out[0][0] += v * v;
}

void reference_adamw(const ReferenceArgs& args) {
  const std::vector<double>& s = args.in[5];
  const double lr = s[0], beta1 = s[1], beta2 = s[2], eps = s[3];
  const double correction1 = s[4], correction2 = s[5], inverse_tokens = s[6], clip = s[7];
  const double norm = std::sqrt(args.in[6][0]) * inverse_tokens;
  const double coef = clip == 0 ? 1 : std::min(1.0, clip / (norm + 1e-6));
  for (std::size_t i = 0; i < args.out[0].size(); ++i) {
    const std::size_t block = i / static_cast<std::size_t>(kBlock);
    const double lr_b = lr * args.in[4][2 * block], decay_b = args.in[4][2 * block + 1];
    const double g = args.in[3][i] * inverse_tokens * coef;
    const double m = beta1 * args.in[1][i] + (1 - beta1) * g;
    const double v = beta2 * args.in[2][i] + (1 - beta2) * g * g;
    args.out[0][i] = args.in[0][i] * (1 - lr_b * decay_b) -
                     lr_b * (m / correction1) / (std::sqrt(v / correction2) + eps);
  }
}

using Role = Sample::Role;

Sample sample_sum_squares(std::string_view label, Shape shape) {
  return {label,
          {{Role::total, {1}}, {Role::statistic, shape}},
          [](Graph&, std::span<const Tensor> in) { return sum_squares(in[0], in[1]); },
          shape.elements()};
}

std::vector<Sample> samples_sum_squares() {
  return {sample_sum_squares("tiny", {7}), sample_sum_squares("one block", {kBlock}),
          sample_sum_squares("partial last block", {3, 4111})};
}

// The scalars are all near one half, which is a legal if unusual step. v is positive.
Sample sample_adamw(std::string_view label, std::int64_t n, double norm) {
  return {label,
          {{Role::state, {n}},
           {Role::state, {n}},
           {Role::state, {n}, {}, 0.05, 1.0},
           {Role::state, {n}},
           {Role::constant, {n / kBlock, 2}, {}, 0.1, 0.5},
           {Role::constant, {8}, {}, 0.05, 0.5},
           {Role::total, {1}, {}, 0.0, norm}},
          [](Graph&, std::span<const Tensor> in) {
            return adamw(in[0], in[1], in[2], in[3], in[4], in[5], in[6]);
          }};
}

std::vector<Sample> samples_adamw() {
  return {sample_adamw("clipped", kBlock, 50),
          sample_adamw("below the clip norm", 3 * kBlock, 0.01)};
}

}  // namespace

extern const OpDef sum_squares_op{.name = "sum_squares",
                                  .infer = infer_sum_squares,
                                  .reference = reference_sum_squares,
                                  .samples = samples_sum_squares,
                                  .updates = 0b01};
extern const OpDef adamw_op{.name = "adamw",
                            .infer = infer_adamw,
                            .reference = reference_adamw,
                            .samples = samples_adamw,
                            .updates = 0b0000001,
                            .also_writes = 0b0001110};

}  // namespace nibble
