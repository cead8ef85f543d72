// What the registry checks run on: every op, every sample of it, every compute dtype and every
// storage type that fits its frozen weights.
//
// A case turns into a graph of one op whose leaves are named "in0", "in1", ... and into values for
// them. Values are a function of the case's sample alone, so that all dtypes see the same numbers,
// each rounded to what it can hold.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/op.h"

namespace nibble::registry {

struct Case {
  OpId op = OpId::count;
  Sample sample;
  int number = 0;  // of the sample within its op
  DType compute = DType::F32;
  TensorType stored{};  // dtype and quantization of inputs of Role::weight; no shape
  bool has_weight = false;

  std::string str() const;  // "linear, edge tiles, BF16, weights NF4/64 double"
  TensorType input_type(std::size_t i) const;
  bool differentiable(std::size_t i) const;  // input i
};

// The compute dtypes, in the order of the report's columns.
inline constexpr std::array<DType, 3> kComputes = {DType::F64, DType::F32, DType::BF16};

std::vector<Case> cases_of(OpId op);

// The case's op and its leaves. Differentiable inputs ask for a gradient.
struct OpGraph {
  std::unique_ptr<Graph> graph;
  std::vector<Tensor> inputs;
  Tensor output;  // output 0 of the op
};
OpGraph build(const Case& c);

// Values of input i before any rounding, and as its dtype holds them.
std::vector<double> raw_values(const Case& c, std::size_t i);
struct Inputs {
  std::vector<std::vector<std::byte>> bytes;  // as encode() lays them out
  std::vector<std::vector<double>> rounded;
};
Inputs make_inputs(const Case& c);

// Values of the inputs as a backend reads them that takes the weights of products in BF16.
std::vector<std::vector<double>> rounded_weights(const Case& c, const Inputs& inputs);

// Standard normal values: the stream is the hash of `name`.
std::vector<double> normal_values(std::string_view name, std::int64_t count);

// What the reference says the outputs are, for inputs that are already rounded.
std::vector<std::vector<double>> reference_outputs(const Graph& graph, std::int32_t node,
                                                   const std::vector<std::vector<double>>& inputs);

// Inputs whose memory the op writes: bit i for input i. OpDef::updates and also_writes.
unsigned written_inputs(OpId op);

}  // namespace nibble::registry
