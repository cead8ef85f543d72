// What goes wrong on a device is said once and clearly, and never turns into numbers. A fault ends
// the process's use of the device, so that case comes last.
#include <functional>

#include "engine/error.h"
#include "engine/ops.h"
#include "engine/plan.h"
#include "tests/gpu_main.h"

using namespace nibble;

NIBBLE_GPU_MAIN("faults-cuda")

namespace {

std::string message_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("a device that is not there is named") {
  const std::string message = message_of([] { cuda::open_cuda({.device = 99}); });
  CHECK_MESSAGE(has(message, "there is no CUDA device 99"), message);
}

TEST_CASE("memory that is not to be had, and memory past the limit") {
  const auto backend = cuda::open_cuda({.device = 0, .memory_limit = std::int64_t{1} << 50});
  CHECK_THROWS_AS(backend->allocate(std::int64_t{1} << 45, "weights"), OutOfMemory);
  const std::string message =
      message_of([&] { backend->allocate(std::int64_t{1} << 45, "weights"); });
  CHECK_MESSAGE(has(message, "weights: "), message);
  CHECK(backend->allocated_bytes() == 0);
  const auto buffer = backend->allocate(1 << 20, "arena");  // and it goes on
  CHECK(backend->allocated_bytes() == 1 << 20);
  const auto small = cuda::open_cuda({.device = 0, .memory_limit = 1 << 20});
  CHECK_THROWS_AS(small->allocate((1 << 20) + 1, "arena"), OutOfMemory);
}

TEST_CASE("host memory that cannot be page-locked: what, how much, and what to do") {
  const auto backend = cuda::open_cuda({});
  const std::string message =
      message_of([&] { backend->allocate_host(std::int64_t{1} << 46, "optimizer pages"); });
  CHECK_MESSAGE(message.starts_with("optimizer pages: 70368744177664 bytes"), message);
  CHECK_MESSAGE(has(message, "ulimit -l"), message);
  CHECK_MESSAGE(has(message, "--host-memory"), message);
  CHECK(message.find('\n') == std::string::npos);
  CHECK(backend->host_allocated_bytes() == 0);
  const auto buffer = backend->allocate_host(1 << 20, "optimizer pages");  // and it goes on
  CHECK(backend->host_allocated_bytes() == 1 << 20);
}

TEST_CASE("after a fault the backend says so instead of returning numbers") {
  const auto backend = cuda::open_cuda({});
  Graph graph(DType::F32);
  const Tensor x = graph.input("x", {DType::F32, {1024, 1024}, {}});
  const Tensor y = add(x, x);
  graph.keep(y);
  const Plan plan = make_plan(graph, *backend);
  const auto arena = backend->allocate(plan.arena_bytes, "arena");
  Bindings bindings;
  bindings.arena = arena->data();
  bindings.leaves = {reinterpret_cast<std::byte*>(std::uintptr_t{4096}), nullptr};  // not ours
  const auto executable = backend->compile(plan, bindings);
  std::byte host[4];
  const std::string first = message_of([&] {
    executable->run();
    backend->download(host, arena->data());
  });
  CHECK_MESSAGE(has(first, "checkpoint is intact"), first);
  const std::string second = message_of([&] { executable->run(); });
  CHECK_MESSAGE(has(second, "stopped after an error"), second);
  CHECK_THROWS_AS(backend->download(host, arena->data()), DeviceError);
  CHECK_THROWS_AS(backend->allocate(16, "more"), DeviceError);
}
