#include "engine/estimate.h"

#include <algorithm>

#include "engine/cost.h"

namespace nibble {
namespace {

constexpr std::int64_t kDecodeRows = 64;
// Shares of a large product's rate that the attention kernels reach, measured on an H100.
constexpr double kAttention = 0.8, kAttentionBackward = 0.6;

double product_rate(const OpCall& call, const DeviceRates& rates) {
  if (call.node->op == OpId::attention) return kAttention * rates.flops;
  if (call.node->op == OpId::attention_backward) return kAttentionBackward * rates.flops;
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

double estimate_seconds(const Plan& plan, const DeviceRates& rates, double average_span) {
  double compute = 0, in = 0, out = 0;
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const OpCall call = describe(*plan.graph, plan.steps[i]);
    const OpCost cost = op_cost(call, average_span);
    if (call.node->op == OpId::page_in || call.node->op == OpId::page_out) {
      (call.node->op == OpId::page_in ? in : out) +=
          static_cast<double>(bytes(call.out_types[0])) / rates.copy_bytes;
      continue;
    }
    double seconds = std::max(cost.flops / product_rate(call, rates), cost.bytes / rates.bytes);
    if (rates.decodes_weights) seconds += decoded_bytes(call) / rates.bytes;
    compute += std::max(seconds, plan.fused[i] ? 0 : rates.launch);
  }
  return std::max({compute, in, out});
}

}  // namespace nibble
