#include "backends/cuda/executable.h"

#include <algorithm>

#include "backends/cuda/fused.h"
#include "backends/cuda/linear.h"
#include "engine/error.h"

namespace nibble::cuda {

#define NIBBLE_OP(name) extern const Kernel name##_kernel;
#include "engine/ops.def"
#undef NIBBLE_OP

const Kernel& find_kernel(OpId op) {
  switch (op) {
#define NIBBLE_OP(name) \
  case OpId::name:      \
    return name##_kernel;
#include "engine/ops.def"
#undef NIBBLE_OP
    case OpId::count:
      break;
  }
  throw Error("no such op");
}

namespace {

// The kernel that does the work of two consecutive calls; null: there is none.
struct FusedKernel {
  bool (*supports)(const OpCall& first, const OpCall& second);
  void (*run)(const OpCall& first, const OpCall& second, const Launch& launch);
};

bool reads(const Node& node, int i, Ref ref) {
  return node.inputs[static_cast<std::size_t>(i)] == ref;
}

FusedKernel fused_kernel(const Node& first, std::int32_t first_id, const Node& second) {
  const Ref value{first_id, 0};
  if (first.op == OpId::add && second.op == OpId::rms_norm && reads(second, 0, value) &&
      !reads(second, 1, value)) {
    return {add_rms_norm_supports, add_rms_norm};
  }
  if (first.op == OpId::rms_norm_dx && second.op == OpId::add &&
      reads(second, 0, value) != reads(second, 1, value)) {
    return {rms_norm_dx_add_supports, rms_norm_dx_add};
  }
  if (first.op == OpId::rope && second.op == OpId::rope && !reads(second, 0, value)) {
    return {rope_pair_supports, rope_pair};
  }
  return {};
}

bool is_matvec(const Graph& graph, std::int32_t id) {
  const Node& n = graph.node(id);
  return n.op == OpId::linear && linear_is_matvec(describe(graph, id));
}

// rms_norm_dx_add keeps the sum alone, so nothing else may read what the first op made.
bool fuses_pair(const Graph& graph, std::int32_t first, std::int32_t second) {
  const Node &a = graph.node(first), &b = graph.node(second);
  const FusedKernel kernel = fused_kernel(a, first, b);
  if (kernel.supports == nullptr ||
      !kernel.supports(describe(graph, first), describe(graph, second))) {
    return false;
  }
  if (a.op != OpId::rms_norm_dx) return true;
  const bool kept = std::any_of(graph.kept().begin(), graph.kept().end(),
                                [&](Ref ref) { return ref.node == first; });
  return a.uses == 1 && !kept;
}

}  // namespace

bool fuses_group(const Graph& graph, std::span<const std::int32_t> group, std::int32_t next) {
  const std::int32_t first = group.front();
  if (is_matvec(graph, first)) {
    return group.size() < kMatVecGroup && is_matvec(graph, next) &&
           graph.node(next).inputs[0] == graph.node(first).inputs[0];
  }
  return group.size() == 1 && fuses_pair(graph, first, next);
}

CudaExecutable::CudaExecutable(const Plan& plan, const Bindings& bindings, const Launch& launch)
    : launch_(launch) {
  const Graph& graph = *plan.graph;
  const auto address = [&](Ref ref) -> std::byte* {
    const Location& at = plan.at(ref);
    if (at.kind == Location::Kind::arena) return bindings.arena + at.offset;
    return bindings.leaves[static_cast<std::size_t>(at.leaf)];
  };
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const std::int32_t id = plan.steps[i];
    Step step{id, describe(graph, id), plan.fused[i]};
    for (int k = 0; k < step.call.n_inputs; ++k) {
      step.call.in[static_cast<std::size_t>(k)] =
          address(step.call.node->inputs[static_cast<std::size_t>(k)]);
    }
    for (int k = 0; k < step.call.n_outputs; ++k) {
      step.call.out[static_cast<std::size_t>(k)] = address({id, k});
    }
    const std::int64_t scratch = plan.scratch[static_cast<std::size_t>(id)];
    if (scratch >= 0) step.call.scratch = bindings.arena + scratch;
    steps_.push_back(step);
  }
  for (cudaEvent_t* event : {&began_, &ended_}) check(cudaEventCreate(event), "cudaEventCreate");
  make_tasks();
}

CudaExecutable::~CudaExecutable() {
  if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  for (const Task& task : tasks_) {
    if (task.done != nullptr) cudaEventDestroy(task.done);
  }
  for (const cudaEvent_t event : {fork_join_[0], fork_join_[1], fork_join_[2], began_, ended_}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
}

namespace {

Stream stream_of(OpId op) {
  if (op == OpId::page_in) return Stream::copy_in;
  return op == OpId::page_out ? Stream::copy_out : Stream::compute;
}

void add_accesses(const OpCall& call, std::int64_t scratch_bytes, std::vector<Access>& accesses) {
  const auto add = [&](const void* address, std::int64_t size, bool writes) {
    accesses.push_back({static_cast<const std::byte*>(address), size, writes});
  };
  const OpDef& def = op_def(call.node->op);
  for (int i = 0; i < call.n_inputs; ++i) {
    const auto k = static_cast<std::size_t>(i);
    add(call.in[k], bytes(call.in_types[k]), (def.also_writes >> i & 1) != 0);
  }
  for (int i = 0; i < call.n_outputs; ++i) {
    const auto k = static_cast<std::size_t>(i);
    add(call.out[k], bytes(call.out_types[k]), true);
  }
  if (call.scratch != nullptr) add(call.scratch, scratch_bytes, true);
}

cudaEvent_t make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  return event;
}

}  // namespace

void CudaExecutable::make_tasks() {
  for (std::size_t first = 0; first < steps_.size(); first = tasks_.back().end) {
    std::size_t end = first + 1;
    while (end < steps_.size() && steps_[end].fused) ++end;
    tasks_.push_back({first, end, stream_of(steps_[first].call.node->op), {}});
    copies_ = copies_ || tasks_.back().stream != Stream::compute;
  }
  if (!copies_) return;
  for (cudaEvent_t& event : fork_join_) event = make_event();
  std::vector<StreamTask> stream_tasks;
  for (const Task& task : tasks_) {
    stream_tasks.push_back({task.stream, {}});
    for (std::size_t i = task.first; i < task.end; ++i) {
      const OpCall& call = steps_[i].call;
      const Kernel& kernel = find_kernel(call.node->op);
      add_accesses(call, kernel.scratch_bytes ? kernel.scratch_bytes(call, *launch_.card) : 0,
                   stream_tasks.back().accesses);
    }
  }
  const std::vector<std::vector<std::size_t>> waits = stream_waits(stream_tasks);
  for (std::size_t i = 0; i < tasks_.size(); ++i) {
    tasks_[i].waits = waits[i];
    for (const std::size_t other : waits[i]) {
      if (tasks_[other].done == nullptr) tasks_[other].done = make_event();
    }
  }
}

cudaStream_t CudaExecutable::handle(Stream stream) const {
  switch (stream) {
    case Stream::copy_in:
      return launch_.copy_in;
    case Stream::copy_out:
      return launch_.copy_out;
    case Stream::compute:
      break;
  }
  return launch_.stream;
}

void CudaExecutable::enqueue(const Task& task, const Launch& launch) const {
  const Step& step = steps_[task.first];
  if (task.end - task.first == 1) return find_kernel(step.call.node->op).run(step.call, launch);
  if (step.call.node->op == OpId::linear) {
    std::array<MatVec, kMatVecGroup> calls;
    for (std::size_t i = task.first; i < task.end; ++i) {
      calls[i - task.first] = linear_matvec(steps_[i].call);
    }
    return matvec_group(calls.data(), static_cast<int>(task.end - task.first), launch);
  }
  const Step& second = steps_[task.first + 1];
  fused_kernel(*step.call.node, step.node, *second.call.node).run(step.call, second.call, launch);
}

void CudaExecutable::enqueue_all() const {
  if (!copies_) {
    for (const Task& task : tasks_) enqueue(task, launch_);
    return;
  }
  constexpr std::array copy_streams{Stream::copy_in, Stream::copy_out};
  const cudaEvent_t start = fork_join_[0];
  check(cudaEventRecord(start, launch_.stream), "event");
  for (const Stream stream : copy_streams) {
    check(cudaStreamWaitEvent(handle(stream), start), "event");
  }
  for (const Task& task : tasks_) {
    Launch launch = launch_;
    launch.stream = handle(task.stream);
    launch.overlaps = task.waits.empty();
    for (const std::size_t other : task.waits) {
      check(cudaStreamWaitEvent(launch.stream, tasks_[other].done), "event");
    }
    enqueue(task, launch);
    if (task.done != nullptr) check(cudaEventRecord(task.done, launch.stream), "event");
  }
  for (const Stream stream : copy_streams) {
    const cudaEvent_t end = fork_join_[static_cast<std::size_t>(stream)];
    check(cudaEventRecord(end, handle(stream)), "event");
    check(cudaStreamWaitEvent(launch_.stream, end), "event");
  }
}

void CudaExecutable::capture() {
  check(cudaStreamBeginCapture(launch_.stream, cudaStreamCaptureModeThreadLocal), "graph capture");
  cudaGraph_t captured = nullptr;
  try {
    enqueue_all();
  } catch (...) {
    cudaStreamEndCapture(launch_.stream, &captured);
    if (captured != nullptr) cudaGraphDestroy(captured);
    throw;
  }
  check(cudaStreamEndCapture(launch_.stream, &captured), "graph capture");
  const cudaError_t status = cudaGraphInstantiate(&graph_, captured, 0);
  cudaGraphDestroy(captured);
  if (status == cudaErrorMemoryAllocation) {  // slower, but the same bytes without the record
    cudaGetLastError();
    graph_ = nullptr;
    return;
  }
  check(status, "graph instantiation");
  check(cudaGraphUpload(graph_, launch_.stream), "graph upload");
}

void CudaExecutable::prepare() {
  if (graph_ == nullptr) capture();
}

void CudaExecutable::run() {
  check(cudaEventRecord(began_, launch_.stream), "event");
  if (graph_ == nullptr && ran_) capture();
  if (graph_ != nullptr) {
    check(cudaGraphLaunch(graph_, launch_.stream), "graph launch");
  } else {
    enqueue_all();
    ran_ = true;
  }
  check(cudaEventRecord(ended_, launch_.stream), "event");
}

double CudaExecutable::seconds() const {
  float ms = 0;
  check(cudaEventSynchronize(ended_), "waiting for the device");
  check(cudaEventElapsedTime(&ms, began_, ended_), "event");
  return 1e-3 * static_cast<double>(ms);
}

namespace {

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event); }
};

}  // namespace

void CudaExecutable::run_checked(const Hook& hook) {
  const Event first_event, last_event;
  const cudaEvent_t begin = first_event.event, end = last_event.event;
  for (const Task& task : tasks_) {
    float ms = 0;
    check(cudaEventRecord(begin, launch_.stream), "event");
    enqueue(task, launch_);
    check(cudaEventRecord(end, launch_.stream), "event");
    check(cudaEventSynchronize(end), op_def(steps_[task.first].call.node->op).name.data());
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    for (std::size_t i = task.first; i < task.end; ++i) {
      const bool last = i + 1 == task.end;
      hook(steps_[i].node, steps_[i].call, last ? 1e-3 * static_cast<double>(ms) : 0);
    }
  }
}

}  // namespace nibble::cuda
