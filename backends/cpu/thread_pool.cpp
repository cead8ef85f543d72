#include "backends/cpu/thread_pool.h"

#include <string>
#include <system_error>
#include <utility>

#include "engine/error.h"

namespace nibble::cpu {
namespace {

// About 10 microseconds of pauses on current machines: longer than the gap between two phases of
// a product, shorter than two trips through the scheduler.
constexpr int kSpins = 256;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  if (threads < 1) {
    throw Error("thread pool: " + std::to_string(threads) + " threads asked for; want at least 1");
  }
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  spins_ = threads <= cores ? kSpins : 0;
  workers_.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error& e) {
    const std::size_t started = workers_.size() + 1;
    stop();
    throw DeviceError("thread pool: the system refused thread " + std::to_string(started + 1) +
                          " of " + std::to_string(threads) + " (" + e.what() +
                          "); use fewer --threads",
                      e.code().value());
  } catch (...) {  // no memory for a thread's own state
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  quit_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::run_tasks(const TaskRef& body, std::int64_t tasks, int thread) {
  try {
    for (;;) {
      const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      body(task, thread);
    }
  } catch (...) {
    next_.store(tasks, std::memory_order_relaxed);
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::work(int thread) {
  std::uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < spins_ && generation_.load() == seen; ++spin) pause();
    generation_.wait(seen);
    seen = generation_.load();
    if (quit_) return;
    const TaskRef* body;
    std::int64_t tasks;
    {
      const std::lock_guard lock(mutex_);
      if (!open_) continue;  // the others finished without this thread
      body = body_;
      tasks = tasks_;
      active_.fetch_add(1);
    }
    run_tasks(*body, tasks, thread);
    active_.fetch_sub(1);
    active_.notify_one();
  }
}

void ThreadPool::parallel_for(std::int64_t tasks, TaskRef body) {
  if (workers_.empty() || tasks <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    body_ = &body;
    tasks_ = tasks;
    open_ = true;
    error_ = nullptr;
    next_.store(0);
  }
  generation_.fetch_add(1);
  generation_.notify_all();
  run_tasks(body, tasks, 0);
  {
    const std::lock_guard lock(mutex_);
    open_ = false;
  }
  for (int spin = 0; spin < spins_ && active_.load() != 0; ++spin) pause();
  for (int active = active_.load(); active != 0; active = active_.load()) active_.wait(active);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace nibble::cpu
