// A plan as a CUDA graph.
//
// prepare() captures the calls and instantiates them, and every run is one launch. Without it the
// first run enqueues kernel by kernel, and the second captures. Addresses, shapes and launch
// parameters are those of the plan; what changes from run to run is data in device memory. Copies
// from and to host memory run beside the kernels, on streams of their own; engine/streams.h says
// what waits for what.
#pragma once

#include "backends/cuda/kernel.h"
#include "engine/plan.h"
#include "engine/streams.h"

namespace nibble::cuda {

const Kernel& find_kernel(OpId op);

// Whether consecutive nodes and the one after them exist as one kernel: pairs of fused.h, and up to
// kMatVecGroup products that read the same few rows.
bool fuses_group(const Graph& graph, std::span<const std::int32_t> group, std::int32_t next);

class CudaExecutable final : public Executable {
 public:
  // `launch` is copied; what it points to must outlive the executable.
  CudaExecutable(const Plan& plan, const Bindings& bindings, const Launch& launch);
  CudaExecutable(const CudaExecutable&) = delete;
  CudaExecutable& operator=(const CudaExecutable&) = delete;
  ~CudaExecutable() override;

  void run() override;
  void prepare() override;
  double seconds() const override;
  // Node by node, each timed by events. A fused group's time is reported under its last node, the
  // others with 0 seconds.
  void run_checked(const Hook& hook) override;

 private:
  struct Step {
    std::int32_t node;
    OpCall call;
    bool fused;  // runs in one kernel with the step before it
  };
  // Steps [first, end), which are one kernel or one copy.
  struct Task {
    std::size_t first, end;
    Stream stream;
    std::vector<std::size_t> waits;  // tasks of other streams
    cudaEvent_t done = nullptr;      // for those that wait for it
  };
  void make_tasks();
  cudaStream_t handle(Stream stream) const;
  void enqueue(const Task& task, const Launch& launch) const;
  void enqueue_all() const;
  void capture();
  std::vector<Step> steps_;
  std::vector<Task> tasks_;
  bool copies_ = false;  // some task is not on the compute stream
  std::array<cudaEvent_t, kStreams>
      fork_join_{};  // with copies: the start, and the ends of their streams
  Launch launch_;
  cudaGraphExec_t graph_ = nullptr;
  bool ran_ = false;
  cudaEvent_t began_ = nullptr, ended_ = nullptr;  // of the last run
};

}  // namespace nibble::cuda
