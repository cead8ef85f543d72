// Whole programs on the CPU backend: what only shows when ops meet in one plan.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "backends/cpu/cpu.h"
#include "engine/runtime.h"
#include "tests/registry/guarded_run.h"
#include "tests/registry/registry.h"
#include "tests/unit/llama_graph.h"
#include "tests/unit/reference_backend.h"

using namespace nibble;
using namespace nibble::registry;

namespace {

using Bytes = std::vector<std::byte>;

std::unique_ptr<Backend> cpu_backend(int threads) {
  cpu::CpuOptions options;
  options.threads = threads;
  return cpu::make_cpu_backend(options);
}

std::vector<Bytes> llama_leaves(const Graph& graph) {
  const auto feeds = llama_feeds(graph);
  std::vector<Bytes> leaves(static_cast<std::size_t>(graph.size()));
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    const Node& n = graph.node(id);
    if (n.kind == NodeKind::op) continue;
    Bytes& leaf = leaves[static_cast<std::size_t>(id)];
    leaf = n.kind == NodeKind::state ? Bytes(static_cast<std::size_t>(bytes(n.outputs[0])))
                                     : encode(n.outputs[0], feeds.at(graph.name(id)));
  }
  return leaves;
}

// The loss and every gradient accumulator of one training step on guarded memory.
std::vector<Bytes> step(const LlamaShape& shape, Backend& backend) {
  const LlamaGraph llama = llama_training(shape);
  const Plan plan = make_plan(*llama.graph, backend);
  GuardedRun run(backend, plan, llama_leaves(*llama.graph));
  run.run();
  CHECK(run.damage() == "");
  std::vector<Bytes> results = {run.value({llama.loss.node, 0})};
  for (const ParameterGradient& p : llama.backward.parameters) {
    results.push_back(run.leaf(p.accumulator.node));
  }
  return results;
}

// The largest difference of any gradient from `wanted`, as a share of that gradient's largest
// element.
double distance(const LlamaShape& shape, const std::vector<Bytes>& got,
                const LlamaShape& wanted_shape, const std::vector<Bytes>& wanted) {
  const LlamaGraph a = llama_training(shape), b = llama_training(wanted_shape);
  double worst = 0;
  for (std::size_t i = 1; i < got.size(); ++i) {
    const std::vector<double> x =
        decode(a.backward.parameters[i - 1].accumulator.type(), got[i].data());
    const std::vector<double> y =
        decode(b.backward.parameters[i - 1].accumulator.type(), wanted[i].data());
    double largest = 0, error = 0;
    for (std::size_t k = 0; k < y.size(); ++k) {
      largest = std::max(largest, std::abs(y[k]));
      error = std::max(error, std::isfinite(x[k]) ? std::abs(x[k] - y[k]) : INFINITY);
    }
    REQUIRE(largest > 0);
    worst = std::max(worst, error / largest);
  }
  return worst;
}

LlamaShape odd_shape(DType compute, DType weights) {
  return {.rows = 37,
          .layers = 2,
          .heads = 6,
          .kv_heads = 2,
          .head_dim = 16,
          .ffn = 160,
          .vocabulary = 71,
          .rank = 5,
          .compute = compute,
          .weights = weights};
}

}  // namespace

TEST_CASE("a training step: every rung and thread count gives the same bytes") {
  for (const DType compute : kComputes) {
    for (const DType weights : {compute, DType::NF4, DType::Q8_0}) {
      LlamaShape shape = odd_shape(compute, weights);
      const std::vector<Bytes> wanted = step(shape, *cpu_backend(1));
      for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
        shape.rung = rung;
        for (const int threads : {1, 3}) {
          CAPTURE(name(compute));
          CAPTURE(name(weights));
          CAPTURE(static_cast<int>(rung));
          CAPTURE(threads);
          CHECK(step(shape, *cpu_backend(threads)) == wanted);
        }
      }
    }
  }
}

TEST_CASE("a training step agrees with the references") {
  const LlamaShape exact = odd_shape(DType::F64, DType::F64);
  ReferenceBackend reference;
  const std::vector<Bytes> wanted = step(exact, reference);
  const auto cpu = cpu_backend(2);
  CHECK(distance(exact, step(exact, *cpu), exact, wanted) < 1e-11);
  // The same weights rounded to F32, and F32 arithmetic through two layers and back.
  const LlamaShape single = odd_shape(DType::F32, DType::F32);
  CHECK(distance(single, step(single, *cpu), exact, wanted) < 1e-4);
}

TEST_CASE("the CPU backend hands out exactly what the runtime announced") {
  const auto backend = cpu_backend(2);
  Runtime runtime(*backend);
  for (const Rung rung : {Rung::store, Rung::block}) {
    LlamaShape shape = odd_shape(DType::BF16, DType::NF4);
    shape.rung = rung;
    runtime.add(llama_training(shape).graph);
  }
  std::vector<Bytes> memory;
  const Graph& graph = runtime.graph(0);
  for (Bytes& leaf : llama_leaves(graph)) memory.push_back(std::move(leaf));
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    const NodeKind kind = graph.node(id).kind;
    if (kind == NodeKind::weight || kind == NodeKind::parameter) {
      runtime.bind(graph.name(id), memory[static_cast<std::size_t>(id)].data());
    }
  }
  const std::int64_t announced =
      runtime.arena_bytes() + runtime.input_bytes() + runtime.state_bytes();
  CHECK(backend->allocated_bytes() == 0);
  runtime.allocate();
  CHECK(backend->allocated_bytes() == announced);
  for (const int program : {0, 1, 0}) runtime.run(program);
  CHECK(backend->allocated_bytes() == announced);
}

TEST_CASE("adamw moves m and v, and clears the gradient") {
  const auto backend = cpu_backend(2);
  int checked = 0;
  for (const Case& c : cases_of(OpId::adamw)) {
    const OpGraph built = build(c);
    const Inputs inputs = make_inputs(c);
    const Plan plan = make_plan(*built.graph, *backend);
    GuardedRun run(*backend, plan, inputs.bytes);
    run.run();
    const std::vector<double>& s = inputs.rounded[5];
    const double beta1 = s[1], beta2 = s[2], inverse_tokens = s[6], clip = s[7];
    const double norm = std::sqrt(inputs.rounded[6][0]) * inverse_tokens;
    const double coef = std::min(1.0, clip / (norm + 1e-6));
    std::vector<double> m = inputs.rounded[1], v = inputs.rounded[2];
    for (std::size_t i = 0; i < m.size(); ++i) {
      const double g = inputs.rounded[3][i] * inverse_tokens * coef;
      m[i] = beta1 * m[i] + (1 - beta1) * g;
      v[i] = beta2 * v[i] + (1 - beta2) * g * g;
    }
    WorstRatios worst;
    const auto after = [&](std::int32_t leaf) {
      return decode(c.input_type(static_cast<std::size_t>(leaf)), run.leaf(leaf).data());
    };
    const DType dtype = c.input_type(1).dtype;
    CHECK(compare(c, dtype, after(1), m, false, worst) == "");
    CHECK(compare(c, dtype, after(2), v, false, worst) == "");
    CHECK(after(3) == std::vector<double>(m.size()));
    ++checked;
  }
  CHECK(checked >= 3);
}
