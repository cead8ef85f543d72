// The next token, chosen where the logits are: the most likely one, or a draw.
//
// Tokens stand in the order of their logits z, the larger first, equal ones by id. At temperature 0
// the first is taken. Otherwise token i weighs
//   w[i] = floor(2^40 exp((z[i] - z[0]) / temperature)), an integer,
// and a prefix of the order is kept: the first token, and then each while it is among the first
// top_k (0: all), weighs at least min_p 2^40, and the tokens before it sum to less than top_p times
// what the first top_k sum to. With U the sum of the kept weights and r 53 random bits, the draw is
// the first kept token, ids ascending, whose running sum exceeds floor(r U / 2^53).
//
// Integers make every sum exact, so that the choice does not depend on the order in which a backend
// adds up. r: words 0 and 1 of philox(rng[0], {rng[1], 0, 0, 0}).
//
// Output 0: the id, or -1 when a logit is not finite. Output 1: its log-probability under the
// unmodified distribution, z[id] - log sum exp z (NaN with id -1).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/ops.h"
#include "engine/ops/check.h"
#include "engine/philox.h"

namespace nibble {

Tensor choose_token(Tensor logits, Tensor rng, const ChooseTokenParams& params) {
  return check::graph_of(logits, "choose_token").emit(OpId::choose_token, {logits, rng}, params);
}

namespace {

void infer(InferArgs& args) {
  check::count(args, 2);
  const auto p = args.node.get<ChooseTokenParams>();
  if (!(p.temperature >= 0) || !(p.top_p >= 0) || !(p.min_p >= 0) || p.top_k < 0) {
    throw ShapeError("choose_token: temperature, top_p, min_p and top_k are numbers >= 0");
  }
  check::rank(args, 0, "logits", 2, "one row [1, vocabulary]");
  const std::int64_t vocabulary = check::in(args, 0).shape[1];
  check::shape(args, 0, "logits", Shape{1, vocabulary}, "one row");
  check::dtype(args, 0, "logits", check::stat(args));
  if (vocabulary == 0 || vocabulary >= std::int64_t{1} << 23) {
    check::fail(args, 0, "logits", "from 1 to 2^23 - 1 tokens");
  }
  check::shape(args, 1, "rng", Shape{2}, "a key and the number of the draw");
  check::dtype(args, 1, "rng", DType::I64);
  args.outputs[0] = {DType::I32, {1}, {}};
  args.outputs[1] = {check::stat(args), {1}, {}};
  args.n_outputs = 2;
}

std::uint64_t draw_below(std::uint64_t sum, std::int64_t key, std::int64_t number) {
  const PhiloxBlock words =
      philox(static_cast<std::uint64_t>(key), {static_cast<std::uint32_t>(number), 0, 0, 0});
  const std::uint64_t r = (std::uint64_t{words[0]} << 21) | (words[1] >> 11);
  return multiply_shift(r, sum);
}

void reference(const ReferenceArgs& args) {
  const std::vector<double>& z = args.in[0];
  const auto p = args.node.get<ChooseTokenParams>();
  args.out[0][0] = -1;
  args.out[1][0] = std::numeric_limits<double>::quiet_NaN();
  if (!std::all_of(z.begin(), z.end(), [](double v) { return std::isfinite(v); })) return;
  std::vector<std::size_t> order(z.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return z[a] > z[b]; });
  const double most = z[order[0]];
  std::size_t chosen = order[0];
  if (p.temperature > 0) {
    std::vector<std::uint64_t> weight(z.size());
    for (std::size_t i = 0; i < z.size(); ++i) {
      weight[i] = static_cast<std::uint64_t>(0x1p40 * std::exp((z[i] - most) / p.temperature));
    }
    std::size_t count = z.size();
    if (p.top_k > 0) count = std::min(count, static_cast<std::size_t>(p.top_k));
    std::uint64_t total = 0, sum = 0;
    for (std::size_t rank = 0; rank < count; ++rank) total += weight[order[rank]];
    std::vector<bool> kept(z.size());
    for (std::size_t rank = 0; rank < count; ++rank) {
      const std::uint64_t w = weight[order[rank]];
      if (rank > 0 && (static_cast<double>(w) < p.min_p * 0x1p40 ||
                       static_cast<double>(sum) >= p.top_p * static_cast<double>(total))) {
        break;
      }
      kept[order[rank]] = true;
      sum += w;
    }
    std::uint64_t left = draw_below(sum, static_cast<std::int64_t>(args.in[1][0]),
                                    static_cast<std::int64_t>(args.in[1][1]));
    for (chosen = 0; !kept[chosen] || left >= weight[chosen]; ++chosen) {
      if (kept[chosen]) left -= weight[chosen];
    }
  }
  double sum = 0;
  for (const double v : z) sum += std::exp(v - most);
  args.out[0][0] = static_cast<double>(chosen);
  args.out[1][0] = z[chosen] - most - std::log(sum);
}

using Role = Sample::Role;

Sample sample(std::string_view label, std::int64_t vocabulary, double spread,
              const ChooseTokenParams& params, std::int64_t number) {
  const auto rng = [number](std::int64_t i) {
    return i == 0 ? std::int64_t{0x5eed5eed5eed} : number;
  };
  return {
      label,
      {{Role::constant, {1, vocabulary}, {}, spread}, {Role::counter, {2}, rng}},
      [params](Graph&, std::span<const Tensor> in) { return choose_token(in[0], in[1], params); },
      vocabulary};
}

std::vector<Sample> samples() {
  return {sample("greedy", 301, 3, {}, 0),
          sample("one token", 1, 1, {.temperature = 1}, 3),
          sample("all tokens equal", 37, 0, {.temperature = 0.7}, 5),
          sample("everything", 5003, 2, {.temperature = 0.8}, 1),
          sample("top-p", 5003, 2, {.temperature = 1, .top_p = 0.9}, 2),
          sample("top-k", 1500, 2, {.temperature = 1.5, .top_k = 7}, 3),
          sample("min-p", 1500, 2, {.temperature = 1, .min_p = 0.05}, 4),
          sample("all of them", 2049, 3,
                 {.temperature = 1.2, .top_p = 0.95, .min_p = 0.001, .top_k = 100}, 6),
          sample("top-p 0 is greedy", 99, 1, {.temperature = 1, .top_p = 0}, 7)};
}

}  // namespace

extern const OpDef choose_token_op{
    .name = "choose_token", .infer = infer, .reference = reference, .samples = samples};

}  // namespace nibble
