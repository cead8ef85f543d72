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

// Logits are written, read and their gradients in turn, some rows at a time.
double logit_bytes(const OpCall& call) {
  const bool weight_gradient = call.node->op == OpId::linear_cross_entropy_dw;
  if (call.node->op != OpId::linear_cross_entropy && !weight_gradient) return 0;
  const int at = weight_gradient ? 1 : 0;  // x, W, labels, loss rows
  const auto in = [&](int i) { return call.in_types[static_cast<std::size_t>(at + i)]; };
  const double passes = weight_gradient || call.n_outputs > 2 ? 4 : 2;
  return passes * static_cast<double>(bytes({in(0).dtype, {in(3).shape[0], in(1).shape[0]}, {}}));
}

// One call's kernels, one after the other. Each takes at least rates.launch; a product its start
// beside its work.
class Kernels {
 public:
  Kernels(const DeviceRates& rates, double span) : rates_(rates), span_(span) {}

  double seconds(const OpCall& call, bool fused) {
    seconds_ = 0;
    OpCost cost = op_cost(call, span_);
    cost.bytes += logit_bytes(call);
    write_out_weights(call, cost);
    const OpId op = call.node->op;
    if (op == OpId::lora_linear && rates_.decodes_weights) {
      moved(static_cast<double>(bytes(call.in_types[0])));  // u
    }
    if (op == OpId::attention_backward) seconds_ += 2 * rates_.launch;  // row sums, and dq
    if (cost.flops > 0) {
      seconds_ += rates_.launch + std::max(cost.flops / product_rate(call, rates_, span_),
                                           cost.bytes / rates_.bytes);
    } else if (fused) {
      seconds_ += cost.bytes / rates_.bytes;
    } else {
      moved(cost.bytes);
    }
    return seconds_;
  }

 private:
  void moved(double bytes) { seconds_ += std::max(bytes / rates_.bytes, rates_.launch); }

  // Quantized weights of a product become BF16 before it.
  void write_out_weights(const OpCall& call, OpCost& cost) {
    if (!rates_.decodes_weights || call.n_inputs < 2 || call.in_types[0].shape.rank() == 0 ||
        call.in_types[0].shape[0] <= kDecodeRows || call.node->op == OpId::embedding) {
      return;
    }
    for (int i = 1; i < call.n_inputs; ++i) {
      const TensorType& type = call.in_types[static_cast<std::size_t>(i)];
      if (!is_plane(type.dtype) && !is_block(type.dtype)) continue;
      const double stored = static_cast<double>(bytes(type)),
                   dense = 2 * static_cast<double>(type.elements());
      moved(stored + dense);
      cost.bytes += dense - stored;
    }
  }

  DeviceRates rates_;
  double span_;
  double seconds_ = 0;
};

}  // namespace

// The streams in program order: a copy out starts when what it copies is there, and lets go of its
// memory, which a later one needs, when it ends; a copy in starts when everything before it has
// been started and its memory is free, and is waited for by what reads it.
double estimate_seconds(const Plan& plan, const DeviceRates& rates, double average_span) {
  Kernels kernels(rates, average_span);
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
    compute += kernels.seconds(call, plan.fused[i]);
  }
  return std::max({compute, in, out});
}

}  // namespace nibble
