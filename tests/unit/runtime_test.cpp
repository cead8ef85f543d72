#include "engine/runtime.h"

#include <doctest/doctest.h>

#include <cmath>

#include "engine/error.h"
#include "engine/quantize.h"
#include "tests/unit/llama_graph.h"
#include "tests/unit/reference_backend.h"

using namespace nibble;

namespace {

const TensorType kRow{DType::F32, {1, 4}, {}};

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

// Memory for the weights and parameters of a graph, bound by name.
struct Weights {
  std::vector<std::unique_ptr<Buffer>> buffers;
  void bind(Runtime& runtime, const Graph& graph) {
    const auto feeds = llama_feeds(graph);
    for (std::int32_t id = 0; id < graph.size(); ++id) {
      const Node& n = graph.node(id);
      if (n.kind != NodeKind::weight && n.kind != NodeKind::parameter) continue;
      const std::vector<std::byte> contents = encode(n.outputs[0], feeds.at(graph.name(id)));
      buffers.push_back(
          runtime.backend().allocate(static_cast<std::int64_t>(contents.size()), graph.name(id)));
      runtime.backend().upload(buffers.back()->data(), contents);
      runtime.bind(graph.name(id), buffers.back()->data());
    }
  }
};

}  // namespace

TEST_CASE("what allocate() takes is what was announced, to the byte") {
  ReferenceBackend backend;
  backend.scratch = [](const OpCall& call) { return call.in_types[0].elements() % 777; };
  Runtime runtime(backend);
  Weights weights;
  for (const Rung rung : {Rung::store, Rung::block}) {
    for (const std::int64_t rows : {6, 10}) {
      LlamaShape shape;
      shape.rows = rows;
      shape.rung = rung;
      runtime.add(llama_training(shape).graph);
    }
  }
  weights.bind(runtime, runtime.graph(0));
  const std::int64_t before = backend.allocated_bytes();
  const std::int64_t announced =
      runtime.arena_bytes() + runtime.input_bytes() + runtime.state_bytes();
  runtime.allocate();
  CHECK(backend.allocated_bytes() - before == announced);
  CHECK(runtime.arena_bytes() % 64 == 0);
  std::int64_t largest = 0;
  for (int p = 0; p < 4; ++p) largest = std::max(largest, runtime.plan(p).arena_bytes);
  CHECK(runtime.arena_bytes() == largest);
  for (int p = 0; p < 4; ++p) {
    for (const auto& [name, values] : llama_feeds(runtime.graph(p))) {
      const Node& leaf = runtime.graph(p).node(runtime.graph(p).find(name).node);
      if (leaf.kind == NodeKind::input) {
        runtime.write(name, std::span<const std::byte>(encode(leaf.outputs[0], values)));
      }
    }
    runtime.run(p);
  }
  CHECK(backend.allocated_bytes() - before == announced);
}

TEST_CASE("programs see the same states and inputs by name") {
  ReferenceBackend backend;
  Runtime runtime(backend);
  for (int p = 0; p < 2; ++p) {
    auto graph = std::make_unique<Graph>();
    accumulate(graph->state("sum", kRow), graph->input("x", kRow));
    if (p == 1) accumulate(graph->state("other", kRow), graph->input("x", kRow));
    CHECK(runtime.add(std::move(graph)) == p);
  }
  runtime.allocate();
  const std::vector<float> x = {1, 2, 3, 4};
  runtime.write<float>("x", x);
  for (const int program : {0, 1, 0}) runtime.run(program);
  std::vector<float> sum(4), other(4);
  runtime.read("sum", std::as_writable_bytes(std::span(sum)));
  runtime.read("other", std::as_writable_bytes(std::span(other)));
  CHECK(sum == std::vector<float>{3, 6, 9, 12});
  CHECK(other == x);
}

TEST_CASE("a leaf may live in the caller's memory") {
  ReferenceBackend backend;
  Runtime runtime(backend);
  auto graph = std::make_unique<Graph>();
  const Tensor y = add(graph->weight("w", kRow), graph->input("x", kRow));
  graph->keep(y);
  accumulate(graph->state("s", kRow), y);
  runtime.add(std::move(graph));
  std::vector<float> w = {1, 1, 2, 2}, s = {5, 6, 7, 8};
  runtime.bind("w", std::as_writable_bytes(std::span(w)).data());
  runtime.bind("s", std::as_writable_bytes(std::span(s)).data());
  CHECK(runtime.state_bytes() == 0);
  runtime.allocate();
  const std::vector<float> x = {1, 2, 3, 4};
  runtime.write<float>("x", x);
  runtime.run(0);
  CHECK(s == std::vector<float>{7, 9, 12, 14});  // not cleared, and updated in place
  std::vector<float> result(4);
  runtime.read(0, {y.node, 0}, std::as_writable_bytes(std::span(result)));
  CHECK(result == std::vector<float>{2, 3, 5, 6});
  int steps = 0;
  runtime.run_checked(0, [&](std::int32_t, const OpCall&, double) { ++steps; });
  CHECK(steps == 2);
}

TEST_CASE("what is missing or does not fit is named") {
  ReferenceBackend backend;
  Runtime runtime(backend);
  auto graph = std::make_unique<Graph>();
  graph->keep(add(graph->weight("blk.0.w", kRow), graph->input("x", kRow)));
  runtime.add(std::move(graph));
  CHECK(error_of([&] { runtime.allocate(); }).find("\"blk.0.w\"") != std::string::npos);
  const std::vector<float> five(5);
  CHECK_THROWS_AS(runtime.write<float>("x", five), ShapeError);
  CHECK(error_of([&] { runtime.write<float>("y", five); }).find("\"y\"") != std::string::npos);
  auto clash = std::make_unique<Graph>();
  clash->keep(add(clash->state("x", kRow), clash->input("z", kRow)));
  CHECK(error_of([&] { runtime.add(std::move(clash)); }).find("\"x\"") != std::string::npos);
}

TEST_CASE("eval computes named values and wants every input") {
  ReferenceBackend backend;
  Graph g;
  const Tensor y = add(g.input("a", kRow), g.input("b", kRow));
  const Tensor z = add(y, y);
  const Tensor outputs[] = {y, z};
  const auto values = eval(backend, g, outputs, {{"a", {1, 2, 3, 4}}, {"b", {1, 1, 1, 0.5}}});
  CHECK(values[0] == std::vector<double>{2, 3, 4, 4.5});
  CHECK(values[1] == std::vector<double>{4, 6, 8, 9});
  CHECK(backend.allocated_bytes() == 0);
  CHECK(error_of([&] {
          eval(backend, g, outputs, {{"a", {1, 2, 3, 4}}});
        }).find("\"b\"") != std::string::npos);
  CHECK_THROWS_AS(eval(backend, g, outputs, {{"a", {1}}, {"b", {1}}}), ShapeError);
}

TEST_CASE("encode rounds to the dtype and decode gives exactly that back") {
  const std::vector<double> values = {0, 1, -2.5, 3.14159265358979, 1e-3, 100, -7, 0.3};
  for (const DType d : {DType::F64, DType::F32, DType::BF16, DType::F16}) {
    const TensorType type{d, {2, 4}, {}};
    const std::vector<double> once = decode(type, encode(type, values).data());
    CHECK(decode(type, encode(type, once).data()) == once);
    const double relative = d == DType::F64   ? 0
                            : d == DType::F32 ? 0x1p-24
                            : d == DType::F16 ? 0x1p-11
                                              : 0x1p-8;
    for (std::size_t i = 0; i < values.size(); ++i) {
      CHECK(std::abs(once[i] - values[i]) <= relative * std::abs(values[i]));
    }
  }
  for (const DType d : {DType::I64, DType::I32, DType::I8}) {
    const TensorType type{d, {3}, {}};
    const std::vector<double> whole = {-7, 0, 100};
    CHECK(decode(type, encode(type, whole).data()) == whole);
  }
}
