// The registry checks on a GPU: every op, every sample, F32 and BF16, against the F64 reference and
// in F32 against the CPU; run kernel by kernel, while being recorded, and replayed; on guarded and
// poisoned memory. Once with all kernels of the card, once with those that run on every card.
#include "tests/gpu_main.h"

#include <cstdlib>
#include <map>

#include "backends/cpu/cpu.h"
#include "engine/ops.h"
#include "engine/runtime.h"
#include "tests/registry/guarded_run.h"
#include "tests/registry/registry.h"
#include "tests/unit/llama_graph.h"

using namespace nibble;
using namespace nibble::registry;

NIBBLE_GPU_MAIN("registry-cuda")

namespace {

constexpr std::array<DType, 2> kGpuComputes = {DType::F32, DType::BF16};

// Under compute-sanitizer's racecheck, which is slow and looks at kernels alone
// (tools/gpu_test.sh), each case runs once.
bool under_racecheck() { return std::getenv("NIBBLE_RACECHECK") != nullptr; }

enum Kernels { all_kernels, own_kernels, portable_kernels };

// Both sets, but for racecheck: it takes barriers at which one lane arrives for its warp for races
// (attention_backward), and fails in the library's kernels, which the portable set calls.
Kernels kernels_for(OpId op) {
  if (!under_racecheck()) return all_kernels;
  switch (op) {
    case OpId::attention_backward:
      return portable_kernels;
    case OpId::linear_dx:
    case OpId::lora_linear:
    case OpId::lora_linear_y:
    case OpId::lora_linear_dx:
      return own_kernels;
    default:
      return all_kernels;
  }
}

// The card's own kernels and the portable ones need not agree with each other to the bit.
std::vector<Family> open_families(Kernels kernels) {
  std::vector<Family> all;
  for (const bool hopper : {true, false}) {
    if (kernels == (hopper ? portable_kernels : own_kernels)) continue;
    Family family;
    family.push_back({hopper ? "cuda" : "cuda, sm_80 kernels",
                      cuda::open_cuda({.device = 0, .memory_limit = 0, .hopper_kernels = hopper}),
                      under_racecheck() ? 1 : 3});
    all.push_back(std::move(family));
  }
  return all;
}
const std::vector<Family>& cuda_families(Kernels kernels = all_kernels) {
  static std::map<Kernels, std::vector<Family>> opened;
  if (!opened.contains(kernels)) opened[kernels] = open_families(kernels);
  return opened[kernels];
}

void report(const Problems& problems) {
  for (const std::string& problem : problems) FAIL_CHECK(problem);
}

void kernels(OpId op) {
  WorstRatios worst;
  const std::vector<Family>& families = cuda_families(kernels_for(op));
  report(check_kernels(op, families, worst, kGpuComputes));
  static const Target cpu{"cpu",
                          cpu::make_cpu_backend({.threads = 2, .isa = {}, .memory_limit = 0}), 1};
  WorstRatios against_cpu;
  report(compare_backends(op, families.front().front(), cpu, against_cpu));
  std::printf("  %-24s largest error / tolerance:  F32 %.3f  BF16 %.3f  against the CPU %.3f\n",
              std::string(op_def(op).name).c_str(), worst[DType::F32], worst[DType::BF16],
              against_cpu[DType::F32]);
}

}  // namespace

#define NIBBLE_OP(name) \
  TEST_CASE("kernel: " #name) { kernels(OpId::name); }
#include "engine/ops.def"
#undef NIBBLE_OP

namespace {

using Bytes = std::vector<std::byte>;

// Loss and every gradient of a llama's training step, after `runs` runs on cleared states.
std::vector<Bytes> training_step(const LlamaShape& shape, Backend& backend, int runs) {
  const LlamaGraph llama = llama_training(shape);
  const Plan plan = make_plan(*llama.graph, backend);
  const auto feeds = llama_feeds(*llama.graph);
  std::vector<Bytes> leaves(static_cast<std::size_t>(llama.graph->size()));
  for (std::int32_t id = 0; id < llama.graph->size(); ++id) {
    const Node& n = llama.graph->node(id);
    if (n.kind == NodeKind::op) continue;
    leaves[static_cast<std::size_t>(id)] =
        n.kind == NodeKind::state ? Bytes(static_cast<std::size_t>(bytes(n.outputs[0])))
                                  : encode(n.outputs[0], feeds.at(llama.graph->name(id)));
  }
  GuardedRun run(backend, plan, leaves);
  run.run();
  for (int i = 1; i < runs; ++i) {
    run.reset();
    run.run();
  }
  CHECK(run.damage() == "");
  std::vector<Bytes> results = {run.value({llama.loss.node, 0})};
  for (const ParameterGradient& p : llama.backward.parameters) {
    results.push_back(run.leaf(p.accumulator.node));
  }
  return results;
}

}  // namespace

// The rungs place values differently and leave other pairs of ops next to each other to be fused.
TEST_CASE("a training step gives the same bytes on every rung, recorded or not") {
  for (const Family& family : cuda_families()) {
    for (const DType compute : kGpuComputes) {
      std::vector<Bytes> first;
      for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
        // Large enough for the fast paths: whole tiles, heads of 64, some rows over.
        LlamaShape shape{.rows = 300,
                         .layers = 2,
                         .heads = 4,
                         .kv_heads = 2,
                         .head_dim = 64,
                         .ffn = 512,
                         .vocabulary = 304};
        shape.rank = 8;
        shape.weights = DType::NF4;
        shape.compute = compute;
        shape.rung = rung;
        for (const int runs : {1, 3}) {
          const std::vector<Bytes> now = training_step(shape, *family.front().backend, runs);
          if (first.empty()) first = now;
          CHECK_MESSAGE(now == first, family.front().name << ", " << name(compute) << ", rung "
                                                          << static_cast<int>(rung) << ", runs "
                                                          << runs);
        }
      }
    }
  }
}

// Element numbers past 2^31: rows picked into a large activation, a product that makes one, and a
// look at their last rows.
TEST_CASE("tensors of more than 2^31 elements") {
  constexpr std::int64_t kRows = 65664, kColumns = 32768, kInner = 64;  // 2.15e9 elements
  Backend& backend = *cuda_families().front().front().backend;
  if (backend.info().memory_bytes < (std::int64_t{20} << 30)) {
    std::printf("skipped: tensors of more than 2^31 elements: the card has no 20 GiB free\n");
    return;
  }
  Graph graph(DType::BF16);
  const Tensor ids = graph.input("ids", {DType::I32, {kRows}, {}});
  const Tensor last = graph.input("last", {DType::I32, {3}, {}});
  const Tensor table = graph.weight("table", {DType::BF16, {7, kColumns}, {}});
  const Tensor x = graph.input("x", {DType::BF16, {kRows, kInner}, {}});
  const Tensor w = graph.weight("w", {DType::BF16, {kColumns, kInner}, {}});
  const Tensor sum = add(embedding(ids, table), linear(x, w));
  const Tensor picked = embedding(last, sum);
  std::vector<double> id_values, last_values = {0, 65537, kRows - 1}, table_values, x_values,
                                 w_values;
  for (std::int64_t i = 0; i < kRows; ++i) id_values.push_back(static_cast<double>(i % 7));
  for (std::int64_t i = 0; i < 7 * kColumns; ++i) {
    table_values.push_back(static_cast<double>(i % 61) / 8);
  }
  for (std::int64_t i = 0; i < kRows * kInner; ++i) {
    x_values.push_back(i % kInner == (i / kInner) % kInner ? 2 : 0);
  }
  for (std::int64_t i = 0; i < kColumns * kInner; ++i) {
    w_values.push_back(static_cast<double>(i % 13) / 4);
  }
  const auto result = eval(backend, graph, std::array{picked},
                           {{"ids", id_values},
                            {"last", last_values},
                            {"table", table_values},
                            {"x", x_values},
                            {"w", w_values}})[0];
  std::int64_t wrong = 0;
  for (std::size_t r = 0; r < last_values.size(); ++r) {
    const auto row = static_cast<std::int64_t>(last_values[r]);
    for (std::int64_t c = 0; c < kColumns; ++c) {
      const double wanted = table_values[static_cast<std::size_t>(row % 7 * kColumns + c)] +
                            2 * w_values[static_cast<std::size_t>(c * kInner + row % kInner)];
      wrong += result[r * kColumns + static_cast<std::size_t>(c)] != wanted ? 1 : 0;
    }
  }
  CHECK(wrong == 0);
}
