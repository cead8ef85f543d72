// The routes of attention and its gradient. Kernels for sm_90a live in files of their own and are
// asked first; what they refuse runs on the kernels that every card has.
#pragma once

#include "backends/cuda/kernel.h"

namespace nibble::cuda {

// attention_hopper.cu
bool attention_hopper_supports(const OpCall& call, const Card& card);
std::int64_t attention_hopper_scratch_bytes(const OpCall& call, const Card& card);
void attention_hopper(const OpCall& call, const Launch& launch);

// attention_backward_hopper.cu
bool attention_backward_hopper_supports(const OpCall& call, const Card& card);
std::int64_t attention_backward_hopper_scratch_bytes(const OpCall& call, const Card& card);
void attention_backward_hopper(const OpCall& call, const Launch& launch);

// Limit of all attention kernels.
inline constexpr std::int64_t kMaxHeadDim = 256;

// Sizes of an attention call, forward or backward: inputs 0 to 2 are q, k and v.
struct AttentionShape {
  explicit AttentionShape(const OpCall& call)
      : params(call.node->get<AttentionParams>()),
        rows(call.in_types[0].shape[0]),
        head_dim(params.head_dim),
        heads(call.in_types[0].shape[1] / head_dim),
        kv_heads(call.in_types[1].shape[1] / head_dim) {}
  AttentionParams params;
  std::int64_t rows, head_dim, heads, kv_heads;
};

// Whether the tensor core kernels take the call. They find the maximum of scores before scaling
// them, so the scale has to be positive, and know no soft cap.
inline bool attention_on_tensor_cores(const OpCall& call) {
  const auto params = call.node->get<AttentionParams>();
  return call.out_types[0].dtype == DType::BF16 && params.scale > 0 && params.soft_cap == 0 &&
         (params.head_dim == 64 || params.head_dim == 128);
}

}  // namespace nibble::cuda
