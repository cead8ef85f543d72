// A backend for tests of the engine itself: host memory, and kernels that are the ops' own F64
// references, each result rounded to its dtype. It counts what it hands out, can be told to lack an
// op and to want scratch, and fills scratch with 0xFF so that a plan that places it over a live
// value shows in the results. adamw updates its master alone here.
#pragma once

#include <cstring>
#include <functional>
#include <new>
#include <vector>

#include "engine/error.h"
#include "engine/plan.h"
#include "engine/runtime.h"

namespace nibble {

class ReferenceBackend final : public Backend {
 public:
  OpId missing = OpId::count;                               // no kernel for this op
  std::function<std::int64_t(const OpCall&)> scratch = {};  // bytes, 0 when empty
  std::size_t group = 1;                                    // steps that count as one kernel

  BackendInfo info() const override {
    return {.name = "reference",
            .description = "F64 on the host",
            .alignment = 64,
            .allocation_bytes = 64,
            .plane_alignment = 32,
            .reads_host_memory = true,
            .memory_bytes = 0};
  }
  bool supports(const OpCall& call) const override { return call.node->op != missing; }
  std::int64_t scratch_bytes(const OpCall& call) const override {
    return scratch ? scratch(call) : 0;
  }
  bool fuses(const Graph&, std::span<const std::int32_t> steps, std::int32_t) const override {
    return steps.size() < group;
  }
  std::unique_ptr<Buffer> allocate(std::int64_t bytes, std::string_view) override {
    return std::make_unique<HostBuffer>(bytes, allocated_);
  }
  std::int64_t allocated_bytes() const override { return allocated_; }
  std::unique_ptr<Buffer> allocate_host(std::int64_t bytes, std::string_view) override {
    return std::make_unique<HostBuffer>(bytes, host_allocated_);
  }
  std::int64_t host_allocated_bytes() const override { return host_allocated_; }
  void upload(std::byte* to, std::span<const std::byte> from) override {
    if (!from.empty()) std::memcpy(to, from.data(), from.size());
  }
  void download(std::span<std::byte> to, const std::byte* from) override {
    if (!to.empty()) std::memcpy(to.data(), from, to.size());
  }
  void clear(std::byte* to, std::int64_t bytes) override {
    if (bytes > 0) std::memset(to, 0, static_cast<std::size_t>(bytes));
  }
  std::unique_ptr<Executable> compile(const Plan& plan, const Bindings& bindings) override {
    return std::make_unique<Steps>(*this, plan, bindings);
  }

 private:
  class HostBuffer final : public Buffer {
   public:
    HostBuffer(std::int64_t bytes, std::int64_t& total)
        : data_(static_cast<std::size_t>(bytes)), total_(total) {
      total_ += bytes;
    }
    ~HostBuffer() override { total_ -= size(); }
    std::byte* data() override { return data_.data(); }
    std::int64_t size() const override { return static_cast<std::int64_t>(data_.size()); }

   private:
    std::vector<std::byte> data_;
    std::int64_t& total_;
  };

  class Steps final : public Executable {
   public:
    Steps(const ReferenceBackend& backend, const Plan& plan, const Bindings& bindings) {
      for (const std::int32_t id : plan.steps) {
        OpCall call = describe(*plan.graph, id);
        for (std::size_t i = 0; i < static_cast<std::size_t>(call.n_inputs); ++i) {
          call.in[i] = address(plan, bindings, call.node->inputs[i]);
        }
        for (int o = 0; o < call.n_outputs; ++o) {
          call.out[static_cast<std::size_t>(o)] = address(plan, bindings, {id, o});
        }
        const std::int64_t at = plan.scratch[static_cast<std::size_t>(id)];
        if (at >= 0) call.scratch = bindings.arena + at;
        steps_.push_back({id, call, backend.scratch_bytes(call)});
      }
    }
    void run() override { run_checked({}); }
    void run_checked(const Hook& hook) override {
      for (const Step& step : steps_) {
        execute(step);
        if (hook) hook(step.node, step.call, 0);
      }
    }

   private:
    struct Step {
      std::int32_t node;
      OpCall call;
      std::int64_t scratch_bytes;
    };
    static std::byte* address(const Plan& plan, const Bindings& bindings, Ref ref) {
      const Location& at = plan.at(ref);
      if (at.kind == Location::Kind::none) throw Error("a step uses a value without a place");
      return at.kind == Location::Kind::arena ? bindings.arena + at.offset
                                              : bindings.leaves[static_cast<std::size_t>(at.leaf)];
    }
    static void execute(const Step& step) {
      const OpCall& call = step.call;
      const auto inputs = static_cast<std::size_t>(call.n_inputs);
      const auto outputs = static_cast<std::size_t>(call.n_outputs);
      if (step.scratch_bytes > 0) {
        std::memset(call.scratch, 0xff, static_cast<std::size_t>(step.scratch_bytes));
      }
      std::vector<std::vector<double>> in, out;
      for (std::size_t i = 0; i < inputs; ++i) {
        in.push_back(decode(call.in_types[i], static_cast<const std::byte*>(call.in[i])));
      }
      for (std::size_t o = 0; o < outputs; ++o) {
        out.emplace_back(static_cast<std::size_t>(call.out_types[o].elements()));
      }
      const OpDef& def = op_def(call.node->op);
      if (const int i = updated_input(def); i >= 0) out[0] = in[static_cast<std::size_t>(i)];
      def.reference(
          {*call.node, {call.in_types.data(), inputs}, {call.out_types.data(), outputs}, in, out});
      for (std::size_t o = 0; o < outputs; ++o) {
        const std::vector<std::byte> bytes = encode(call.out_types[o], out[o]);
        if (!bytes.empty()) std::memcpy(call.out[o], bytes.data(), bytes.size());
      }
    }
    std::vector<Step> steps_;
  };

  std::int64_t allocated_ = 0, host_allocated_ = 0;
};

}  // namespace nibble
