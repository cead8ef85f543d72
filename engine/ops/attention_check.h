// What the rules of attention, kv_append and attention_cached share: heads and scores.
#pragma once

#include <cmath>

#include "engine/ops/check.h"

namespace nibble::check {

inline std::int64_t head_dim(const InferArgs& args, std::int32_t found) {
  if (found <= 0) {
    throw ShapeError(op_name(args) + ": head_dim is " + std::to_string(found) +
                     ", wanted a number above 0");
  }
  return found;
}

// The number of heads of `dim` channels in `channels`.
inline std::int64_t whole_heads(const InferArgs& args, int i, std::string_view input,
                                std::int64_t channels, std::int64_t dim) {
  if (channels == 0 || channels % dim != 0) {
    fail(args, i, input, "whole heads of " + std::to_string(dim) + " channels");
  }
  return channels / dim;
}

inline void grouped(const InferArgs& args, std::int64_t heads, std::int64_t kv_heads) {
  if (heads % kv_heads != 0) {
    throw ShapeError(op_name(args) + ": " + std::to_string(heads) + " query heads share " +
                     std::to_string(kv_heads) + " key-value heads, wanted a multiple of these");
  }
}

// The head_dim of a node with AttentionParams.
inline std::int64_t attention_head_dim(const InferArgs& args) {
  const auto params = args.node.get<AttentionParams>();
  if (!(params.soft_cap >= 0) || std::isinf(params.soft_cap)) {
    throw ShapeError(op_name(args) + ": soft_cap is " + std::to_string(params.soft_cap) +
                     ", wanted a number above 0, or 0 for none");
  }
  return head_dim(args, params.head_dim);
}

}  // namespace nibble::check

namespace nibble {

// A score from the dot product of a query and a key, and its derivative by the scaled product, for
// the references.
inline double attention_score(const AttentionParams& params, double dot) {
  const double x = params.scale * dot, cap = params.soft_cap;
  return cap > 0 ? cap * std::tanh(x / cap) : x;
}
inline double attention_slope(const AttentionParams& params, double score) {
  const double part = params.soft_cap > 0 ? score / params.soft_cap : 0;
  return 1 - part * part;
}

}  // namespace nibble
