#include "engine/estimate.h"

#include <algorithm>
#include <deque>

#include "engine/cost.h"

namespace nibble {
namespace {

constexpr std::int64_t kDecodeRows = 64;

// The share of a large product's rate that attention reaches over long documents, and the rows at
// which it reaches half of that (H100 and H200, documents of 512, 2,048 and 16,384 rows).
struct AttentionShare {
  double share, half_rows;
  double at(double span) const { return share * span / (span + half_rows); }
};
constexpr AttentionShare kForward{0.95, 1200}, kBackward{0.76, 1000};

double product_rate(const OpCall& call, const DeviceRates& rates, double span) {
  if (call.node->op == OpId::attention) return kForward.at(span) * rates.flops;
  if (call.node->op == OpId::attention_backward) return kBackward.at(span) * rates.flops;
  if (call.node->op == OpId::linear_dw) return rates.weight_gradients * rates.flops;
  if (call.node->op == OpId::linear_cross_entropy_dw) {  // half of it forms the logits
    return 2 / (1 + 1 / rates.weight_gradients) * rates.flops;
  }
  return rates.flops;
}

// Of the weight of a product, once it is written out and once it is read.
double decoded_bytes(const OpCall& call) {
  double sum = 0;
  if (call.n_inputs < 2 || call.in_types[0].shape.rank() == 0 ||
      call.in_types[0].shape[0] <= kDecodeRows || call.node->op == OpId::embedding) {
    return 0;
  }
  for (int i = 1; i < call.n_inputs; ++i) {
    const TensorType& type = call.in_types[static_cast<std::size_t>(i)];
    if (is_plane(type.dtype) || is_block(type.dtype)) {
      sum += 2 * 2 * static_cast<double>(type.elements());
    }
  }
  return sum;
}

}  // namespace

// The streams in program order: a copy out starts when what it copies is there, and lets go of its
// memory, which a later one needs, when it ends; a copy in starts when everything before it has
// been started and its memory is free, and is waited for by what reads it.
double estimate_seconds(const Plan& plan, const DeviceRates& rates, double average_span) {
  double compute = 0, in = 0, out = 0;
  std::deque<double> leaving;  // when the copies under way end
  std::vector<double> arrives(static_cast<std::size_t>(plan.graph->size()));
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const std::int32_t id = plan.steps[i];
    const OpCall call = describe(*plan.graph, id);
    const double copied = static_cast<double>(bytes(call.out_types[0])) / rates.copy_bytes;
    if (call.node->op == OpId::page_in) {
      in = arrives[static_cast<std::size_t>(id)] = std::max({in, out, compute}) + copied;
      continue;
    }
    if (call.node->op == OpId::page_out) {
      leaving.push_back(out = std::max(compute, out) + copied);
      if (leaving.size() > copies_in_flight(*plan.graph)) {
        compute = std::max(compute, leaving.front());
        leaving.pop_front();
      }
      continue;
    }
    for (int k = 0; k < call.n_inputs; ++k) {
      const Ref input = call.node->inputs[static_cast<std::size_t>(k)];
      compute = std::max(compute, arrives[static_cast<std::size_t>(input.node)]);
    }
    const OpCost cost = op_cost(call, average_span);
    double seconds =
        std::max(cost.flops / product_rate(call, rates, average_span), cost.bytes / rates.bytes);
    if (rates.decodes_weights) seconds += decoded_bytes(call) / rates.bytes;
    compute += std::max(seconds, plan.fused[i] ? 0 : rates.launch);
  }
  return std::max({compute, in, out});
}

}  // namespace nibble
