// Plans of random programs, of llama's steps and of small cases: sound by the checks of
// plan_checks.h, close to their lower bound, and random programs compute the same as with every
// value in memory of its own.
#include "engine/plan.h"
#include "engine/storage.h"

#include <doctest/doctest.h>

#include <random>

#include "engine/error.h"
#include "tests/unit/llama_graph.h"
#include "tests/unit/plan_checks.h"
#include "tests/unit/reference_backend.h"

using namespace nibble;
using namespace nibble::test;

namespace {

// A plan in which no two values share memory: what any plan must compute the same as.
Plan unshared(const Graph& graph, const Backend& backend) {
  Plan plan = make_plan(graph, backend);
  std::int64_t next = 0;
  for (const std::int32_t id : plan.steps) {
    const Node& n = graph.node(id);
    const int updated = updated_input(op_def(n.op));
    for (int o = 0; o < n.n_outputs; ++o) {
      Location& at = plan.locations[static_cast<std::size_t>(id)][static_cast<std::size_t>(o)];
      if (o == 0 && updated >= 0) {
        at = plan.at(n.inputs[static_cast<std::size_t>(updated)]);
      } else {
        at.offset = next;
        next += round_up(bytes(n.outputs[static_cast<std::size_t>(o)]), 64);
      }
    }
    if (plan.scratch[static_cast<std::size_t>(id)] >= 0) {
      plan.scratch[static_cast<std::size_t>(id)] = next;
      next += round_up(backend.scratch_bytes(describe(graph, id)), 64);
    }
  }
  plan.arena_bytes = next;
  return plan;
}

std::vector<std::vector<std::byte>> run(const Plan& plan, Backend& backend) {
  const Graph& graph = *plan.graph;
  std::vector<std::unique_ptr<Buffer>> buffers;
  Bindings bindings;
  bindings.leaves.resize(static_cast<std::size_t>(graph.size()));
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    if (graph.node(id).kind == NodeKind::op) continue;
    const TensorType& type = graph.node(id).outputs[0];
    std::vector<double> values(static_cast<std::size_t>(type.elements()));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<double>(philox_normal(5, static_cast<std::uint64_t>(id), i));
    }
    const std::vector<std::byte> contents = encode(type, values);
    buffers.push_back(backend.allocate(static_cast<std::int64_t>(contents.size()), "leaf"));
    backend.upload(buffers.back()->data(), contents);
    bindings.leaves[static_cast<std::size_t>(id)] = buffers.back()->data();
  }
  const auto arena = backend.allocate(plan.arena_bytes, "arena");
  bindings.arena = arena->data();
  backend.compile(plan, bindings)->run();
  std::vector<std::vector<std::byte>> results;
  for (const Ref ref : graph.kept()) {
    const Location& at = plan.at(ref);
    const std::byte* from = at.kind == Location::Kind::arena
                                ? arena->data() + at.offset
                                : bindings.leaves[static_cast<std::size_t>(at.leaf)];
    results.emplace_back(static_cast<std::size_t>(bytes(graph.type(ref))));
    backend.download(results.back(), from);
  }
  return results;
}

// A program of elementwise ops, norms and state updates with several outputs, reuse and dead ends.
std::unique_ptr<Graph> random_graph(std::mt19937& random) {
  auto graph = std::make_unique<Graph>(DType::F32);
  Graph& g = *graph;
  const auto draw = [&](std::size_t count) {
    return std::uniform_int_distribution<std::size_t>(0, count - 1)(random);
  };
  const TensorType type{DType::F32, {3, static_cast<std::int64_t>(draw(9) + 1)}, {}};
  const Tensor factors = g.weight("w", {DType::F32, {type.shape[1]}, {}});
  const Tensor factor = g.input("f", {DType::F32, {1}, {}});
  std::vector<Tensor> values = {g.input("x0", type), g.input("x1", type)};
  std::vector<Tensor> states = {g.state("s0", type), fill(g, type, 0.5)};
  const std::size_t steps = 3 + draw(25);
  for (std::size_t s = 0; s < steps; ++s) {
    // Recent values more often than old ones, so that many inputs die where they are read.
    const auto pick = [&] {
      return values[values.size() - 1 - draw(std::min<std::size_t>(4, values.size()))];
    };
    switch (draw(7)) {
      case 0:
        values.push_back(add(pick(), pick()));
        break;
      case 1:
        values.push_back(scale(pick(), factor));
        break;
      case 2:
        values.push_back(swiglu(pick(), pick()));
        break;
      case 3:
        values.push_back(rms_norm(pick(), factors, 1e-5f));
        break;
      case 4: {
        const Tensor both = swiglu_backward(pick(), pick(), pick());
        values.push_back(both);
        values.push_back(g.output_of(both, 1));
        break;
      }
      case 5:
        values.push_back(rms_norm_dx(pick(), factors, pick(), 1e-5f));
        break;
      default: {
        Tensor& state = states[draw(states.size())];
        state = accumulate(state, pick());
      }
    }
    if (draw(6) == 0) g.keep(values.back());
  }
  for (const Tensor& state : states) g.keep(state);
  g.keep(values.back());
  return graph;
}

double megabytes(std::int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

}  // namespace

TEST_CASE("random programs: every value is there when it is read, and results are right") {
  std::mt19937 random(11);
  ReferenceBackend backend;
  backend.scratch = [](const OpCall& call) {
    return call.node->op == OpId::swiglu ? std::int64_t{100} : std::int64_t{0};
  };
  int shared = 0;
  for (int i = 0; i < 1000; ++i) {
    const auto graph = random_graph(random);
    const Plan plan = make_plan(*graph, backend);
    const std::string problem = wrong_with(plan, backend);
    if (!problem.empty()) FAIL(problem << "\n" << graph->str());
    shared += plan.arena_bytes < plan.unshared_bytes;
    CHECK(plan.arena_bytes >= plan.lower_bound_bytes);
    if (run(plan, backend) != run(unshared(*graph, backend), backend)) {
      FAIL("sharing memory changes the results of\n" << graph->str());
    }
  }
  CHECK(shared > 500);
}

TEST_CASE("llama steps are planned soundly at every rung") {
  ReferenceBackend backend;
  backend.scratch = [](const OpCall& call) {
    return call.node->op == OpId::lora_linear ? std::int64_t{1000} : std::int64_t{0};
  };
  for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
    LlamaShape shape;
    shape.rung = rung;
    shape.layers = 4;
    const LlamaGraph llama = llama_training(shape);
    const Plan plan = make_plan(*llama.graph, backend);
    CHECK(wrong_with(plan, backend) == "");
    const Plan again = make_plan(*llama.graph, backend);
    CHECK(again.arena_bytes == plan.arena_bytes);
    CHECK(again.steps == plan.steps);
  }
}

TEST_CASE("the arena of a 7B training step is close to its lower bound") {
  ReferenceBackend backend;
  backend.scratch = [](const OpCall& call) {  // a dequantized weight, as a device would want it
    const bool wants = call.node->op == OpId::lora_linear || call.node->op == OpId::lora_linear_dx;
    return wants ? 2 * call.in_types[1].elements() : std::int64_t{0};
  };
  LlamaShape shape{.rows = 2048,
                   .layers = 32,
                   .heads = 32,
                   .kv_heads = 32,
                   .head_dim = 128,
                   .ffn = 11008,
                   .vocabulary = 32000,
                   .rank = 16,
                   .compute = DType::BF16,
                   .weights = DType::NF4};
  std::int64_t stored = 0;
  for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
    shape.rung = rung;
    const LlamaGraph llama = llama_training(shape);
    const Plan plan = make_plan(*llama.graph, backend);
    const double ratio =
        static_cast<double>(plan.arena_bytes) / static_cast<double>(plan.lower_bound_bytes);
    MESSAGE("rung ", static_cast<int>(rung), ": ", plan.steps.size(), " steps, arena ",
            megabytes(plan.arena_bytes), " MiB, ", ratio, " of the lower bound, ",
            megabytes(plan.unshared_bytes), " MiB unshared");
    CHECK(wrong_with(plan, backend) == "");
    CHECK(ratio < 1.001);
    if (rung == Rung::store) stored = plan.arena_bytes;
    if (rung == Rung::block) CHECK(plan.arena_bytes * 5 < stored);
  }
}

// A kernel that does several steps reads all their inputs while it writes all their outputs: two of
// these values lie apart, or, where an op may overwrite its input, at the same address.
TEST_CASE("the values of steps that run as one kernel do not overlap") {
  for (const std::size_t group : {2, 3, 5}) {
    for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
      LlamaShape shape{.rows = 40, .layers = 3};
      shape.rung = rung;
      const LlamaGraph llama = llama_training(shape);
      const Graph& g = *llama.graph;
      ReferenceBackend backend;
      backend.group = group;
      const Plan plan = make_plan(g, backend);
      CHECK(wrong_with_stays(plan, backend) == "");
      for (std::size_t first = 0; first < plan.steps.size();) {
        std::vector<Ref> values, written;
        std::size_t end = first;
        do {
          const Node& n = g.node(plan.steps[end]);
          for (int i = 0; i < n.n_inputs; ++i) {
            values.push_back(n.inputs[static_cast<std::size_t>(i)]);
          }
          for (int o = 0; o < n.n_outputs; ++o) {
            values.push_back({plan.steps[end], o});
            written.push_back({plan.steps[end], o});
          }
          ++end;
        } while (end < plan.steps.size() && plan.fused[end]);
        CHECK(end - first <= group);
        for (const Ref& a : written) {
          for (const Ref& b : values) {
            const Location &at = plan.at(a), &other = plan.at(b);
            if (at.kind != Location::Kind::arena || other.kind != Location::Kind::arena) continue;
            if (at.offset == other.offset) continue;
            const bool apart = at.offset + bytes(g.type(a)) <= other.offset ||
                               other.offset + bytes(g.type(b)) <= at.offset;
            CHECK_MESSAGE(apart, "%" << a.node << " and %" << b.node << " in a group of " << group);
          }
        }
        first = end;
      }
    }
  }
}

TEST_CASE("a chain of in-place ops needs one value's memory") {
  Graph g;
  const TensorType type{DType::F32, {16, 16}, {}};
  const Tensor factor = g.input("f", {DType::F32, {1}, {}});
  Tensor x = scale(g.input("x", type), factor);
  for (int i = 0; i < 10; ++i) x = scale(x, factor);
  g.keep(x);
  ReferenceBackend backend;
  const Plan plan = make_plan(g, backend);
  CHECK(plan.steps.size() == 11);
  CHECK(plan.arena_bytes == bytes(type));
  CHECK(plan.lower_bound_bytes == bytes(type));
}

TEST_CASE("a kept value is not overwritten, a leaf never") {
  Graph g;
  const TensorType type{DType::F32, {16, 16}, {}};
  const Tensor factor = g.input("f", {DType::F32, {1}, {}});
  const Tensor x = g.input("x", type);
  const Tensor a = scale(x, factor), b = scale(a, factor);
  g.keep(a);
  g.keep(b);
  ReferenceBackend backend;
  const Plan plan = make_plan(g, backend);
  CHECK(plan.arena_bytes == 2 * bytes(type));
  CHECK(plan.at({x.node, 0}).kind == Location::Kind::leaf);
  CHECK(plan.at({a.node, 0}).kind == Location::Kind::arena);
}

TEST_CASE("state versions lie in the memory of their leaf") {
  Graph g;
  const TensorType type{DType::F32, {4, 4}, {}};
  const Tensor s = g.state("s", type), x = g.input("x", type);
  const Tensor s1 = accumulate(s, x), s2 = accumulate(s1, x);
  ReferenceBackend backend;
  const Plan plan = make_plan(g, backend);
  CHECK(plan.steps == std::vector<std::int32_t>{s1.node, s2.node});  // an update needs no keep()
  for (const Tensor& t : {s, s1, s2}) {
    CHECK(plan.at({t.node, 0}).kind == Location::Kind::leaf);
    CHECK(plan.at({t.node, 0}).leaf == s.node);
  }
  CHECK(plan.arena_bytes == 0);
  accumulate(s1, x);
  CHECK_THROWS_AS(make_plan(g, backend), Error);
}

TEST_CASE("nodes that lead nowhere are left out") {
  Graph g;
  const TensorType type{DType::F32, {4, 4}, {}};
  const Tensor x = g.input("x", type);
  const Tensor used = add(x, x);
  const Tensor dead = swiglu(used, x);
  add(dead, dead);
  g.keep(used);
  ReferenceBackend backend;
  backend.missing = OpId::swiglu;  // what is left out needs no kernel
  const Plan plan = make_plan(g, backend);
  CHECK(plan.steps == std::vector<std::int32_t>{used.node});
  CHECK(plan.at({dead.node, 0}).kind == Location::Kind::none);
}

TEST_CASE("a missing kernel is named with its dtypes and backend") {
  const LlamaGraph llama = llama_training({});
  ReferenceBackend backend;
  backend.missing = OpId::rope;
  try {
    make_plan(*llama.graph, backend);
    FAIL("a plan was made without a kernel");
  } catch (const Unsupported& e) {
    const std::string message = e.what();
    CHECK(message.find("reference") != std::string::npos);
    CHECK(message.find("rope(F64, I32, F64)") != std::string::npos);
  }
}

TEST_CASE("a storage policy is written and read") {
  CHECK(StoragePolicy{}.str() == "store");
  const StoragePolicy split{.rung = Rung::store, .lean = Rung::block, .split = 7};
  CHECK(split.str() == "block:7+store");
  CHECK(split.of(6) == Rung::block);
  CHECK(split.of(7) == Rung::store);
  for (const char* text : {"store",
                           "cheap",
                           "block",
                           "cheap:1+store",
                           "block:12+cheap",
                           "block:2+attention",
                           "block,offload:inputs",
                           "store,stream:3",
                           "cheap:3+store,offload:gate",
                           "block,offload:gate:5",
                           "cheap,offload:inputs:2,stream:1",
                           "attention,offload:inputs,stream:12",
                           "store,loss:512",
                           "block,stream:2,loss:1024",
                           "block,offload:inputs+gate",
                           "block:2+cheap,offload:inputs+gate:5,stream:3",
                           "cheap,offload:inputs+gate+up:7",
                           "block,offload:up,mlp:512",
                           "store,mlp:512",
                           "block,offload:inputs,mlp:8192,loss:512"}) {
    const auto policy = StoragePolicy::parse(text);
    REQUIRE(policy);
    CHECK(policy->str() == text);
  }
  for (const char* text : {"",
                           "auto",
                           "cheap:+store",
                           "cheap:0+store",
                           "cheap:-1+store",
                           "store:2+cheap",
                           "cheap:2",
                           "cheap:2+cheap",
                           "cheap:2+",
                           "cheap:2x+store",
                           "+store",
                           ",offload:gate",
                           "store,offload",
                           "store,offload:",
                           "cheap,offload:gate+store",
                           "store,stream:0",
                           "store,stream:",
                           "store,stream:2,offload:gate",
                           "stream:2",
                           "store,loss:100",
                           "store,mlp:100",
                           "store,loss:512,mlp:512",
                           "store,offload:gate:0",
                           "store,offload:gate:",
                           "store,offload:2",
                           "store,loss:512,stream:2"}) {
    CHECK_FALSE(StoragePolicy::parse(text));
  }
}
