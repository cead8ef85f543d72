#include <algorithm>

#include "engine/error.h"
#include "engine/plan.h"
#include "engine/runtime.h"
#include "tests/registry/guarded_run.h"
#include "tests/registry/registry.h"

namespace nibble::registry {
namespace {

using Bytes = std::vector<std::byte>;

// What a run leaves behind: every output, and every leaf (states are updated there).
struct Result {
  std::vector<Bytes> outputs, leaves;
  bool operator==(const Result&) const = default;
};

Result collect(const GuardedRun& run, const Graph& graph, std::int32_t node) {
  Result result;
  for (int o = 0; o < graph.node(node).n_outputs; ++o)
    result.outputs.push_back(run.value({node, o}));
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    if (graph.node(id).kind != NodeKind::op) result.leaves.push_back(run.leaf(id));
  }
  return result;
}

void keep_outputs(Graph& graph, std::int32_t node) {
  for (int o = 0; o < graph.node(node).n_outputs; ++o) graph.keep(graph.tensor({node, o}));
}

// Runs the case several times on guarded memory. Appends to `problems`.
Result run_again(const OpGraph& built, const Target& target, const std::vector<Bytes>& inputs,
                 Problems& problems) {
  Backend& backend = *target.backend;
  const Plan plan = make_plan(*built.graph, backend);
  GuardedRun run(backend, plan, inputs);
  run.run();
  const Result first = collect(run, *built.graph, built.output.node);
  if (const std::string damage = run.damage(); !damage.empty()) problems.push_back(damage);
  for (int i = 1; i < target.runs; ++i) {
    run.reset();
    run.run();
    if (collect(run, *built.graph, built.output.node) != first) {
      problems.push_back("run " + std::to_string(i + 1) + " of the same program gives other bytes");
    }
  }
  return first;
}

void check_reference(const Case& c, const OpGraph& built, const Result& result,
                     const std::vector<std::vector<double>>& wanted, bool rounds_operands,
                     WorstRatios& worst, Problems& problems, double slack = 1) {
  const Node& node = built.graph->node(built.output.node);
  for (std::size_t o = 0; o < wanted.size(); ++o) {
    const TensorType& type = node.outputs[o];
    const std::vector<double> got = decode(type, result.outputs[o].data());
    const std::string problem =
        compare(c, type.dtype, got, wanted[o], rounds_operands, worst, slack);
    if (!problem.empty()) problems.push_back("output " + std::to_string(o) + " " + problem);
  }
}

// Outputs 0 and 1 in the memory of each input that they may overwrite, and both at once.
void check_in_place(const OpGraph& built, Backend& backend, const std::vector<Bytes>& inputs,
                    const Result& plain, Problems& problems) {
  const Node& node = built.graph->node(built.output.node);
  const OpDef& def = op_def(node.op);
  const auto allowed = [&](int output, int i) {
    if ((def.in_place[static_cast<std::size_t>(output)] >> i & 1) == 0) return false;
    return bytes(built.graph->type(node.inputs[static_cast<std::size_t>(i)])) ==
           bytes(node.outputs[static_cast<std::size_t>(output)]);
  };
  const auto check = [&](int first, int second) {  // by output: an input, or -1
    Plan plan = make_plan(*built.graph, backend);
    auto& locations = plan.locations[static_cast<std::size_t>(built.output.node)];
    if (first >= 0) locations[0] = plan.at(node.inputs[static_cast<std::size_t>(first)]);
    if (second >= 0) locations[1] = plan.at(node.inputs[static_cast<std::size_t>(second)]);
    const std::string where = "in the memory of inputs " + std::to_string(first) + " and " +
                              std::to_string(second) + " (-1: none) it ";
    GuardedRun run(backend, plan, inputs);
    run.run();
    if (collect(run, *built.graph, built.output.node).outputs != plain.outputs) {
      problems.push_back(where + "gives other bytes");
    }
    if (const std::string damage = run.damage(); !damage.empty()) {
      problems.push_back(where + damage);
    }
  };
  for (int i = 0; i < node.n_inputs; ++i) {
    if (allowed(0, i)) check(i, -1);
    for (int k = 0; k < node.n_inputs; ++k) {
      if (i == 0 && allowed(1, k)) check(-1, k);
      if (k != i && allowed(0, i) && allowed(1, k)) check(i, k);
    }
  }
}

// A recomputing clone of the node gives the node's bytes.
void check_clone(const Case& c, Backend& backend, const std::vector<Bytes>& inputs,
                 const Result& plain, Problems& problems) {
  if (written_inputs(c.op) != 0) return;  // an update is never repeated
  const OpGraph built = build(c);
  const Node node = built.graph->node(built.output.node);
  const std::int32_t clone =
      built.graph->clone(built.output.node, {node.inputs.data(), node.n_inputs});
  keep_outputs(*built.graph, built.output.node);
  keep_outputs(*built.graph, clone);
  const Plan plan = make_plan(*built.graph, backend);
  GuardedRun run(backend, plan, inputs);
  run.run();
  if (collect(run, *built.graph, clone).outputs != plain.outputs) {
    problems.push_back("its recomputing clone gives other bytes");
  }
}

bool has_kernel(const Case& c, const OpGraph& built, const Target& target, Problems& problems) {
  if (target.backend->supports(describe(*built.graph, built.output.node))) return true;
  problems.push_back(c.str() + ": no kernel in " + target.name);
  return false;
}

void prefix(Problems& from, const std::string& text, Problems& to) {
  for (const std::string& problem : from) to.push_back(text + ": " + problem);
}

void check_case(const Case& c, const std::vector<Family>& families, WorstRatios& worst,
                Problems& all) {
  const OpGraph built = build(c);
  keep_outputs(*built.graph, built.output.node);
  const Inputs inputs = make_inputs(c);
  const auto exact = reference_outputs(*built.graph, built.output.node, inputs.rounded);
  for (const Family& family : families) {
    Result first;
    const bool rounds = c.compute == DType::BF16 && family.front().backend->info().rounds_operands;
    const auto& wanted =
        rounds ? reference_outputs(*built.graph, built.output.node, rounded_weights(c, inputs))
               : exact;
    for (const Target& target : family) {
      Problems problems;
      if (!has_kernel(c, built, target, all)) continue;
      const Result result = run_again(built, target, inputs.bytes, problems);
      if (first.outputs.empty()) {
        first = result;
        check_reference(c, built, result, wanted, rounds, worst, problems);
        check_in_place(built, *target.backend, inputs.bytes, result, problems);
        check_clone(c, *target.backend, inputs.bytes, result, problems);
      } else if (result != first) {
        problems.push_back("other bytes than " + family.front().name);
      }
      prefix(problems, c.str() + ", " + target.name, all);
    }
  }
}

}  // namespace

Problems check_kernels(OpId op, const std::vector<Family>& families, WorstRatios& worst,
                       std::span<const DType> computes) {
  Problems problems;
  for (const Case& c : cases_of(op)) {
    if (std::find(computes.begin(), computes.end(), c.compute) == computes.end()) continue;
    try {
      check_case(c, families, worst, problems);
    } catch (const Error& e) {
      problems.push_back(c.str() + ": " + e.what());
    }
  }
  return problems;
}

Problems compare_backends(OpId op, const Target& candidate, const Target& oracle,
                          WorstRatios& worst) {
  Problems all;
  for (const Case& c : cases_of(op)) {
    if (c.compute != DType::F32) continue;
    const OpGraph built = build(c);
    keep_outputs(*built.graph, built.output.node);
    if (!has_kernel(c, built, candidate, all) || !has_kernel(c, built, oracle, all)) continue;
    const Inputs inputs = make_inputs(c);
    Problems problems;
    const Result result = run_again(built, candidate, inputs.bytes, problems);
    const Result oracle_result = run_again(built, oracle, inputs.bytes, problems);
    const Node& node = built.graph->node(built.output.node);
    std::vector<std::vector<double>> wanted;
    for (std::size_t o = 0; o < node.n_outputs; ++o) {
      wanted.push_back(decode(node.outputs[o], oracle_result.outputs[o].data()));
    }
    check_reference(c, built, result, wanted, false, worst, problems, 2);
    prefix(problems, c.str() + ", " + candidate.name + " against " + oracle.name, all);
  }
  return all;
}

}  // namespace nibble::registry
