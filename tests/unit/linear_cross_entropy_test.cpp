// Properties of the fused loss that a comparison with the reference does not show: a row's loss and
// gradient are the same bits whatever is scored with it, dW does not depend on how a step is split,
// large vocabularies go panel by panel, and the gradient rule hands dx over as it is.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "backends/cpu/cpu.h"
#include "engine/autograd.h"
#include "engine/error.h"
#include "engine/philox.h"
#include "engine/runtime.h"

using namespace nibble;

namespace {

using Values = std::vector<double>;
using Feeds = std::map<std::string, Values>;

Values normal(std::string_view name, std::int64_t count) {
  Values values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(philox_normal(1, hash_name(name), i));
  }
  return values;
}

Values slice(const Values& v, std::int64_t begin, std::int64_t count) {
  return {v.begin() + begin, v.begin() + begin + count};
}

std::unique_ptr<Backend> backend_of(int threads, std::optional<cpu::Isa> isa = {}) {
  cpu::CpuOptions options;
  options.threads = threads;
  options.isa = isa;
  return cpu::make_cpu_backend(options);
}

// A loss over `rows` rows with `entries` of loss_rows.
struct Loss {
  Loss(DType compute, std::int64_t rows, std::int64_t channels, std::int64_t vocabulary,
       std::int64_t entries, NodeKind head = NodeKind::weight)
      : graph(compute),
        x(graph.input("x", {compute, {rows, channels}, {}})),
        w(head == NodeKind::parameter ? graph.parameter("w", {compute, {vocabulary, channels}, {}})
                                      : graph.weight("w", {compute, {vocabulary, channels}, {}})),
        labels(graph.input("labels", {DType::I32, {rows}, {}})),
        loss_rows(graph.input("loss_rows", {DType::I32, {entries}, {}})) {}
  Graph graph;
  Tensor x, w, labels, loss_rows;
};

constexpr std::int64_t kChannels = 12, kVocabulary = 40;

Values labels_of(std::int64_t rows) {
  Values labels;
  for (std::int64_t t = 0; t < rows; ++t)
    labels.push_back(static_cast<double>(t * 7 % kVocabulary));
  return labels;
}

// Every row but those at multiples of 5.
Values rows_between(std::int64_t begin, std::int64_t end) {
  Values rows;
  for (std::int64_t t = begin; t < end; ++t) {
    if (t % 5 != 0) rows.push_back(static_cast<double>(t - begin));
  }
  return rows;
}

}  // namespace

TEST_CASE("a row's loss and gradient are the same bits whatever is scored with it") {
  constexpr std::int64_t rows = 700;  // three chunks
  const std::unique_ptr<Backend> backend = backend_of(2);
  for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
    const Feeds shared = {{"x", normal("x", rows * kChannels)},
                          {"w", normal("w", kVocabulary * kChannels)},
                          {"labels", labels_of(rows)}};
    const auto score = [&](const Values& scored) {
      Loss n(compute, rows, kChannels, kVocabulary, static_cast<std::int64_t>(scored.size()));
      const Tensor loss = linear_cross_entropy(n.x, n.w, n.labels, n.loss_rows, true);
      Feeds feeds = shared;
      feeds["loss_rows"] = scored;
      return eval(*backend, n.graph,
                  std::vector{loss, n.graph.output_of(loss, 1), n.graph.output_of(loss, 2)}, feeds);
    };
    const Values all = rows_between(0, rows);
    const std::vector<Values> together = score(all);
    for (const std::size_t i : {std::size_t{0}, std::size_t{300}, all.size() - 1}) {
      const auto row = static_cast<std::int64_t>(all[i]);
      const std::vector<Values> alone = score({-1, all[i], -1});
      CHECK(alone[0][0] == together[1][i]);
      CHECK(alone[1] == Values{0, together[1][i], 0});
      CHECK(slice(alone[2], row * kChannels, kChannels) ==
            slice(together[2], row * kChannels, kChannels));
      CHECK(std::count(alone[2].begin(), alone[2].end(), 0.0) >= (rows - 1) * kChannels);
    }
  }
}

TEST_CASE("dW is the same bits when a step is split at multiples of 512 rows") {
  constexpr std::int64_t rows = 1300;
  const std::unique_ptr<Backend> backend = backend_of(3);
  for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
    const Values x = normal("x", rows * kChannels), w = normal("w", kVocabulary * kChannels);
    const auto run = [&](std::int64_t begin, std::int64_t end, const Values& acc) {
      const Values scored = rows_between(begin, end);
      Loss n(compute, end - begin, kChannels, kVocabulary,
             static_cast<std::int64_t>(scored.size()));
      const DType stat = n.graph.accumulate();
      const Tensor sum = linear_cross_entropy_dw(
          n.graph.state("acc", {stat, {kVocabulary, kChannels}, {}}), n.x, n.w, n.labels,
          n.loss_rows, n.graph.input("dloss", {stat, {1}, {}}));
      return eval(*backend, n.graph, std::vector{sum},
                  {{"acc", acc},
                   {"x", slice(x, begin * kChannels, (end - begin) * kChannels)},
                   {"w", w},
                   {"labels", slice(labels_of(rows), begin, end - begin)},
                   {"loss_rows", scored},
                   {"dloss", {0.75}}})[0];
    };
    const Values zero(kVocabulary * kChannels, 0.0);
    const Values whole = run(0, rows, zero);
    CHECK(run(1024, rows, run(512, 1024, run(0, 512, zero))) == whole);
    CHECK(run(512, rows, run(0, 512, zero)) == whole);
  }
}

TEST_CASE("a vocabulary of several panels gives the gradient of the formula") {
  // In F64 a panel is 16384 columns: 64 MiB over 512 rows of 8 bytes.
  constexpr std::int64_t rows = 3, channels = 2, vocabulary = 2 * 16384 + 5;
  const Values x = normal("x", rows * channels), w = normal("w", vocabulary * channels);
  const Values labels = {vocabulary - 1, 16384, 7};
  Values wanted(static_cast<std::size_t>(vocabulary * channels), 0.0);
  for (std::size_t t = 0; t < rows; ++t) {
    Values p(vocabulary);
    double sum = 0;
    for (std::size_t v = 0; v < p.size(); ++v) {
      p[v] = std::exp(x[t * 2] * w[v * 2] + x[t * 2 + 1] * w[v * 2 + 1]);
      sum += p[v];
    }
    for (std::size_t v = 0; v < p.size(); ++v) {
      const double dz = p[v] / sum - (static_cast<double>(v) == labels[t] ? 1 : 0);
      for (std::size_t c = 0; c < 2; ++c) wanted[v * 2 + c] += 3 * dz * x[t * 2 + c];
    }
  }
  const std::unique_ptr<Backend> backend = backend_of(2);
  Loss n(DType::F64, rows, channels, vocabulary, rows);
  const Tensor sum = linear_cross_entropy_dw(
      n.graph.state("acc", {DType::F64, {vocabulary, channels}, {}}), n.x, n.w, n.labels,
      n.loss_rows, n.graph.input("dloss", {DType::F64, {1}, {}}));
  const Values got =
      eval(*backend, n.graph, std::vector{sum},
           {{"x", x}, {"w", w}, {"labels", labels}, {"loss_rows", {0, 1, 2}}, {"dloss", {3}}})[0];
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(got[i] - wanted[i]));
  }
  CHECK(worst < 1e-13);
}

TEST_CASE("the gradient of a plain sum of losses is the stored dx; a scaled one is multiplied") {
  const auto count_scales = [](double upstream) {
    Loss n(DType::F32, 4, 3, 5, 4);
    const Tensor p = n.graph.parameter("p", {DType::F32, {4, 3}, {}});
    const Tensor loss = linear_cross_entropy(p, n.w, n.labels, n.loss_rows, true);
    const Tensor one = fill(n.graph, {DType::F32, {1}, {}}, upstream);
    append_backward(n.graph, std::vector{Seed{loss, one}});
    int count = 0;
    for (const Node& node : n.graph.nodes()) {
      count += node.kind == NodeKind::op && node.op == OpId::scale;
    }
    return count;
  };
  CHECK(count_scales(1) == 0);
  CHECK(count_scales(0.5) == 1);
}

TEST_CASE("a loss built without dx has no gradient in x, and says so") {
  Loss n(DType::F32, 4, 3, 5, 4);
  const Tensor p = n.graph.parameter("p", {DType::F32, {4, 3}, {}});
  const Tensor loss = linear_cross_entropy(p, n.w, n.labels, n.loss_rows, false);
  const Tensor one = fill(n.graph, {DType::F32, {1}, {}}, 1);
  CHECK_THROWS_WITH_AS(append_backward(n.graph, std::vector{Seed{loss, one}}),
                       "linear_cross_entropy: x needs a gradient; build the loss with keep_dx",
                       ShapeError);
}

TEST_CASE("labels and loss_rows are checked before memory is touched") {
  const std::unique_ptr<Backend> backend = backend_of(1);
  const auto message = [&](const Values& labels, const Values& loss_rows) -> std::string {
    Loss n(DType::F32, 2, 3, 5, 2);
    const Tensor loss = linear_cross_entropy(n.x, n.w, n.labels, n.loss_rows, false);
    try {
      eval(*backend, n.graph, std::vector{loss},
           {{"x", Values(6, 1.0)},
            {"w", Values(15, 1.0)},
            {"labels", labels},
            {"loss_rows", loss_rows}});
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  CHECK(message({1, 5}, {0, 1}) ==
        "linear_cross_entropy: labels[1] is 5, and the vocabulary has 5 entries");
  CHECK(message({1, 2}, {0, 2}) == "linear_cross_entropy: loss_rows[1] is 2, and x has 2 rows");
  CHECK(message({1, -100}, {0, 1}) == "no error");
  CHECK(message({-100, -100}, {-1, 1}) == "no error");
}
