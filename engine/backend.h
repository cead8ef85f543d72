// The seam between the engine and a device.
//
// A Backend owns memory and kernels. A Kernel only enqueues work on memory it is given: it
// allocates nothing, waits for nothing and reads nothing back, so that a plan's steps can be
// recorded once and replayed.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "engine/error.h"
#include "engine/graph.h"
#include "engine/op.h"
#include "engine/ops.h"

namespace nibble {

struct Plan;

// One call of an op as a kernel sees it: types, and at run time addresses. in_types of plane types
// describe memory laid out by planes(type, backend alignment).
struct OpCall {
  const Node* node = nullptr;
  std::array<TensorType, Node::kMaxInputs> in_types;
  std::array<TensorType, Node::kMaxOutputs> out_types;
  int n_inputs = 0, n_outputs = 0;
  std::array<const void*, Node::kMaxInputs> in{};
  std::array<void*, Node::kMaxOutputs> out{};
  void* scratch = nullptr;

  template <class T>
  const T* input(int i) const {
    return static_cast<const T*>(in[static_cast<std::size_t>(i)]);
  }
  template <class T>
  T* output(int i) const {
    return static_cast<T*>(out[static_cast<std::size_t>(i)]);
  }
  // Ops that update several inputs in place (adamw) write through their inputs.
  template <class T>
  T* mutable_input(int i) const {
    return static_cast<T*>(const_cast<void*>(in[static_cast<std::size_t>(i)]));
  }
};

struct BackendInfo {
  std::string name;         // "cpu", "cuda:0"
  std::string description;  // for people: processor, instruction set, threads
  std::int64_t alignment;   // of every buffer and arena offset, bytes
  // What the device hands out memory in: the sizes of large buffers are rounded up to it, so that
  // what is counted is what is taken.
  std::int64_t allocation_bytes;
  std::int64_t plane_alignment;
  bool reads_host_memory;  // leaves may be bound to ordinary host addresses, such as a mapped file
  std::int64_t memory_bytes;  // free for this backend when it was opened
  // BF16 products take weights rounded to BF16, as tensor cores need them, and round what lies
  // between two products inside an op (attention's probabilities). The CPU does neither.
  bool rounds_operands = false;
};

// A block of backend memory; released on destruction.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual std::byte* data() = 0;  // an address in the backend's own space
  virtual std::int64_t size() const = 0;
};

// A compiled plan: runs the same program again and again on fixed addresses. Belongs to one thread
// at a time.
class Executable {
 public:
  // Called after each node of a checked run; reading the outputs is then allowed. Steps that run
  // as one kernel are visited after it, all but the last with 0 seconds; what such a kernel keeps
  // to itself is not there to be read.
  using Hook = std::function<void(std::int32_t node, const OpCall& call, double seconds)>;
  virtual ~Executable() = default;
  virtual void run() = 0;
  virtual void run_checked(const Hook& hook) = 0;
  // Does what a first run would do beside computing: later runs then take no memory.
  virtual void prepare() {}
  // How long the last run took; waits for its end. 0: not known.
  virtual double seconds() const { return 0; }
};

// Addresses of a plan's leaves and of its arena, in the backend's space.
struct Bindings {
  std::vector<std::byte*> leaves;  // by node id; null for op nodes
  std::byte* arena = nullptr;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual BackendInfo info() const = 0;
  // Whether this backend has a kernel for the call's op and dtypes.
  virtual bool supports(const OpCall& call) const = 0;
  // Bytes of scratch that the kernel wants; a pure function of the call's types and params.
  virtual std::int64_t scratch_bytes(const OpCall& call) const = 0;
  // Whether `next`, the step right after `group`, runs in one kernel with them (group holds one
  // step at first). The plan then keeps the inputs and outputs of all of them apart, as if they
  // were one op.
  virtual bool fuses(const Graph& graph, std::span<const std::int32_t> group,
                     std::int32_t next) const;
  // Throws OutOfMemory; what was handed out before stays as it was.
  virtual std::unique_ptr<Buffer> allocate(std::int64_t bytes, std::string_view purpose) = 0;
  virtual std::int64_t allocated_bytes() const = 0;  // by live buffers
  // What the device has taken for this backend beside its buffers: a context, code, recorded
  // programs. 0 where that is not counted.
  virtual std::int64_t overhead_bytes() const { return 0; }
  // Cleared memory of the host that kernels read and write by page_in and page_out: page-locked on
  // a device. upload(), download() and clear() take its addresses too. Throws as allocate() does.
  virtual std::unique_ptr<Buffer> allocate_host(std::int64_t bytes, std::string_view purpose) = 0;
  virtual std::int64_t host_allocated_bytes() const = 0;
  // In the order of the runs around it. `from` may be reused at once; the bytes may arrive later.
  virtual void upload(std::byte* to, std::span<const std::byte> from) = 0;
  // Waits for everything enqueued before.
  virtual void download(std::span<std::byte> to, const std::byte* from) = 0;
  virtual void clear(std::byte* to, std::int64_t bytes) = 0;
  virtual std::unique_ptr<Executable> compile(const Plan& plan, const Bindings& bindings) = 0;
};

// Throws OutOfMemory when `bytes` more would pass `limit`; 0: no limit.
void check_memory_limit(std::string_view purpose, MemoryKind kind, std::int64_t bytes,
                        std::int64_t allocated, std::int64_t limit);

// The types and params of node `id` as a call without addresses.
OpCall describe(const Graph& graph, std::int32_t id);

}  // namespace nibble
