// Tasks shared out over threads that are started for them, for loading and converting, where a task
// is milliseconds of work. Kernels have the CPU backend's pool.
#pragma once

#include <cstdint>
#include <functional>

namespace nibble {

// Runs body(task, thread) for task = 0 ... tasks-1 on at most `threads` threads, the caller's among
// them, and returns when all are done; `thread` is below `threads` and never used by two tasks at
// once. The first exception stops the handing out of tasks and is thrown again here. Where the
// system refuses a thread, the others do its share.
void parallel_for(int threads, std::int64_t tasks,
                  const std::function<void(std::int64_t task, int thread)>& body);

}  // namespace nibble
