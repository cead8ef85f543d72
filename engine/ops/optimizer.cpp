// The optimizer's ops. None is differentiable.
//
//   sum_squares  acc[0] += sum x^2, the squared norm of the gradients, in F64 whatever x is
//   adamw        one step of AdamW (arXiv 1711.05101) in PyTorch's order: decay first
//   adamw8bit    the same step with moments in 8 bits (arXiv 2110.02861)
//
// With g = grad / tokens * coef, coef = min(1, clip / (sqrt(norm) / tokens + 1e-6)) (1 when clip is
// 0), and lr_b = lr * the block's learning rate scale:
//   m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr_b decay_b) - lr_b (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Only the master is an output; m, v and grad are memory that the step alone writes after the
// gradients are complete, so no other node may read their old versions behind it.
//
// adamw8bit keeps a moment as map[code] * absmax, absmax being the largest magnitude of 256
// elements: m in the signed dynamic map, v in the unsigned one (quantize.h). p is updated from the
// new moments before they are rounded. As in bitsandbytes' kernel,
// - the new moment over its absmax takes the nearest entry, a tie the even one;
// - m keeps its sign: what is negative and nearest to 0 takes the entry below 0;
// - an element whose gradient is not finite (or has a square that is not, in F32) gets m = v = 0,
//   and its p stays; its gradient is cleared like every other;
// - 256 moments of zero divide 0 by 0: the NaN has code 0, and in m the rule of signs turns that
//   into 255. absmax is 0, so any code stands for 0.
// Unlike there, decay comes before the step, as in adamw; the quotient by absmax is correctly
// rounded; and every tensor has 8 bits, also those below 4096 elements, which stay in F32 there:
// here the unit of all optimizer memory is 4096 elements, which no tensor shares with another, and
// what F32 would cost would be a second layout.
// Moments are F32 before they are encoded and absmax is F32, whatever the compute dtype.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>

#include "engine/ops.h"
#include "engine/ops/check.h"
#include "engine/quantize.h"

namespace nibble {

Tensor sum_squares(Tensor acc, Tensor x) {
  return check::graph_of(acc, "sum_squares").emit(OpId::sum_squares, {acc, x});
}
Tensor adamw(Tensor master, Tensor m, Tensor v, Tensor grad, Tensor block_table, Tensor scalars,
             Tensor norm) {
  return check::graph_of(master, "adamw")
      .emit(OpId::adamw, {master, m, v, grad, block_table, scalars, norm});
}
Tensor adamw8bit(Tensor master, Tensor m, Tensor v, Tensor grad, Tensor block_table, Tensor scalars,
                 Tensor norm) {
  return check::graph_of(master, "adamw8bit")
      .emit(OpId::adamw8bit, {master, m, v, grad, block_table, scalars, norm});
}

namespace {

constexpr std::int64_t kBlock = 4096;
constexpr std::int64_t kQuantBlock = 256;  // elements that share an absmax

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

// All but the moments; returns the elements.
std::int64_t check_step(const InferArgs& args) {
  check::count(args, 7);
  check::rank(args, 0, "master", 1, "a flat array [n]");
  const Shape& flat = check::in(args, 0).shape;
  if (flat[0] % kBlock != 0) check::fail(args, 0, "master", "a multiple of 4096 elements");
  check::statistic(args, 0, "master", flat, "");
  check::statistic(args, 3, "grad", flat, "the shape of master");
  check::statistic(args, 4, "block_table", Shape{flat[0] / kBlock, 2},
                   "{learning rate scale, weight decay} per 4096 elements");
  check::statistic(args, 5, "scalars", Shape{8},
                   "{lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, 1 / tokens, clip}");
  check_total(args, 6, "norm");
  return flat[0];
}

void infer_adamw(InferArgs& args) {
  const std::int64_t n = check_step(args);
  check::statistic(args, 1, "m", Shape{n}, "the shape of master");
  check::statistic(args, 2, "v", Shape{n}, "the shape of master");
  args.outputs[0] = check::in(args, 0);
}

void infer_adamw8bit(InferArgs& args) {
  const Shape moment{check_step(args) / kBlock * kMomentBlockBytes};
  for (const auto& [i, input] : {std::pair{1, "m"}, {2, "v"}}) {
    check::shape(args, i, input, moment, "4160 bytes per 4096 elements of master");
    check::dtype(args, i, input, DType::U8);
  }
  args.outputs[0] = check::in(args, 0);
}

void reference_sum_squares(const ReferenceArgs& args) {
  for (const double v : args.in[1]) args.out[0][0] += v * v;
}

// One step from the old moments in F64.
void reference_step(const ReferenceArgs& args, const std::vector<double>& old_m,
                    const std::vector<double>& old_v) {
  const std::vector<double>& s = args.in[5];
  const double lr = s[0], beta1 = s[1], beta2 = s[2], eps = s[3];
  const double correction1 = s[4], correction2 = s[5], inverse_tokens = s[6], clip = s[7];
  const double norm = std::sqrt(args.in[6][0]) * inverse_tokens;
  const double coef = clip == 0 ? 1 : std::min(1.0, clip / (norm + 1e-6));
  for (std::size_t i = 0; i < args.out[0].size(); ++i) {
    const std::size_t block = i / static_cast<std::size_t>(kBlock);
    const double lr_b = lr * args.in[4][2 * block], decay_b = args.in[4][2 * block + 1];
    const double g = args.in[3][i] * inverse_tokens * coef;
    const double m = beta1 * old_m[i] + (1 - beta1) * g;
    const double v = beta2 * old_v[i] + (1 - beta2) * g * g;
    args.out[0][i] = args.in[0][i] * (1 - lr_b * decay_b) -
                     lr_b * (m / correction1) / (std::sqrt(v / correction2) + eps);
  }
}

void reference_adamw(const ReferenceArgs& args) { reference_step(args, args.in[1], args.in[2]); }

// What the bytes of a moment stand for.
std::vector<double> moments(const std::vector<double>& bytes, const float* map) {
  std::vector<double> values;
  for (std::size_t block = 0; block < bytes.size(); block += kMomentBlockBytes) {
    for (std::size_t i = 0; i < kBlock; ++i) {
      std::array<std::uint8_t, 4> stored;
      for (std::size_t k = 0; k < 4; ++k) {
        stored[k] = static_cast<std::uint8_t>(bytes[block + kBlock + i / kQuantBlock * 4 + k]);
      }
      const auto code = static_cast<std::size_t>(bytes[block + i]);
      values.push_back(static_cast<double>(map[code]) * std::bit_cast<float>(stored));
    }
  }
  return values;
}

void reference_adamw8bit(const ReferenceArgs& args) {
  reference_step(args, moments(args.in[1], dynamic_map_signed),
                 moments(args.in[2], dynamic_map_unsigned));
  for (std::size_t i = 0; i < args.out[0].size(); ++i) {
    if (!std::isfinite(args.in[3][i])) args.out[0][i] = args.in[0][i];
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
template <class Step>
Sample sample_step(std::string_view label, std::int64_t n, double norm, const Sample::Input& m,
                   const Sample::Input& v, Step step) {
  return {label,
          {{Role::state, {n}},
           m,
           v,
           {Role::state, {n}},
           {Role::constant, {n / kBlock, 2}, {}, 0.1, 0.5},
           {Role::constant, {8}, {}, 0.05, 0.5},
           {Role::total, {1}, {}, 0.0, norm}},
          [step](Graph&, std::span<const Tensor> in) {
            return step(in[0], in[1], in[2], in[3], in[4], in[5], in[6]);
          }};
}

Sample sample_adamw(std::string_view label, std::int64_t n, double norm) {
  return sample_step(label, n, norm, {Role::state, {n}}, {Role::state, {n}, {}, 0.05, 1.0}, adamw);
}

// Codes from `lowest` to 255, and an absmax of another size in every 256 elements.
Sample::Input sample_moment(std::int64_t n, std::int64_t lowest) {
  return {Role::bytes, {n / kBlock * kMomentBlockBytes}, [lowest](std::int64_t i) -> std::int64_t {
            const std::int64_t block = i / kMomentBlockBytes, at = i % kMomentBlockBytes;
            if (at < kBlock) return lowest + (i * 37 + i / 256) % (256 - lowest);
            const float absmax = 1.0f + 0.07f * static_cast<float>(block + (at - kBlock) / 4);
            return std::bit_cast<std::uint32_t>(absmax) >> (at % 4 * 8) & 255;
          }};
}

Sample sample_adamw8bit(std::string_view label, std::int64_t n, double norm) {
  return sample_step(label, n, norm, sample_moment(n, 0), sample_moment(n, 192), adamw8bit);
}

std::vector<Sample> samples_adamw() {
  return {sample_adamw("clipped", kBlock, 50),
          sample_adamw("below the clip norm", 3 * kBlock, 0.01)};
}
std::vector<Sample> samples_adamw8bit() {
  return {sample_adamw8bit("clipped", kBlock, 50),
          sample_adamw8bit("below the clip norm", 3 * kBlock, 0.01)};
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
extern const OpDef adamw8bit_op{.name = "adamw8bit",
                                .infer = infer_adamw8bit,
                                .reference = reference_adamw8bit,
                                .samples = samples_adamw8bit,
                                .updates = 0b0000001,
                                .also_writes = 0b0001110};

}  // namespace nibble
