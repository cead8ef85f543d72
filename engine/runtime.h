// Programs that share memory: several planned graphs (one per bucket, the optimizer, decoding) run
// on one arena and see the same weights, parameters and states by name.
//
// Life: add() every program, bind() the leaves whose memory the caller owns, then allocate() once.
// After that nothing is allocated any more; write(), run() and read() only move bytes. Belongs to
// one thread at a time. The backend must outlive it.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "engine/plan.h"

namespace nibble {

class Runtime {
 public:
  // With Layout::bound the sizes are predictions, and allocate() throws.
  explicit Runtime(Backend& backend, Layout layout = Layout::search)
      : backend_(backend), layout_(layout) {}

  // Plans the graph and returns the program's number.
  int add(std::unique_ptr<Graph> graph);

  // Gives the leaf `name` of every program an address in the backend's memory. With nullptr:
  // promises one before allocate(), so that the sizes below leave the leaf out.
  void bind(std::string_view name, std::byte* address);

  // Bytes that allocate() will take from the backend: exactly these, each a multiple of what the
  // backend allocates in. Unbound leaves of one name share memory, sized by the largest.
  std::int64_t arena_bytes() const;
  std::int64_t input_bytes() const;
  std::int64_t state_bytes() const;
  std::int64_t page_bytes() const;  // from allocate_host()

  // Allocates arena, inputs and states (cleared), and compiles. Throws Error naming the first
  // weight or parameter that has no address.
  void allocate();
  // Readies every program for running; takes what memory that takes of the device.
  void prepare();
  void clear_states();

  void run(int program) { programs_[static_cast<std::size_t>(program)].executable->run(); }
  void run_checked(int program, const Executable::Hook& hook) {
    programs_[static_cast<std::size_t>(program)].executable->run_checked(hook);
  }

  // Of the program's last run.
  double seconds(int program) const {
    return programs_[static_cast<std::size_t>(program)].executable->seconds();
  }

  // Leaves by name. Sizes are checked against the leaf.
  void write(std::string_view name, std::span<const std::byte> bytes);
  void read(std::string_view name, std::span<std::byte> bytes) const;
  template <class T>
  void write(std::string_view name, std::span<const T> values) {
    write(name, std::as_bytes(values));
  }
  // A kept value of a program's last run.
  void read(int program, Ref ref, std::span<std::byte> bytes) const;

  const Plan& plan(int program) const { return programs_[static_cast<std::size_t>(program)].plan; }
  const Graph& graph(int program) const {
    return *programs_[static_cast<std::size_t>(program)].graph;
  }
  Backend& backend() const { return backend_; }
  // Of all programs: what a device that records them keeps grows with these.
  std::int64_t steps() const;

 private:
  struct Program {
    std::unique_ptr<Graph> graph;
    Plan plan;
    std::unique_ptr<Executable> executable;
  };
  struct Leaf {
    std::string name;
    NodeKind kind;
    std::int64_t bytes = 0;  // largest over the programs
    std::byte* address = nullptr;
    bool bound = false;  // by the caller
  };
  std::int64_t unbound_bytes(NodeKind kind) const;
  // Throws ShapeError when the leaf has fewer bytes.
  const Leaf& leaf(std::string_view name, std::size_t bytes) const;

  Backend& backend_;
  Layout layout_;
  std::vector<Program> programs_;
  std::vector<Leaf> leaves_;      // in the order of their first program
  NameMap<std::size_t> numbers_;  // in leaves_
  NameMap<std::byte*> bound_;
  std::unique_ptr<Buffer> arena_, inputs_, states_, pages_;
};

// Values of `outputs` for leaf values given by name, computed by a plan made for this one call: the
// eager way, for tests and debugging. Floats are widened to F64; feeds are rounded to their leaf's
// dtype (quantized weights included).
std::vector<std::vector<double>> eval(Backend& backend, Graph& graph,
                                      std::span<const Tensor> outputs,
                                      const std::map<std::string, std::vector<double>>& feeds);

// Host memory of a tensor from F64 values (rounded, quantized) and back.
std::vector<std::byte> encode(const TensorType& type, std::span<const double> values);
std::vector<double> decode(const TensorType& type, const std::byte* data);

}  // namespace nibble
