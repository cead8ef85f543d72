#include "engine/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace nibble {

void parallel_for(int threads, std::int64_t tasks,
                  const std::function<void(std::int64_t, int)>& body) {
  std::atomic<std::int64_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&](int thread) {
    try {
      for (std::int64_t task = next++; task < tasks; task = next++) body(task, thread);
    } catch (...) {
      next = tasks;
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  // Nothing may leave this function while threads run: a thread that is not joined ends the
  // process.
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < threads && thread < tasks; ++thread) {
      others.emplace_back(work, thread);
    }
  } catch (const std::exception&) {
  }
  work(0);
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace nibble
