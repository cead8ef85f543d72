// Root mean square normalization (arXiv 1910.07467) and its two gradients.
//
//   r[t] = (mean_c x[t,c]^2 + eps)^-1/2          y = x * r * w
// With g = dy * w:
//   dx[t,c] = r * g[t,c] - x[t,c] * r^3 / C * sum_k g[t,k] x[t,k]
//   dw[c]   = sum_t dy[t,c] * x[t,c] * r[t]
//
// Nothing but x is needed from the forward pass: r costs one sweep over a row, less than storing
// it would add to the plan's bookkeeping. The product with w happens before the only rounding.
#include <cmath>

#include "engine/ops.h"
#include "engine/ops/check.h"

namespace nibble {

Tensor rms_norm(Tensor x, Tensor w, float eps) {
  return check::graph_of(x, "rms_norm").emit(OpId::rms_norm, {x, w}, RmsNormParams{eps});
}
Tensor rms_norm_dx(Tensor x, Tensor w, Tensor dy, float eps) {
  return check::graph_of(x, "rms_norm_dx").emit(OpId::rms_norm_dx, {x, w, dy}, RmsNormParams{eps});
}
Tensor rms_norm_dw(Tensor acc, Tensor x, Tensor dy, float eps) {
  return check::graph_of(acc, "rms_norm_dw")
      .emit(OpId::rms_norm_dw, {acc, x, dy}, RmsNormParams{eps});
}

namespace {

void check_eps(const InferArgs& args) {
  const float eps = args.node.get<RmsNormParams>().eps;
  if (!(eps >= 0) || std::isinf(eps)) {
    throw ShapeError(check::op_name(args) + ": eps is " + std::to_string(eps) +
                     ", wanted a number >= 0");
  }
}

void check_factors(const InferArgs& args, int i) {
  check::weight(args, i, "w");
  check::shape(args, i, "w", Shape{check::in(args, 0).shape[1]}, "one factor per channel of x");
}

void infer(InferArgs& args) {
  check::count(args, 2);
  check_eps(args);
  check::activation(args, 0, "x");
  check_factors(args, 1);
  args.outputs[0] = check::in(args, 0);
}

void infer_dx(InferArgs& args) {
  check::count(args, 3);
  check_eps(args);
  check::activation(args, 0, "x");
  check_factors(args, 1);
  check::activation_like(args, 2, "dy", check::in(args, 0).shape, "the shape of x");
  args.outputs[0] = check::in(args, 0);
}

void infer_dw(InferArgs& args) {
  check::count(args, 3);
  check_eps(args);
  check::activation(args, 1, "x");
  check::statistic(args, 0, "acc", Shape{check::in(args, 1).shape[1]}, "one sum per channel of x");
  check::activation_like(args, 2, "dy", check::in(args, 1).shape, "the shape of x");
  args.outputs[0] = check::in(args, 0);
}

void vjp(VjpArgs& args) {
  const float eps = args.node().get<RmsNormParams>().eps;
  const Tensor dy = args.grad(0);
  if (!dy) return;
  if (args.wants(0)) args.add(0, rms_norm_dx(args.in(0), args.in(1), dy, eps));
  if (!args.wants(1)) return;
  if (!args.is_parameter(1)) {
    throw ShapeError("rms_norm: w is computed by an op; its gradient exists only for a parameter");
  }
  args.accumulated(1, rms_norm_dw(args.accumulator(1), args.in(0), dy, eps));
}

double inverse_rms(std::span<const double> row, double eps) {
  double sum = 0;
  for (const double v : row) sum += v * v;
  return 1 / std::sqrt(sum / static_cast<double>(row.size()) + eps);
}

void reference(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto cols = static_cast<std::size_t>(args.in_types[0].shape[1]);
  const double eps = args.node.get<RmsNormParams>().eps;
  const std::span<const double> x = args.in[0], w = args.in[1];
  for (std::size_t t = 0; t < rows; ++t) {
    const double r = inverse_rms(x.subspan(t * cols, cols), eps);
    for (std::size_t c = 0; c < cols; ++c) args.out[0][t * cols + c] = x[t * cols + c] * r * w[c];
  }
}

void reference_dx(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[0].shape[0]);
  const auto cols = static_cast<std::size_t>(args.in_types[0].shape[1]);
  const double eps = args.node.get<RmsNormParams>().eps;
  const std::span<const double> w = args.in[1];
  for (std::size_t t = 0; t < rows; ++t) {
    const auto x = std::span<const double>(args.in[0]).subspan(t * cols, cols);
    const auto dy = std::span<const double>(args.in[2]).subspan(t * cols, cols);
    const double r = inverse_rms(x, eps);
    double dot = 0;
    for (std::size_t c = 0; c < cols; ++c) dot += dy[c] * w[c] * x[c];
    for (std::size_t c = 0; c < cols; ++c) {
      args.out[0][t * cols + c] =
          r * dy[c] * w[c] - x[c] * r * r * r / static_cast<double>(cols) * dot;
    }
  }
}

void reference_dw(const ReferenceArgs& args) {
  const auto rows = static_cast<std::size_t>(args.in_types[1].shape[0]);
  const auto cols = static_cast<std::size_t>(args.in_types[1].shape[1]);
  const double eps = args.node.get<RmsNormParams>().eps;
  for (std::size_t t = 0; t < rows; ++t) {
    const auto x = std::span<const double>(args.in[1]).subspan(t * cols, cols);
    const auto dy = std::span<const double>(args.in[2]).subspan(t * cols, cols);
    const double r = inverse_rms(x, eps);
    for (std::size_t c = 0; c < cols; ++c) args.out[0][c] += dy[c] * x[c] * r;
  }
}

using Role = Sample::Role;
constexpr float kEps = 1e-5f;

Sample sample(std::string_view label, Role w, std::int64_t rows, std::int64_t cols) {
  return {label,
          {{Role::activation, {rows, cols}}, {w, {cols}, {}, 0.3, 1.0}},
          [](Graph&, std::span<const Tensor> in) { return rms_norm(in[0], in[1], kEps); },
          cols};
}

std::vector<Sample> samples() {
  return {sample("frozen factors", Role::weight, 3, 5),
          sample("trained factors", Role::parameter, 4, 7),
          sample("one channel", Role::parameter, 2, 1),
          sample("several tiles of rows", Role::parameter, 1030, 33),
          sample("model width", Role::parameter, 19, 576)};
}

Sample sample_dx(std::string_view label, std::int64_t rows, std::int64_t cols) {
  return {label,
          {{Role::activation, {rows, cols}},
           {Role::weight, {cols}, {}, 0.3, 1.0},
           {Role::activation, {rows, cols}}},
          [](Graph&, std::span<const Tensor> in) { return rms_norm_dx(in[0], in[1], in[2], kEps); },
          cols};
}

std::vector<Sample> samples_dx() {
  return {sample_dx("odd", 3, 5), sample_dx("one channel", 2, 1), sample_dx("wide", 21, 579)};
}

Sample sample_dw(std::string_view label, std::int64_t rows, std::int64_t cols) {
  return {
      label,
      {{Role::state, {cols}}, {Role::activation, {rows, cols}}, {Role::activation, {rows, cols}}},
      [](Graph&, std::span<const Tensor> in) { return rms_norm_dw(in[0], in[1], in[2], kEps); },
      rows + cols};
}

std::vector<Sample> samples_dw() {
  return {sample_dw("odd", 3, 5), sample_dw("one tile", 512, 65),
          sample_dw("three tiles", 1025, 19)};
}

}  // namespace

extern const OpDef rms_norm_op{.name = "rms_norm",
                               .infer = infer,
                               .vjp = vjp,
                               .reference = reference,
                               .samples = samples,
                               .in_place = {0b01},
                               .cheap = true};
extern const OpDef rms_norm_dx_op{.name = "rms_norm_dx",
                                  .infer = infer_dx,
                                  .reference = reference_dx,
                                  .samples = samples_dx,
                                  .in_place = {0b101}};
extern const OpDef rms_norm_dw_op{.name = "rms_norm_dw",
                                  .infer = infer_dw,
                                  .reference = reference_dw,
                                  .samples = samples_dw,
                                  .updates = 0b001};

}  // namespace nibble
