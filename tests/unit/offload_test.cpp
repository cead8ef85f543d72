// Drawn programs of which some values wait on the host for the backward pass, and some weights come
// from there for each use: loss and gradients have the bytes that they have without, their plans
// are sound, and the backward pass reads what came back, so that what left need not be kept.
#include <doctest/doctest.h>

#include <random>

#include "engine/autograd.h"
#include "engine/ops.h"
#include "engine/philox.h"
#include "engine/plan.h"
#include "tests/unit/plan_checks.h"
#include "tests/unit/reference_backend.h"

using namespace nibble;
using namespace nibble::test;

namespace {

enum class Place { device, host };

// A chain of blocks. Drawn twice from one seed it is the same program; with Place::host values
// leave for the host, and the weights of some blocks come from there.
class Program {
 public:
  Program(unsigned seed, DType compute, Place place)
      : graph(compute), random_(seed), place_(place) {
    type_ = {compute, {draw(1, 5), 2 * draw(1, 4)}, {}};
    const Tensor x = graph.input("x", type_);
    graph.require_grad(x);
    values_ = {x};
    const std::int64_t blocks = draw(1, 6), ahead = draw(0, 2);
    for (std::int64_t b = 0; b < blocks; ++b) streams_.push_back(draw(0, 1) == 1);
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (; streamed_ < blocks && streamed_ <= b + ahead; ++streamed_) stream(streamed_);
      block(b);
    }
    forward_nodes = graph.size();
    const Seed seed_gradient{values_.back(), graph.input("dy", type_)};
    const Backward backward = append_backward(graph, {&seed_gradient, 1});
    recomputed = backward.recomputed;
    outputs = {values_.back()};
    if (const Tensor dx = backward.inputs[static_cast<std::size_t>(x.node)]) outputs.push_back(dx);
    for (const ParameterGradient& p : backward.parameters) outputs.push_back(p.updated);
  }

  Graph graph;
  std::int32_t forward_nodes = 0, recomputed = 0;
  std::vector<Tensor> outputs;  // the last value, then gradients

 private:
  std::int64_t draw(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random_()) % (high - low + 1);
  }
  std::int64_t channels() const { return type_.shape[1]; }
  TensorType square() const { return {type_.dtype, {channels(), channels()}, {}}; }
  static std::string name(const char* what, std::int64_t number) {
    return what + std::to_string(number);
  }
  // Recent values more often than old ones, those of blocks before included.
  Tensor pick() {
    const std::int64_t back = draw(0, std::min<std::int64_t>(4, std::ssize(values_) - 1));
    return values_[values_.size() - 1 - static_cast<std::size_t>(back)];
  }

  void stream(std::int64_t block) {
    if (!streams_[static_cast<std::size_t>(block)] || place_ == Place::device) return;
    graph.stream(name("w", block), square(), block);
  }

  void block(std::int64_t b) {
    constexpr std::array kRungs = {Rung::store, Rung::cheap, Rung::attention, Rung::block};
    graph.begin_segment(kRungs[static_cast<std::size_t>(draw(0, 3))]);
    for (std::int64_t n = draw(2, 7); n > 0; --n) {
      values_.push_back(step(b));
      leave(values_.back(), b);
    }
    // Whatever was drawn, the block is linked to those before it.
    values_.push_back(add(linear(pick(), graph.weight(name("w", b), square())), pick()));
    leave(values_.back(), b);
    graph.end_segment();
  }

  void leave(Tensor x, std::int64_t block) {
    const bool leaves = draw(0, 2) == 0;
    if (!leaves || place_ == Place::device) return;
    graph.offload(x, name("page", std::ssize(graph.offloaded())), block);
  }

  Tensor step(std::int64_t b) {
    switch (draw(0, 7)) {
      case 0:
        return add(pick(), pick());
      case 1:
        return scale(pick(), graph.input("factor", {graph.accumulate(), {1}, {}}));
      case 2:
        return swiglu(pick(), pick());
      case 3:
        return rms_norm(pick(), graph.parameter(name("norm", b), {type_.dtype, {channels()}, {}}),
                        1e-5f);
      case 4:
        return linear(pick(), graph.weight(name("w", b), square()));
      case 5:
        return linear(pick(), graph.parameter(name("p", b), square()));
      case 6: {
        const TensorType a{type_.dtype, {2, channels()}, {}}, up{type_.dtype, {channels(), 2}, {}};
        return lora_linear(pick(), graph.weight(name("w", b), square()),
                           graph.parameter(name("a", b), a), graph.parameter(name("b", b), up),
                           0.5f);
      }
      default: {
        const Tensor begin = graph.input("span_begin", {DType::I32, {type_.shape[0]}, {}});
        const Tensor o =
            attention(pick(), pick(), pick(), begin, {static_cast<std::int32_t>(channels()), 0.7f});
        leave(graph.output_of(o, 1), b);
        return o;
      }
    }
  }

  std::mt19937 random_;
  Place place_;
  TensorType type_;
  std::vector<Tensor> values_;
  std::vector<bool> streams_;  // by block
  std::int64_t streamed_ = 0;  // blocks whose weights were asked for
};

// The outputs of a program; leaves of one name have the same values in every program.
std::vector<std::vector<double>> run(Program& program, Backend& backend) {
  std::map<std::string, std::vector<double>> feeds;
  const Graph& g = program.graph;
  for (std::int32_t id = 0; id < g.size(); ++id) {
    const Node& n = g.node(id);
    const std::string& name = g.name(id);
    if (n.kind == NodeKind::op || n.kind == NodeKind::state || name.starts_with("page")) continue;
    std::vector<double>& values = feeds[name];
    for (std::int64_t i = 0; i < n.outputs[0].elements(); ++i) {
      const double normal =
          static_cast<double>(philox_normal(3, hash_name(name), static_cast<std::uint64_t>(i)));
      values.push_back(name == "span_begin" ? 0 : normal / 2);
    }
  }
  return eval(backend, program.graph, program.outputs, feeds);
}

// How often the backward pass reads a value where it was before it went to the host.
int reads_of_what_left(const Program& program) {
  const Graph& g = program.graph;
  int reads = 0;
  for (std::int32_t id = program.forward_nodes; id < g.size(); ++id) {
    const Node& n = g.node(id);
    for (int i = 0; i < n.n_inputs; ++i) {
      for (const auto& values : {g.offloaded(), g.streamed()}) {
        reads += std::any_of(values.begin(), values.end(), [&](const Graph::OnHost& value) {
          return value.value == n.inputs[static_cast<std::size_t>(i)];
        });
      }
    }
  }
  return reads;
}

// Empty, or a value that loses its memory while its copy to the host may be under way.
std::string overwritten_while_copied(const Plan& plan) {
  const Graph& g = *plan.graph;
  std::vector<std::int32_t> copies;
  for (const std::int32_t id : plan.steps) {
    if (g.node(id).op == OpId::page_out) copies.push_back(id);
  }
  const std::size_t ahead = copies_in_flight(g);
  for (std::size_t i = 0; i + ahead < copies.size(); ++i) {
    const Ref value = g.node(copies[i]).inputs[1];
    for (const Plan::Stay& stay : plan.stays) {
      if (stay.holder == value && stay.last < copies[i + ahead]) {
        return "%" + std::to_string(value.node) + " is overwritten while it is copied";
      }
    }
  }
  return {};
}

std::ptrdiff_t brought_back(const Program& program) {
  const std::span<const Node> backward =
      program.graph.nodes().subspan(static_cast<std::size_t>(program.forward_nodes));
  return std::count_if(backward.begin(), backward.end(), [](const Node& n) {
    return n.kind == NodeKind::op && n.op == OpId::page_in;
  });
}

}  // namespace

TEST_CASE("drawn programs: offloaded values and streamed weights change no byte") {
  constexpr std::array kComputes = {DType::F64, DType::F32, DType::BF16};
  int offloading = 0, streaming = 0, recomputing = 0;
  for (unsigned seed = 0; seed < 300; ++seed) {
    CAPTURE(seed);
    const DType compute = kComputes[seed % kComputes.size()];
    Program plain(seed, compute, Place::device), paged(seed, compute, Place::host);
    ReferenceBackend backend;
    backend.scratch = [](const OpCall& call) {
      return call.node->op == OpId::linear ? std::int64_t{100} : std::int64_t{0};
    };
    const auto wanted = run(plain, backend);
    CHECK(run(paged, backend) == wanted);
    CHECK(wrong_with(make_plan(paged.graph, backend), backend) == "");
    backend.group = 2 + seed % 2;
    CHECK(run(paged, backend) == wanted);
    const Plan plan = make_plan(paged.graph, backend);
    CHECK(wrong_with_stays(plan, backend) == "");
    CHECK(overwritten_while_copied(plan) == "");
    const std::ptrdiff_t offloaded = std::ssize(paged.graph.offloaded()),
                         streamed = std::ssize(paged.graph.streamed());
    CHECK(reads_of_what_left(paged) == 0);
    CHECK(brought_back(paged) <= offloaded + streamed);
    offloading += offloaded > 0;
    streaming += streamed > 0;
    recomputing += brought_back(paged) > 0 && paged.recomputed > 0;
  }
  CHECK(offloading > 200);
  CHECK(streaming > 200);
  CHECK(recomputing > 100);
}
