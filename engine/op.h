// What an op says about itself: one OpDef per op, in one file, engine/ops/NAME.cpp. Everything
// else (autograd, planning, the registry checks, the benchmark) is derived from it.
#pragma once

#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "engine/graph.h"

namespace nibble {

// Arguments of the shape rule: reads `inputs` and params, sets `outputs` and n_outputs, or throws
// ShapeError with a message that names the op, what was found and what was wanted.
struct InferArgs {
  DType compute;
  std::span<const TensorType> inputs;
  const Node& node;  // for params
  std::array<TensorType, Node::kMaxOutputs>& outputs;
  int n_outputs = 1;
};

// Arguments of the gradient rule. in() and out() give the value to read in the backward pass: the
// stored one, or a recomputing clone appended on demand. The rule emits ops and hands the results
// over; adding up several uses of one value is done here and nowhere else.
class VjpArgs {
 public:
  virtual ~VjpArgs() = default;
  virtual Graph& graph() = 0;
  virtual const Node& node() const = 0;
  virtual Tensor in(int i) = 0;
  virtual Tensor out(int i) = 0;
  virtual Tensor grad(int output) = 0;  // empty when nothing downstream uses that output
  virtual bool wants(int i) const = 0;  // input i needs a gradient
  virtual bool is_parameter(int i) const = 0;
  virtual void add(int i, Tensor gradient) = 0;  // contributes to the gradient of input i
  // The same for an op that reads rows [first, first + rows of gradient) of input i alone.
  virtual void add_rows(int i, Tensor gradient, std::int64_t first) = 0;
  // Parameters: ops that sum over tokens add into the accumulator in place.
  virtual Tensor accumulator(int i) = 0;
  virtual void accumulated(int i, Tensor accumulator) = 0;
};

// The op computed in the most direct way, in F64 on the host, as the oracle of every kernel.
// Quantized inputs arrive dequantized. In-place outputs start as a copy of their input.
struct ReferenceArgs {
  const Node& node;
  std::span<const TensorType> in_types;
  std::span<const TensorType> out_types;
  std::span<const std::vector<double>> in;
  std::span<std::vector<double>> out;  // sized; zero, or a copy of the in-place input
};

// One test and benchmark case of an op.
struct Sample {
  enum class Role : std::uint8_t {
    activation,  // compute dtype, differentiable
    statistic,   // F32 (F64 in F64), differentiable
    constant,    // F32 (F64 in F64), not differentiable
    parameter,   // trainable, compute dtype
    weight,      // frozen; the harness runs every storage type whose blocks fit its shape
    state,       // F32 (F64 in F64), updated in place
    total,       // F64 whatever the compute dtype, updated in place or read
    cache,       // compute dtype, updated in place
    index,       // I32, filled by `indices`
    counter,     // I64, filled by `indices`
    bytes,       // U8, updated in place, filled by `indices`
  };
  struct Input {
    Role role;
    Shape shape;
    std::function<std::int64_t(std::int64_t)> indices = {};  // element number -> value
    double scale = 1.0, shift = 0.0;                         // values are shift + scale * N(0, 1)
  };
  std::string_view label;
  std::vector<Input> inputs;
  std::function<Tensor(Graph&, std::span<const Tensor>)> build;  // calls the op's function once
  // Terms in the longest sum inside the op: the tolerance grows with it.
  std::int64_t reduction = 1;
};

struct OpDef {
  std::string_view name;
  void (*infer)(InferArgs&) = nullptr;
  void (*vjp)(VjpArgs&) = nullptr;  // null: not differentiable
  void (*reference)(const ReferenceArgs&) = nullptr;
  std::vector<Sample> (*samples)() = nullptr;
  // Bit i: output 0 MUST be the memory of input i (a state update). At most one bit.
  std::uint8_t updates = 0;
  // Bit i: the memory of input i is written as well, and no node reads its old version afterwards.
  std::uint8_t also_writes = 0;
  // By output, bit i: it MAY reuse the memory of input i when that input dies here and no earlier
  // output has taken it.
  std::array<std::uint8_t, Node::kMaxOutputs> in_place{};
  // Cheap enough to recompute rather than store (Rung::cheap).
  bool cheap = false;
  // So dear to recompute that only Rung::block does.
  bool dear = false;
  // Bit o: output o is stored on every rung, because it is small and the op is dear to repeat.
  std::uint8_t stored = 0;
  // Appends what repeats output 0 of a node, bit for bit, from `inputs` (its own, recomputed where
  // they were dropped) and its stored outputs, more cheaply than the op; null: the op itself is
  // cloned.
  Tensor (*recompute)(Graph& graph, std::int32_t node, std::span<const Tensor> inputs) = nullptr;
};

const OpDef& op_def(OpId op);

// The index of the input that output 0 updates, or -1.
int updated_input(const OpDef& def);

}  // namespace nibble
