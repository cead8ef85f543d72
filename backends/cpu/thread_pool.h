// A fixed set of threads that share out numbered tasks.
//
// Tasks go to whichever thread is free, so a task's result must depend on its number alone: that
// is how results stay the same for every thread count. The caller works too; a thread that is
// late to wake is not waited for unless it has taken a task.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace nibble::cpu {

// Borrows something callable as void(task, thread) for the duration of a call.
class TaskRef {
 public:
  template <class F>
  requires(!std::is_same_v<std::remove_cvref_t<F>, TaskRef>)
      TaskRef(F&& callable)  // NOLINT: implicit, so that a lambda can be passed
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),
        call_([](void* object, std::int64_t task, int thread) {
          (*static_cast<std::remove_reference_t<F>*>(object))(task, thread);
        }) {}
  void operator()(std::int64_t task, int thread) const { call_(object_, task, thread); }

 private:
  void* object_;
  void (*call_)(void*, std::int64_t, int);
};

class ThreadPool {
 public:
  // `threads` counts the calling thread and is at least 1; with 1 everything runs inline.
  explicit ThreadPool(int threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(task, thread) for task = 0 ... tasks-1 and returns when all are done; `thread` is
  // below threads() and never used by two tasks at once. The first exception stops the handing
  // out of tasks and is thrown again here. One caller at a time, and not from inside a task.
  void parallel_for(std::int64_t tasks, TaskRef body);

 private:
  void work(int thread);
  void run_tasks(const TaskRef& body, std::int64_t tasks, int thread);
  void stop();

  std::vector<std::thread> workers_;
  int spins_;  // pauses before a waiting thread sleeps; 0 when there are more threads than cores

  // The open job. `body_`, `tasks_`, `open_` and `active_` are guarded by mutex_; active_ is also
  // read without it while the caller spins.
  std::mutex mutex_;
  const TaskRef* body_ = nullptr;
  std::int64_t tasks_ = 0;
  bool open_ = false;
  std::exception_ptr error_;
  std::atomic<int> active_ = 0;                // workers inside the job
  std::atomic<std::int64_t> next_ = 0;         // the task to hand out next
  std::atomic<std::uint32_t> generation_ = 0;  // counts jobs; workers sleep on it
  std::atomic<bool> quit_ = false;
};

}  // namespace nibble::cpu
