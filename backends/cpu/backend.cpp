// Memory, the kernel table of the chosen instruction set, and an executable that is a list of
// kernel calls with their addresses filled in.

#include <chrono>
#include <cstring>
#include <new>

#include "backends/cpu/cpu.h"
#include "backends/cpu/kernel.h"
#include "engine/error.h"
#include "engine/os.h"
#include "engine/plan.h"

namespace nibble::cpu {

#define NIBBLE_OP(name) NIBBLE_PER_ISA(extern const Kernel name##_kernel;)
#include "engine/ops.def"
#undef NIBBLE_OP

namespace {

constexpr std::int64_t kAlignment = 64;  // a cache line, and the widest vector

const Kernel& find_kernel(Isa isa, OpId op) {
  switch (op) {
#define NIBBLE_OP(name) \
  case OpId::name:      \
    return NIBBLE_PICK(isa, name##_kernel);
#include "engine/ops.def"
#undef NIBBLE_OP
    case OpId::count:
      break;
  }
  throw Error("no such op");
}

struct Release {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{kAlignment}); }
};

// Bytes of the largest block that the system still gives, below `refused`, to 1 MiB.
std::int64_t largest_block(std::int64_t refused) {
  std::int64_t given = 0;
  while (refused - given > 1 << 20) {
    const std::int64_t middle = given + (refused - given) / 2;
    void* block = ::operator new(static_cast<std::size_t>(middle), std::nothrow);
    ::operator delete(block);
    (block == nullptr ? refused : given) = middle;
  }
  return given;
}

class CpuBuffer final : public Buffer {
 public:
  CpuBuffer(std::int64_t bytes, std::int64_t& total)
      : data_(static_cast<std::byte*>(
            ::operator new (static_cast<std::size_t>(bytes), std::align_val_t{kAlignment}))),
        bytes_(bytes),
        total_(total) {
    total_ += bytes_;
  }
  ~CpuBuffer() override { total_ -= bytes_; }
  std::byte* data() override { return data_.get(); }
  std::int64_t size() const override { return bytes_; }

 private:
  std::unique_ptr<std::byte, Release> data_;
  std::int64_t bytes_;
  std::int64_t& total_;  // the backend's count
};

class CpuExecutable final : public Executable {
 public:
  CpuExecutable(const Plan& plan, const Bindings& bindings, Isa isa, ThreadPool& pool)
      : pool_(pool) {
    const Graph& graph = *plan.graph;
    const auto address = [&](Ref ref) -> std::byte* {
      const Location& at = plan.at(ref);
      if (at.kind == Location::Kind::arena) return bindings.arena + at.offset;
      return bindings.leaves[static_cast<std::size_t>(at.leaf)];
    };
    for (const std::int32_t id : plan.steps) {
      Step step{id, describe(graph, id), &find_kernel(isa, graph.node(id).op)};
      for (int i = 0; i < step.call.n_inputs; ++i) {
        step.call.in[static_cast<std::size_t>(i)] =
            address(step.call.node->inputs[static_cast<std::size_t>(i)]);
      }
      for (int i = 0; i < step.call.n_outputs; ++i) {
        step.call.out[static_cast<std::size_t>(i)] = address({id, i});
      }
      const std::int64_t scratch = plan.scratch[static_cast<std::size_t>(id)];
      if (scratch >= 0) step.call.scratch = bindings.arena + scratch;
      steps_.push_back(step);
    }
  }

  void run() override {
    const auto begin = Clock::now();
    for (const Step& step : steps_) step.kernel->run(step.call, pool_);
    seconds_ = std::chrono::duration<double>(Clock::now() - begin).count();
  }
  double seconds() const override { return seconds_; }

  void run_checked(const Hook& hook) override {
    for (const Step& step : steps_) {
      const auto begin = Clock::now();
      step.kernel->run(step.call, pool_);
      hook(step.node, step.call, std::chrono::duration<double>(Clock::now() - begin).count());
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Step {
    std::int32_t node;
    OpCall call;
    const Kernel* kernel;
  };
  std::vector<Step> steps_;
  double seconds_ = 0;
  ThreadPool& pool_;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options)
      : isa_(options.isa.value_or(best_isa())),
        limit_(options.memory_limit),
        host_limit_(options.host_memory_limit),
        pool_(options.threads) {
    if (!is_supported(isa_)) {
      throw Unsupported(std::string("this machine does not have ") + cpu::name(isa_) +
                        " instructions; leave the instruction set out to use the best it has");
    }
  }

  BackendInfo info() const override {
    return {.name = "cpu",
            .description = std::string(cpu::name(isa_)) + ", " + std::to_string(pool_.threads()) +
                           (pool_.threads() == 1 ? " thread" : " threads"),
            .alignment = kAlignment,
            .allocation_bytes = kAlignment,
            .plane_alignment = kHostPlaneAlignment,
            .reads_host_memory = true,
            .memory_bytes = memory_bytes_};
  }

  bool supports(const OpCall& call) const override {
    return find_kernel(isa_, call.node->op).supports(call);
  }

  std::int64_t scratch_bytes(const OpCall& call) const override {
    const Kernel& kernel = find_kernel(isa_, call.node->op);
    return kernel.scratch_bytes == nullptr ? 0 : kernel.scratch_bytes(call, pool_.threads());
  }

  std::unique_ptr<Buffer> allocate(std::int64_t bytes, std::string_view purpose) override {
    return make_buffer(bytes, purpose, MemoryKind::device, allocated_, limit_);
  }
  std::int64_t allocated_bytes() const override { return allocated_; }

  std::unique_ptr<Buffer> allocate_host(std::int64_t bytes, std::string_view purpose) override {
    auto buffer = make_buffer(bytes, purpose, MemoryKind::host, host_allocated_, host_limit_);
    clear(buffer->data(), bytes);
    return buffer;
  }
  std::int64_t host_allocated_bytes() const override { return host_allocated_; }

  void upload(std::byte* to, std::span<const std::byte> from) override {
    if (!from.empty()) std::memcpy(to, from.data(), from.size());
  }
  void download(std::span<std::byte> to, const std::byte* from) override {
    if (!to.empty()) std::memcpy(to.data(), from, to.size());
  }
  void clear(std::byte* to, std::int64_t bytes) override {
    std::memset(to, 0, static_cast<std::size_t>(bytes));
  }

  std::unique_ptr<Executable> compile(const Plan& plan, const Bindings& bindings) override {
    return std::make_unique<CpuExecutable>(plan, bindings, isa_, pool_);
  }

 private:
  static std::unique_ptr<Buffer> make_buffer(std::int64_t bytes, std::string_view purpose,
                                             MemoryKind kind, std::int64_t& allocated,
                                             std::int64_t limit) {
    check_memory_limit(purpose, kind, bytes, allocated, limit);
    try {
      return std::make_unique<CpuBuffer>(bytes, allocated);
    } catch (const std::bad_alloc&) {
      const std::int64_t largest = largest_block(bytes);
      throw OutOfMemory(std::string(purpose) + ": " + std::to_string(bytes) +
                            " bytes of memory are not to be had, the system gives " +
                            std::to_string(largest) +
                            "; close other programs or raise the limit (ulimit -v)",
                        kind, allocated + bytes, allocated + largest);
    }
  }

  Isa isa_;
  std::int64_t limit_, host_limit_;
  std::int64_t memory_bytes_ = os::memory_bytes();
  std::int64_t allocated_ = 0, host_allocated_ = 0;
  ThreadPool pool_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace nibble::cpu
