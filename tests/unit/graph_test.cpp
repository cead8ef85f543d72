#include "engine/graph.h"

#include <doctest/doctest.h>

#include "engine/error.h"
#include "engine/op.h"
#include "engine/ops.h"

using namespace nibble;

namespace {
const TensorType kMatrix{DType::F32, {3, 4}, {}};

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}
}  // namespace

TEST_CASE("the op table is in the order of ops.def") {
#define NIBBLE_OP(op) CHECK(op_def(OpId::op).name == #op);
#include "engine/ops.def"
#undef NIBBLE_OP
}

TEST_CASE("a leaf's name is its identity") {
  Graph g;
  const Tensor x = g.input("x", kMatrix);
  CHECK(g.input("x", kMatrix).node == x.node);
  CHECK(g.size() == 1);
  CHECK_THROWS_AS(g.weight("x", kMatrix), ShapeError);
  CHECK_THROWS_AS(g.input("x", {DType::F32, {4, 3}, {}}), ShapeError);
  CHECK(g.find("x").node == x.node);
  CHECK_FALSE(g.find("y"));
  CHECK(g.name(x.node) == "x");
}

TEST_CASE("leaves must fit their storage type, graphs compute in a float type") {
  Graph g;
  CHECK_THROWS_AS(g.weight("w", {DType::Q8_0, {4, 33}, {}}), ShapeError);
  CHECK(g.size() == 0);
  CHECK_THROWS_AS(Graph{DType::F16}, ShapeError);
  CHECK_THROWS_AS(Graph{DType::NF4}, ShapeError);
  CHECK(Graph(DType::BF16).accumulate() == DType::F32);
  CHECK(Graph(DType::F64).accumulate() == DType::F64);
}

TEST_CASE("append refuses what is not a value of this graph and leaves the graph as it was") {
  Graph g, other;
  const Tensor x = g.input("x", kMatrix);
  const Tensor foreign = other.input("x", kMatrix);
  CHECK(message_of([&] { add(x, foreign); }).find("another graph") != std::string::npos);
  CHECK(message_of([&] { add(x, {}); }).starts_with("add: input 1 is empty"));
  CHECK(message_of([&] { add(x, g.input("y", {DType::F32, {3, 5}, {}})); }).starts_with("add: "));
  const std::vector<Tensor> nine(9, x);
  CHECK_THROWS_AS(g.append(OpId::add, nine, {}), ShapeError);
  CHECK(g.size() == 2);
}

TEST_CASE("inputs have smaller ids, and needs_grad follows parameters") {
  Graph g;
  const Tensor x = g.input("x", kMatrix);
  const Tensor frozen = scale(x, g.input("factor", {DType::F32, {1}, {}}));
  const Tensor trained = add(frozen, g.parameter("p", kMatrix));
  CHECK_FALSE(g.node(frozen.node).needs_grad);
  CHECK(g.node(trained.node).needs_grad);
  for (std::int32_t id = 0; id < g.size(); ++id) {
    for (int i = 0; i < g.node(id).n_inputs; ++i) {
      CHECK(g.node(id).inputs[static_cast<std::size_t>(i)].node < id);
    }
  }
  const std::string text = g.str();
  CHECK(text.find("parameter \"p\"") != std::string::npos);
  CHECK(text.find("= add(") != std::string::npos);
}

TEST_CASE("an outdated version of a state is not readable") {
  Graph g;
  const Tensor x = g.input("x", kMatrix);
  const Tensor s0 = g.state("s", kMatrix);
  const Tensor s1 = accumulate(s0, x);
  const Tensor s2 = accumulate(s1, x);
  g.check();
  CHECK(state_root(g, {s2.node, 0}) == Ref{s0.node, 0});
  CHECK(state_root(g, {x.node, 0}) == Ref{x.node, 0});
  SUBCASE("the leaf itself") { add(s0, x); }
  SUBCASE("a version in between") { add(x, s1); }
  SUBCASE("updating it again") { accumulate(s0, x); }
  const std::string message = message_of([&] { g.check(); });
  CHECK(message.find("outdated") != std::string::npos);
  CHECK(message.find("\"s\"") != std::string::npos);
}

TEST_CASE("reading the newest version is fine, also before a later update") {
  Graph g;
  const Tensor x = g.input("x", kMatrix);
  const Tensor s1 = accumulate(g.state("s", kMatrix), x);
  const Tensor y = add(s1, x);
  accumulate(s1, y);
  CHECK_NOTHROW(g.check());
}

TEST_CASE("segments do not nest, and clones belong to none") {
  Graph g;
  const Tensor x = g.input("x", kMatrix);
  g.begin_segment(Rung::block);
  CHECK_THROWS_AS(g.begin_segment(Rung::block), Error);
  const Tensor y = add(x, x);
  g.end_segment();
  CHECK(g.node(y.node).segment == 0);
  CHECK(g.node(add(y, x).node).segment == -1);
  const Node node = g.node(y.node);
  const std::int32_t clone = g.clone(y.node, {node.inputs.data(), node.n_inputs});
  CHECK(g.node(clone).segment == -1);
  CHECK(g.node(clone).clone_of == y.node);
  CHECK(g.node(clone).outputs[0] == node.outputs[0]);
}

TEST_CASE("keep lists a value once") {
  Graph g;
  const Tensor x = g.input("x", kMatrix);
  const Tensor y = add(x, x);
  g.keep(y);
  g.keep(y);
  CHECK(g.kept().size() == 1);
}
