// The CPU backend: every op of the registry in F64, F32 and BF16, on a fixed set of threads. It is
// the oracle of the other backends and what debugging runs on.
#pragma once

#include <memory>
#include <optional>

#include "backends/cpu/isa.h"
#include "engine/backend.h"

namespace nibble::cpu {

struct CpuOptions {
  int threads = 1;
  std::optional<Isa> isa;              // the widest that the machine has when empty
  std::int64_t memory_limit = 0;       // bytes that allocate() may hand out in all; 0: no limit
  std::int64_t host_memory_limit = 0;  // the same of allocate_host()
};

// Throws Unsupported when the machine lacks `isa`. The backend serves one thread at a time.
std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

}  // namespace nibble::cpu
