// What choose_token's samples cannot say: damaged logits, and that draws follow the distribution.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "backends/cpu/cpu.h"
#include "engine/ops.h"
#include "engine/runtime.h"

using namespace nibble;

namespace {

std::pair<double, double> choose(const std::vector<double>& logits, const ChooseTokenParams& params,
                                 double number) {
  static const auto backend = cpu::make_cpu_backend({.threads = 1, .isa = {}, .memory_limit = 0});
  Graph graph(DType::F32);
  const auto count = static_cast<std::int64_t>(logits.size());
  const Tensor id = choose_token(graph.input("logits", {DType::F32, {1, count}, {}}),
                                 graph.input("rng", {DType::I64, {2}, {}}), params);
  const auto result = eval(*backend, graph, std::array{id, graph.output_of(id, 1)},
                           {{"logits", logits}, {"rng", {99, number}}});
  return {result[0][0], result[1][0]};
}

}  // namespace

TEST_CASE("logits that are not finite give no token, whatever the sampling") {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()}) {
    std::vector<double> logits(300, 0.5);
    logits[7] = bad;
    for (const double temperature : {0.0, 1.0}) {
      const auto [id, logprob] = choose(logits, {.temperature = temperature}, 0);
      CHECK(id == -1);
      CHECK(std::isnan(logprob));
    }
  }
}

TEST_CASE("draws follow the distribution, and what is cut off is never drawn") {
  const std::vector<double> logits = {1, 3, 2, 3, -1};
  double sum = 0;
  for (const double z : logits) sum += std::exp(z);
  constexpr int kDraws = 4000;
  std::vector<int> counts(logits.size()), cut(logits.size());
  for (int i = 0; i < kDraws; ++i) {
    const auto [id, logprob] = choose(logits, {.temperature = 1}, i);
    const auto at = static_cast<std::size_t>(id);
    ++counts[at];
    CHECK(logprob == doctest::Approx(logits[at] - std::log(sum)).epsilon(1e-5));
    // The two of 3 are 79 % of all: 0.7 is reached after them, 0.3 by the first alone.
    ++cut[static_cast<std::size_t>(choose(logits, {.temperature = 1, .top_p = 0.7}, i).first)];
    CHECK(choose(logits, {.temperature = 1, .top_p = 0.3}, i).first == 1);
  }
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double wanted = std::exp(logits[i]) / sum;
    CHECK(std::abs(counts[i] / double{kDraws} - wanted) <
          4 * std::sqrt(wanted * (1 - wanted) / kDraws));
  }
  CHECK(cut[1] + cut[3] == kDraws);
  CHECK(std::abs(cut[1] - kDraws / 2) < 4 * std::sqrt(kDraws / 4));
}
