#include "engine/autograd.h"

#include <doctest/doctest.h>

#include <cmath>

#include "engine/error.h"
#include "tests/unit/llama_graph.h"
#include "tests/unit/reference_backend.h"

using namespace nibble;

namespace {

using Feeds = std::map<std::string, std::vector<double>>;

std::vector<double> normals(std::string_view name, std::size_t count) {
  std::vector<double> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<double>(philox_normal(3, hash_name(name), i));
  }
  return values;
}

int count_op(const Graph& graph, std::int32_t from, OpId op) {
  int count = 0;
  for (std::int32_t id = from; id < graph.size(); ++id) {
    const Node& n = graph.node(id);
    count += n.kind == NodeKind::op && n.op == op;
  }
  return count;
}

// The loss and the accumulators of one run, which start at `start`.
std::vector<std::vector<double>> run_llama(const LlamaShape& shape, double start = 0) {
  LlamaGraph llama = llama_training(shape);
  Feeds feeds = llama_feeds(*llama.graph);
  std::vector<Tensor> outputs = {llama.loss};
  for (const ParameterGradient& p : llama.backward.parameters) {
    outputs.push_back(p.updated);
    feeds[llama.graph->name(p.accumulator.node)].assign(
        static_cast<std::size_t>(p.accumulator.type().elements()), start);
  }
  ReferenceBackend backend;
  return eval(backend, *llama.graph, outputs, feeds);
}

}  // namespace

TEST_CASE("the gradients of several uses of a value are summed") {
  // y = swiglu(x, x) + x + x * f, so that x is used five times.
  const TensorType type{DType::F64, {2, 3}, {}};
  const auto forward = [&](Graph& g) {
    const Tensor x = g.input("x", type), f = g.input("f", {DType::F64, {1}, {}});
    return add(add(swiglu(x, x), add(x, x)), scale(x, f));
  };
  Feeds feeds = {{"x", normals("x", 6)}, {"dy", normals("dy", 6)}, {"f", {-0.7}}};
  Graph g(DType::F64);
  const Tensor x = g.input("x", type);
  g.require_grad(x);
  const Tensor y = forward(g);
  const Seed seeds[] = {{y, g.input("dy", type)}};
  const Backward backward = append_backward(g, seeds);
  CHECK(backward.parameters.empty());
  CHECK(backward.recomputed == 0);
  ReferenceBackend backend;
  const Tensor outputs[] = {backward.inputs[static_cast<std::size_t>(x.node)]};
  const std::vector<double> gradient = eval(backend, g, outputs, feeds)[0];
  const auto objective = [&] {
    Graph plain(DType::F64);
    const Tensor outputs[] = {forward(plain)};
    const std::vector<double> values = eval(backend, plain, outputs, feeds)[0];
    double sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i) sum += values[i] * feeds["dy"][i];
    return sum;
  };
  for (std::size_t i = 0; i < 6; ++i) {
    double& element = feeds["x"][i];
    const double at = element;
    element = at + 1e-5;
    const double above = objective();
    element = at - 1e-5;
    CHECK(gradient[i] == doctest::Approx((above - objective()) / 2e-5).epsilon(1e-7));
    element = at;
  }
}

TEST_CASE("a whole llama step agrees with differences of its loss") {
  const LlamaShape shape;
  LlamaGraph llama = llama_training(shape);
  CHECK(llama.backward.parameters.size() == 2 * 7 * 2);  // A and B of seven linears, two layers
  const auto with_gradients = run_llama(shape);
  ReferenceBackend backend;
  Feeds feeds = llama_feeds(*llama.graph);
  Graph forward(shape.compute);
  const Tensor loss = LlamaBuilder(shape, forward).loss();
  const auto value = [&] { return eval(backend, forward, {&loss, 1}, feeds)[0][0]; };
  CHECK(value() == with_gradients[0][0]);
  for (std::size_t p = 0; p < llama.backward.parameters.size(); ++p) {
    const std::vector<double>& gradient = with_gradients[p + 1];
    std::vector<double>& values = feeds[llama.graph->name(llama.backward.parameters[p].parameter)];
    const std::size_t k = (5 * p) % values.size();
    const double at = values[k];
    values[k] = at + 1e-5;
    const double above = value();
    values[k] = at - 1e-5;
    const double difference = (above - value()) / 2e-5;
    values[k] = at;
    CHECK(std::abs(gradient[k] - difference) <= 1e-7 * std::max(1.0, std::abs(difference)));
    CHECK(difference != 0);
  }
}

TEST_CASE("accumulators are added to") {
  const auto from_zero = run_llama({}), from_two = run_llama({}, 2);
  CHECK(from_zero[0] == from_two[0]);
  for (std::size_t p = 1; p < from_zero.size(); ++p) {
    for (std::size_t i = 0; i < from_zero[p].size(); ++i) {
      CHECK(from_two[p][i] == doctest::Approx(from_zero[p][i] + 2).epsilon(1e-12));
    }
  }
}

TEST_CASE("every rung gives the bytes of storing everything") {
  for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
    LlamaShape shape;
    shape.compute = compute;
    shape.weights = compute;
    const auto stored = run_llama(shape);
    for (const Rung rung : {Rung::cheap, Rung::block}) {
      shape.rung = rung;
      CHECK(run_llama(shape) == stored);
    }
  }
}

TEST_CASE("a segment recomputes what its rung dropped and the gradients ask for, nothing else") {
  LlamaShape shape;
  const auto recomputed = [&](Rung rung) {
    shape.rung = rung;
    const LlamaGraph llama = llama_training(shape);
    const Graph& g = *llama.graph;
    int clones = 0;
    for (std::int32_t id = llama.forward_nodes; id < g.size(); ++id) {
      const Node& n = g.node(id);
      if (n.clone_of < 0) continue;
      ++clones;
      if (rung == Rung::cheap) CHECK(op_def(n.op).cheap);
    }
    CHECK(clones == llama.backward.recomputed);
    return clones;
  };
  CHECK(recomputed(Rung::store) == 0);
  // Per layer two norms, two ropes and one swiglu.
  CHECK(recomputed(Rung::cheap) == 2 * 5);
  // Those, the attention, six linears and the residual addition in the middle. The block's last
  // addition is stored at its boundary, and nothing reads the down projection but that addition:
  // its own gradients want u, which is stored on every rung.
  const int block = recomputed(Rung::block);
  CHECK(block == 2 * 13);
  shape.rung = Rung::block;
  const LlamaGraph llama = llama_training(shape);
  CHECK(count_op(*llama.graph, llama.forward_nodes, OpId::attention) == 2);
  // A linear is repeated from its stored u, without the product with A.
  CHECK(count_op(*llama.graph, llama.forward_nodes, OpId::lora_linear) == 0);
  CHECK(count_op(*llama.graph, llama.forward_nodes, OpId::lora_linear_y) == 2 * 6);
}

TEST_CASE("what a segment's neighbours or the host read is stored, not recomputed") {
  Graph g(DType::F64);
  const TensorType type{DType::F64, {2, 3}, {}};
  const Tensor x = g.input("x", type);
  g.require_grad(x);
  g.begin_segment(Rung::block);
  const Tensor inner = swiglu(x, x);
  const Tensor kept = swiglu(inner, x);
  const Tensor boundary = swiglu(kept, x);
  g.end_segment();
  const Tensor y = swiglu(boundary, boundary);
  g.keep(kept);
  const std::int32_t forward = g.size();
  const Seed seeds[] = {{y, g.input("dy", type)}};
  const Backward backward = append_backward(g, seeds);
  CHECK(backward.recomputed == 1);
  for (std::int32_t id = forward; id < g.size(); ++id) {
    if (g.node(id).clone_of >= 0) CHECK(g.node(id).clone_of == inner.node);
  }
}

TEST_CASE("an op without a gradient rule stops differentiation by name") {
  Graph g;
  const TensorType type{DType::F32, {2, 3}, {}};
  const Tensor p = g.parameter("p", type);
  const Tensor y = accumulate(fill(g, type, 0), p);
  const Seed seeds[] = {{y, g.input("dy", type)}};
  try {
    append_backward(g, seeds);
    FAIL("accumulate has no gradient rule, but no error came");
  } catch (const Unsupported& e) {
    CHECK(std::string(e.what()).starts_with("accumulate"));
  }
}

TEST_CASE("a gradient has the shape of its value") {
  Graph g;
  const Tensor p = g.parameter("p", {DType::F32, {2, 3}, {}});
  const Tensor y = add(p, p);
  const Seed seeds[] = {{y, g.input("dy", {DType::F32, {3, 2}, {}})}};
  CHECK_THROWS_AS(append_backward(g, seeds), ShapeError);
}

TEST_CASE("no path from the seed, no gradient") {
  Graph g;
  const TensorType type{DType::F32, {2, 3}, {}};
  g.parameter("unused", type);
  const Tensor p = g.parameter("p", type);
  const Seed seeds[] = {{add(p, p), g.input("dy", type)}};
  const Backward backward = append_backward(g, seeds);
  REQUIRE(backward.parameters.size() == 1);
  CHECK(g.name(backward.parameters[0].parameter) == "p");
  CHECK(g.name(backward.parameters[0].accumulator.node) == "p.grad");
  CHECK_FALSE(g.find("unused.grad"));
}

TEST_CASE("streamed weights come back in reverse order, two groups ahead of the one that is read") {
  const std::vector<std::int64_t> groups = {0, 1, 4, 5, 9};  // blocks between them stay
  const TensorType type{DType::F64, {3, 3}, {}};
  const auto weight_name = [](std::int64_t group) { return "w" + std::to_string(group); };
  Graph g(DType::F64);
  Tensor x = g.input("x", {DType::F64, {2, 3}, {}});
  g.require_grad(x);
  Feeds feeds = {{"x", normals("x", 6)}, {"dy", normals("dy", 6)}};
  Tensor plain = x;
  for (const std::int64_t group : groups) {
    const Tensor w = g.stream(weight_name(group), type, group);
    CHECK(g.weight(weight_name(group), type).node == w.node);
    x = linear(x, w);
    plain = linear(plain, g.weight("plain." + weight_name(group), type));
    feeds[weight_name(group)] = feeds["plain." + weight_name(group)] =
        normals(weight_name(group), 9);
  }
  const std::int32_t forward = g.size();
  const Tensor dy = g.input("dy", {DType::F64, {2, 3}, {}});
  const Seed seed{x, dy};
  const Tensor dx = append_backward(g, {&seed, 1}).inputs[0];
  std::vector<std::int64_t> brought;
  std::size_t read = 0;
  for (std::int32_t id = forward; id < g.size(); ++id) {
    const Node& n = g.node(id);
    if (n.kind == NodeKind::op && n.op == OpId::page_in) {
      brought.push_back(std::stoll(g.name(n.inputs[0].node).substr(1)));
    } else if (n.kind == NodeKind::op) {
      ++read;  // every other op here reads the next weight
      CHECK(brought.size() == std::min(read + 2, groups.size()));
    }
  }
  CHECK(read == groups.size());
  CHECK(brought == std::vector<std::int64_t>(groups.rbegin(), groups.rend()));
  const Seed plain_seed{plain, dy};
  const Tensor plain_dx = append_backward(g, {&plain_seed, 1}).inputs[0];
  ReferenceBackend backend;
  const Tensor outputs[] = {x, plain, dx, plain_dx};
  const auto values = eval(backend, g, outputs, feeds);
  CHECK(values[0] == values[1]);
  CHECK(values[2] == values[3]);
}
