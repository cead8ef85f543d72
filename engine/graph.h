// The computation graph: an append-only program.
//
// A Graph is one vector of fixed-size nodes. A node's inputs have smaller ids than the node itself,
// so the order of the vector is a valid schedule and no sorting exists anywhere. Leaves are bound
// from outside; every other node applies one op. Nothing here touches memory or a device.
//
// State leaves are mutable memory (gradients, moments, KV cache). An op that updates a state takes
// it as an input and returns the new version; both name the same memory. Use only the newest
// version after an update: Graph::check() enforces it.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "engine/dtype.h"
#include "engine/names.h"

namespace nibble {

class Graph;

enum class OpId : std::uint16_t {
#define NIBBLE_OP(name) name,
#include "engine/ops.def"
#undef NIBBLE_OP
  count
};

// Names one value of a graph; owns nothing. A default-constructed Tensor names no value.
struct Tensor {
  Graph* graph = nullptr;
  std::int32_t node = -1;
  std::int32_t output = 0;
  explicit operator bool() const { return graph != nullptr; }
  // By value: appending to the graph moves its nodes.
  TensorType type() const;
  Shape shape() const { return type().shape; }
  DType dtype() const { return type().dtype; }
};

// What a node is. All but the last are leaves: memory bound by name from outside.
enum class NodeKind : std::uint8_t {
  input,      // written by the host before a run
  weight,     // frozen, any storage type
  parameter,  // trainable; read by ops, written only by the optimizer's program
  state,      // persistent and mutable
  page,       // the same in host memory, for page_in and page_out alone
  op,
};

// One value inside the graph, without the pointer to it.
struct Ref {
  std::int32_t node = -1;
  std::int32_t output = 0;
  bool operator==(const Ref&) const = default;
};

// Fixed size, trivially copyable. `params` holds the op's own parameter struct (ops.h).
struct Node {
  static constexpr int kMaxInputs = 8;
  static constexpr int kMaxOutputs = 3;
  static constexpr int kParamBytes = 48;

  NodeKind kind = NodeKind::op;
  OpId op = OpId::count;
  std::uint8_t n_inputs = 0, n_outputs = 0;
  bool needs_grad = false;     // a parameter, or an op with such an input
  std::int32_t segment = -1;   // index into segments(), -1: none
  std::int32_t clone_of = -1;  // the node this one recomputes
  std::int32_t name = -1;      // leaves: index into the graph's names
  std::int32_t uses = 0;       // inputs of later nodes that are an output of this one
  std::array<Ref, kMaxInputs> inputs;
  std::array<TensorType, kMaxOutputs> outputs;
  alignas(8) std::array<std::byte, kParamBytes> params{};

  template <class P>
  P get() const {
    static_assert(std::is_trivially_copyable_v<P> && sizeof(P) <= kParamBytes);
    P p;
    std::memcpy(&p, params.data(), sizeof p);
    return p;
  }
};

// Which values of a segment are kept for the backward pass. Dropped ones are recomputed on demand.
enum class Rung : std::uint8_t {
  store,      // keep everything
  cheap,      // drop what ops marked cheap produce: norms, SwiGLU, RoPE
  attention,  // keep what ops marked dear produce, and what is read from outside the segment
  block,      // keep only what is read from outside the segment
};

struct Segment {
  Rung rung = Rung::store;
};

class Graph {
 public:
  // `compute` is the dtype of activations: F64, F32 or BF16. Statistics, losses and parameter
  // gradients are F32 (F64 in F64) whatever `compute` is.
  explicit Graph(DType compute = DType::F32);
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  DType compute() const { return compute_; }
  DType accumulate() const { return compute_ == DType::F64 ? DType::F64 : DType::F32; }

  // Leaves. Names are unique within a graph; the same name and type twice returns the same leaf.
  Tensor input(std::string_view name, const TensorType& type);
  Tensor weight(std::string_view name, const TensorType& type);  // or what stream() returned
  Tensor parameter(std::string_view name, const TensorType& type);
  Tensor state(std::string_view name, const TensorType& type);
  Tensor page(std::string_view name, const TensorType& type);
  Tensor find(std::string_view name) const;  // an empty Tensor when there is none

  // Appends an op: checks the inputs with its infer rule and returns output 0. Throws ShapeError.
  template <class P>
  Tensor emit(OpId op, std::initializer_list<Tensor> inputs, const P& params) {
    static_assert(std::is_trivially_copyable_v<P> && sizeof(P) <= Node::kParamBytes);
    std::array<std::byte, Node::kParamBytes> bytes{};
    std::memcpy(bytes.data(), &params, sizeof params);
    return append(op, std::span<const Tensor>(inputs.begin(), inputs.size()), bytes);
  }
  Tensor emit(OpId op, std::initializer_list<Tensor> inputs) {
    return append(op, std::span<const Tensor>(inputs.begin(), inputs.size()), {});
  }
  Tensor append(OpId op, std::span<const Tensor> inputs,
                const std::array<std::byte, Node::kParamBytes>& params);
  // Repeats `node` with other inputs: how dropped values are recomputed.
  std::int32_t clone(std::int32_t node, std::span<const Ref> inputs);
  // Says that `node`, just appended, recomputes `original` by another op.
  void mark_recomputing(std::int32_t node, std::int32_t original);

  Tensor tensor(Ref ref) { return {this, ref.node, ref.output}; }
  Tensor output_of(Tensor t, int output) { return {this, t.node, output}; }

  // Nodes appended between begin and end belong to one recompute segment. Segments do not nest.
  void begin_segment(Rung rung);
  void end_segment();

  // Copies x to the page `name`: the backward pass reads it from there, so that x itself need not
  // be kept. Values of one group (numbers ascend) come back together, while the group after it is
  // worked on.
  void offload(Tensor x, std::string_view name, std::int64_t group);
  // A frozen weight whose memory is the page `name`, from where it comes at this point of the
  // program, and once more in the backward pass. Groups are as in offload().
  Tensor stream(std::string_view name, const TensorType& type, std::int64_t group);
  struct OnHost {
    Ref value, page;  // the page's version that holds the value
    std::int64_t group;
  };
  std::span<const OnHost> offloaded() const { return offloaded_; }
  std::span<const OnHost> streamed() const { return streamed_; }

  // Makes append_backward compute the gradient of an input leaf. Call before the leaf is used.
  void require_grad(Tensor leaf);

  // Values that must survive the run, readable by the host afterwards.
  void keep(Tensor tensor);
  std::span<const Ref> kept() const { return kept_; }

  std::span<const Node> nodes() const { return nodes_; }
  const Node& node(std::int32_t id) const { return nodes_[static_cast<std::size_t>(id)]; }
  std::span<const Segment> segments() const { return segments_; }
  const std::string& name(std::int32_t node) const;
  const TensorType& type(Ref ref) const {
    return node(ref.node).outputs[static_cast<std::size_t>(ref.output)];
  }
  std::int32_t size() const { return static_cast<std::int32_t>(nodes_.size()); }

  // Throws Error when an outdated version of a state is read.
  void check() const;
  // One line per node, for debugging and tests.
  std::string str() const;

 private:
  Tensor leaf(NodeKind kind, std::string_view name, const TensorType& type);
  std::int32_t add_node(const Node& node);
  DType compute_;
  std::vector<Node> nodes_;
  std::vector<Segment> segments_;
  std::vector<std::string> names_;
  // Node ids of leaves by name; a streamed weight's is that of its value.
  NameMap<std::int32_t> leaves_, streamed_values_;
  std::vector<Ref> kept_;
  std::vector<OnHost> offloaded_, streamed_;
  std::int32_t open_segment_ = -1;
};

inline TensorType Tensor::type() const { return graph->type({node, output}); }

// The leaf that a value is a version of, following in-place state updates; the value itself if it
// is none.
Ref state_root(const Graph& graph, Ref ref);

}  // namespace nibble
