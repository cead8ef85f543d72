// A CPU kernel: three plain functions. Kernel files are compiled once per instruction set
// (isa.h) inside namespace nibble::cpu::NIBBLE_ISA; each defines NAME_kernel for the op NAME.
//
// Work is cut into tasks whose results do not depend on who runs them, and sums run in an order
// fixed by the shapes alone: the bytes are the same for every number of threads.
#pragma once

#include <cstdint>

#include "backends/cpu/thread_pool.h"
#include "engine/backend.h"

namespace nibble::cpu {

struct Kernel {
  // Whether the dtypes of the call are covered.
  bool (*supports)(const OpCall& call);
  // Scratch in bytes for this call with `threads` threads; null: none.
  std::int64_t (*scratch_bytes)(const OpCall& call, int threads);
  void (*run)(const OpCall& call, ThreadPool& pool);
};

}  // namespace nibble::cpu
