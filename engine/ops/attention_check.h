// What the shape rules of attention, kv_append and attention_cached share: heads.
#pragma once

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

}  // namespace nibble::check
