// Which device a command runs on: --backend auto|cpu|cuda[:N] and --kernels auto|sm80, and what
// `nibble devices` shows.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <string>

#include "engine/backend.h"

namespace CLI {
class App;
}

namespace nibble {

struct CardFigures;

struct BackendChoice {
  std::string name = "auto";     // auto: CUDA where it is available
  std::string kernels = "auto";  // sm80: without those of newer cards
  int threads = 0;               // of the CPU; 0: all cores
};

// The flags that choose, in the help's group `group`.
void add_backend_flags(CLI::App& command, BackendChoice& choice,
                       const std::string& group = "OPTIONS");

// Throws Unsupported or DeviceError with the reason why the device asked for cannot be had.
// The limits are bytes that the backend may hand out in all, on the device and page-locked on the
// host; 0: no limit.
std::unique_ptr<Backend> open_backend(const BackendChoice& choice, std::int64_t memory_limit,
                                      std::int64_t host_memory_limit = 0);
// A backend that plans for a card that need not be there.
std::unique_ptr<Backend> open_planning_backend(const BackendChoice& choice,
                                               const CardFigures& card);

bool is_cuda(const BackendInfo& info);
int device_number(const BackendInfo& info);  // 0 for the CPU

// "bf16" or "f32" to a dtype; empty: what suits the backend (F32 on a CPU, BF16 on a GPU).
std::string resolve_compute(const std::string& compute, const BackendInfo& info);
DType compute_dtype(const std::string& name);

struct DevicesRequest {
  bool json = false;
};
void add_devices_flags(CLI::App& command, DevicesRequest& request);
int devices_command(const DevicesRequest& request, std::ostream& out);

}  // namespace nibble
