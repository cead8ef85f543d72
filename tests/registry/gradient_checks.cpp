// Gradients in F64. With upstream gradients g the objective is sum(g * y); its derivative by every
// input element comes from append_backward on one side, from (f(x + h) - f(x - h)) / 2h on the
// other. Parameter gradients arrive in accumulators, which start at values that are not zero.
#include <algorithm>
#include <cmath>

#include "engine/autograd.h"
#include "engine/error.h"
#include "engine/runtime.h"
#include "tests/registry/guarded_run.h"
#include "tests/registry/registry.h"

namespace nibble::registry {
namespace {

constexpr std::int64_t kMostElements = 400;  // of all differentiable inputs together

std::int64_t differentiable_elements(const Case& c) {
  std::int64_t count = 0;
  for (std::size_t i = 0; i < c.sample.inputs.size(); ++i) {
    if (c.differentiable(i)) count += c.sample.inputs[i].shape.elements();
  }
  return count;
}

// One plain and one quantized storage type are enough: a gradient does not ask for more.
bool worth_checking(const Case& c) {
  if (c.compute != DType::F64) return false;
  if (c.has_weight && c.stored.dtype != DType::F64 &&
      !(c.stored.dtype == DType::NF4 && c.stored.quant.double_quant)) {
    return false;
  }
  const std::int64_t elements = differentiable_elements(c);
  return elements > 0 && elements <= kMostElements;
}

using Values = std::vector<double>;

// The op and its backward pass. Empty when the rule refuses this form of the op.
struct Differentiated {
  OpGraph built;
  Tensor seed;
  Backward backward;
};
std::optional<Differentiated> differentiate(const Case& c) {
  Differentiated d{build(c), {}, {}};
  d.seed = d.built.graph->input("upstream", d.built.output.type());
  const Seed seeds[] = {{d.built.output, d.seed}};
  try {
    d.backward = append_backward(*d.built.graph, seeds);
  } catch (const Error&) {
    return std::nullopt;
  }
  for (const Tensor& gradient : d.backward.inputs) {
    if (gradient) d.built.graph->keep(gradient);
  }
  return d;
}

// Gradients by input, from the op's rule. Empty where no gradient arrives.
std::vector<Values> analytic(const Differentiated& d, Backend& backend, const Inputs& inputs,
                             const Values& upstream, Problems& problems) {
  const Graph& g = *d.built.graph;
  std::vector<std::vector<std::byte>> leaves(static_cast<std::size_t>(g.size()));
  std::copy(inputs.bytes.begin(), inputs.bytes.end(), leaves.begin());
  leaves[static_cast<std::size_t>(d.seed.node)] = encode(d.seed.type(), upstream);
  std::vector<Values> initial(d.built.inputs.size());
  for (const ParameterGradient& p : d.backward.parameters) {
    const auto i = static_cast<std::size_t>(p.parameter);
    initial[i] = normal_values("accumulator", p.accumulator.type().elements());
    leaves[static_cast<std::size_t>(p.accumulator.node)] = encode(p.accumulator.type(), initial[i]);
  }
  const Plan plan = make_plan(g, backend);
  GuardedRun run(backend, plan, leaves);
  run.run();
  if (const std::string damage = run.damage(); !damage.empty()) problems.push_back(damage);
  std::vector<Values> gradients(d.built.inputs.size());
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const Tensor t = d.backward.inputs[i];
    if (t) gradients[i] = decode(t.type(), run.value({t.node, t.output}).data());
  }
  for (const ParameterGradient& p : d.backward.parameters) {
    const auto i = static_cast<std::size_t>(p.parameter);
    gradients[i] = decode(p.accumulator.type(), run.leaf(p.accumulator.node).data());
    for (std::size_t k = 0; k < gradients[i].size(); ++k) gradients[i][k] -= initial[i][k];
  }
  return gradients;
}

// The objective as a function of one input at a time.
class Objective {
 public:
  Objective(const Case& c, Backend& backend, const Inputs& inputs, const Values& upstream)
      : built_(build(c)), inputs_(inputs), upstream_(upstream) {
    built_.graph->keep(built_.output);
    plan_ = make_plan(*built_.graph, backend);
    run_ = std::make_unique<GuardedRun>(backend, plan_, inputs.bytes);
  }

  Values differences(std::size_t input) {
    Values x = inputs_.rounded[input];
    Values d(x.size());
    for (std::size_t k = 0; k < x.size(); ++k) {
      const double at = x[k];
      const double above = at + kDifferenceStep, below = at - kDifferenceStep;
      x[k] = above;
      const double f_above = value(input, x);
      x[k] = below;
      d[k] = (f_above - value(input, x)) / (above - below);
      x[k] = at;
    }
    value(input, x);  // puts the input back
    return d;
  }

 private:
  double value(std::size_t input, const Values& x) {
    run_->set_leaf(built_.inputs[input].node, encode(built_.inputs[input].type(), x));
    run_->run();
    const Values y = decode(built_.output.type(), run_->value({built_.output.node, 0}).data());
    double sum = 0;
    for (std::size_t k = 0; k < y.size(); ++k) sum += y[k] * upstream_[k];
    return sum;
  }

  OpGraph built_;
  const Inputs& inputs_;
  const Values& upstream_;
  Plan plan_;
  std::unique_ptr<GuardedRun> run_;
};

std::string compare_gradients(Values ours, const Values& differences) {
  ours.resize(differences.size());  // no gradient is a gradient of zero
  double scale = 1e-3;
  for (const double d : differences) scale = std::max(scale, std::abs(d));
  for (std::size_t k = 0; k < ours.size(); ++k) {
    if (std::abs(ours[k] - differences[k]) <= kGradientTolerance * scale) continue;
    return "element " + std::to_string(k) + " has gradient " + std::to_string(ours[k]) +
           ", by differences " + std::to_string(differences[k]);
  }
  return {};
}

void check_case(const Case& c, const Differentiated& d, Backend& backend, Problems& problems) {
  const Inputs inputs = make_inputs(c);
  const Values upstream = normal_values("upstream", d.seed.type().elements());
  const std::vector<Values> ours = analytic(d, backend, inputs, upstream, problems);
  Objective objective(c, backend, inputs, upstream);
  for (std::size_t i = 0; i < c.sample.inputs.size(); ++i) {
    if (!c.differentiable(i)) continue;
    const std::string problem = compare_gradients(ours[i], objective.differences(i));
    if (!problem.empty()) problems.push_back("input " + std::to_string(i) + " " + problem);
  }
}

}  // namespace

Problems check_gradients(OpId op, Backend& backend, int& checked) {
  Problems all;
  if (op_def(op).vjp == nullptr) return all;
  for (const Case& c : cases_of(op)) {
    if (!worth_checking(c)) continue;
    Problems problems;
    try {
      const std::optional<Differentiated> d = differentiate(c);
      if (!d) continue;
      check_case(c, *d, backend, problems);
      ++checked;
    } catch (const Error& e) {
      problems.push_back(e.what());
    }
    for (const std::string& p : problems) all.push_back(c.str() + ": " + p);
  }
  if (checked == 0) {
    all.push_back(std::string(op_def(op).name) +
                  ": it has a gradient rule but no sample small enough to check it by differences");
  }
  return all;
}

}  // namespace nibble::registry
