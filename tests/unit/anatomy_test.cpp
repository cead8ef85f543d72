#include "engine/anatomy.h"

#include <doctest/doctest.h>

#include <algorithm>

#include "engine/op.h"
#include "tests/unit/llama_graph.h"
#include "tests/unit/reference_backend.h"

using namespace nibble;

namespace {

constexpr std::int64_t kLayers = 3;

struct Planned {
  explicit Planned(Rung rung) {
    LlamaShape shape{.rows = 40, .layers = kLayers};
    shape.rung = rung;
    llama = llama_training(shape);
    backend.scratch = [](const OpCall& call) {
      return call.node->op == OpId::lora_linear ? std::int64_t{1000} : std::int64_t{0};
    };
    plan = make_plan(*llama.graph, backend);
    purpose = purposes(plan, llama.loss.node);
  }
  std::ptrdiff_t count(Purpose p) const { return std::count(purpose.begin(), purpose.end(), p); }
  std::vector<Ref> holders(Purpose p) const {
    std::vector<Ref> result;
    for (std::size_t i = 0; i < purpose.size(); ++i) {
      if (purpose[i] == p) result.push_back(plan.stays[i].holder);
    }
    return result;
  }
  OpId op(Ref ref) const { return llama.graph->node(ref.node).op; }

  LlamaGraph llama;
  ReferenceBackend backend;
  Plan plan;
  std::vector<Purpose> purpose;
};

}  // namespace

TEST_CASE("every stay has a purpose that the graph bears out") {
  for (const Rung rung : {Rung::store, Rung::cheap, Rung::block}) {
    CAPTURE(static_cast<int>(rung));
    const Planned p(rung);
    REQUIRE(p.purpose.size() == p.plan.stays.size());
    // What each block hands on; and what the embedding does, where the first block is recomputed
    // from it: nothing trained lies before it, so that its gradient is not asked for.
    const std::vector<Ref> inputs = p.holders(Purpose::block_input);
    const bool first = rung != Rung::store;
    REQUIRE(std::ssize(inputs) == kLayers + first);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      CHECK(p.op(inputs[i]) == (first && i == 0 ? OpId::embedding : OpId::add));
    }
    CHECK((p.count(Purpose::recomputed) > 0) == (rung != Rung::store));
    CHECK(p.count(Purpose::gradient) > 0);
    CHECK(p.count(Purpose::passing) > 0);
    CHECK(p.count(Purpose::returned) == 0);
    for (const Ref ref : p.holders(Purpose::scratch)) CHECK(ref.output == -1);
    for (const Ref ref : p.holders(Purpose::recomputed)) CHECK(ref.node > p.llama.loss.node);
    for (const Ref ref : p.holders(Purpose::stored)) {
      CHECK(ref.node < p.llama.loss.node);
      // Of a block whose values are dropped, only what its ops say is stored on every rung stays.
      const bool in_block = p.llama.graph->node(ref.node).segment >= 0;
      if (rung == Rung::block && in_block) CHECK((op_def(p.op(ref)).stored >> ref.output & 1) != 0);
    }
  }
}

TEST_CASE("scratch is in the picture of the steps that ask for it") {
  const Planned p(Rung::block);
  const auto asks = [&](std::int32_t id) {
    return p.llama.graph->node(id).op == OpId::lora_linear;
  };
  CHECK(p.count(Purpose::scratch) == std::count_if(p.plan.steps.begin(), p.plan.steps.end(), asks));
}

TEST_CASE("what waits on the host returns as a copy, and is not stored in between") {
  Graph g(DType::F64);
  const TensorType type{DType::F64, {8, 16}, {}};
  const Tensor w = g.parameter("w", {DType::F64, {16, 16}, {}});
  const Tensor h = linear(g.input("x", type), w);
  g.offload(h, "h", 0);
  g.begin_segment(Rung::store);
  const Tensor y = linear(h, w);
  g.end_segment();
  const std::int32_t first_backward = g.size();
  const Seed seeds[] = {{y, fill(g, type, 1)}};
  append_backward(g, seeds);
  ReferenceBackend backend;
  const Plan plan = make_plan(g, backend);
  const std::vector<Purpose> purpose = purposes(plan, first_backward);
  for (std::size_t i = 0; i < purpose.size(); ++i) {
    const Ref holder = plan.stays[i].holder;
    if (holder == Ref{h.node, 0}) CHECK(purpose[i] == Purpose::passing);
    if (g.node(holder.node).op == OpId::page_in) CHECK(purpose[i] == Purpose::returned);
  }
  CHECK(std::count(purpose.begin(), purpose.end(), Purpose::returned) == 1);
}

TEST_CASE("blocks follow each other, and in the backward pass in reverse") {
  for (const Rung rung : {Rung::store, Rung::cheap, Rung::block}) {
    const Planned p(rung);
    std::vector<std::int32_t> order;
    for (const std::int32_t block : blocks(p.plan, p.llama.loss.node)) {
      if (order.empty() || order.back() != block) order.push_back(block);
    }
    CHECK(order == std::vector<std::int32_t>{-1, 0, 1, 2, -1, 2, 1, 0});
  }
}
