// What the shape rules of engine/ops share: one way to say what was found and what was wanted, so
// that every ShapeError reads alike: "rms_norm: w is F32[3], wanted [5], one factor per channel of
// x". The names given to inputs are those of the declarations in ops.h.
#pragma once

#include <string>
#include <string_view>

#include "engine/error.h"
#include "engine/op.h"

namespace nibble::check {

inline std::string op_name(const InferArgs& args) { return std::string(op_def(args.node.op).name); }

// The graph that an op is appended to: that of its first input.
inline Graph& graph_of(Tensor first, std::string_view op) {
  if (!first) throw ShapeError(std::string(op) + ": input 0 is empty, wanted a value of a graph");
  return *first.graph;
}

[[noreturn]] inline void fail(const InferArgs& args, int i, std::string_view input,
                              std::string_view wanted) {
  throw ShapeError(op_name(args) + ": " + std::string(input) + " is " +
                   args.inputs[static_cast<std::size_t>(i)].str() + ", wanted " +
                   std::string(wanted));
}

inline const TensorType& in(const InferArgs& args, int i) {
  return args.inputs[static_cast<std::size_t>(i)];
}

inline void count(const InferArgs& args, std::size_t wanted) {
  if (args.inputs.size() != wanted) {
    throw ShapeError(op_name(args) + ": " + std::to_string(args.inputs.size()) +
                     " inputs, wanted " + std::to_string(wanted));
  }
}

// The dtype of statistics, losses and gradients of parameters in this graph.
inline DType stat(const InferArgs& args) {
  return args.compute == DType::F64 ? DType::F64 : DType::F32;
}

inline void dtype(const InferArgs& args, int i, std::string_view input, DType wanted) {
  if (in(args, i).dtype != wanted) {
    fail(args, i, input, "elements of " + std::string(name(wanted)));
  }
}

inline void shape(const InferArgs& args, int i, std::string_view input, const Shape& wanted,
                  std::string_view why) {
  if (!(in(args, i).shape == wanted)) {
    fail(args, i, input, wanted.str() + ", " + std::string(why));
  }
}

inline void rank(const InferArgs& args, int i, std::string_view input, int wanted,
                 std::string_view layout) {
  if (in(args, i).shape.rank() != wanted) fail(args, i, input, layout);
}

// An activation [T, C] of the compute dtype.
inline void activation(const InferArgs& args, int i, std::string_view input) {
  rank(args, i, input, 2, "a matrix [rows, channels]");
  dtype(args, i, input, args.compute);
}

// Values of the compute dtype, or statistics.
inline void activation_or_stat(const InferArgs& args, int i, std::string_view input) {
  if (in(args, i).dtype != args.compute && in(args, i).dtype != stat(args)) {
    fail(args, i, input,
         "elements of " + std::string(name(args.compute)) + " or " + std::string(name(stat(args))));
  }
}

// An input of the compute dtype that has exactly this shape.
inline void activation_like(const InferArgs& args, int i, std::string_view input,
                            const Shape& wanted, std::string_view why) {
  shape(args, i, input, wanted, why);
  dtype(args, i, input, args.compute);
}

// A weight in any storage format that stands for real numbers.
inline void weight(const InferArgs& args, int i, std::string_view input) {
  const DType d = in(args, i).dtype;
  if (!is_float(d) && !is_plane(d) && !is_block(d)) {
    fail(args, i, input, "a floating point or quantized weight");
  }
}

// A statistic, accumulator or state of exactly this shape.
inline void statistic(const InferArgs& args, int i, std::string_view input, const Shape& wanted,
                      std::string_view why) {
  shape(args, i, input, wanted, why);
  dtype(args, i, input, stat(args));
}

}  // namespace nibble::check
