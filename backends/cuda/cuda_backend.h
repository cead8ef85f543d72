// The CUDA backend, and the two functions through which it is reached when it is a library loaded
// on demand: nothing that uses it links CUDA.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace nibble::cuda {

struct DeviceDescription {
  int number = 0;
  std::string name;
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  std::int64_t memory_bytes = 0, free_bytes = 0;  // free: 0 when not read or not to be had
};

struct CudaOptions {
  int device = 0;
  std::int64_t memory_limit = 0;       // bytes that allocate() may hand out in all; 0: no limit
  std::int64_t host_memory_limit = 0;  // the same of allocate_host()
  bool hopper_kernels = true;          // false: those that run on sm_80 alone
  // Not null: a backend that only plans, for a card that need not be there. Everything that
  // touches a device throws Unsupported.
  const DeviceDescription* planned_for = nullptr;
};

// What the card itself counts.
struct Counters {
  std::int64_t device_used_bytes = 0;  // by everything on the card, the context included
  double joules = -1;                  // since some fixed moment; -1: the card does not say
};

// Throws DeviceError when there is no driver, no such device, or its memory cannot be used;
// Unsupported when the device is older than sm_80. The backend serves one thread at a time. After a
// device error every call throws: what the device holds is lost.
std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options);
// Reading free memory makes a context on every device, which takes time and memory of each.
enum class FreeMemory { skip, read };
std::vector<DeviceDescription> cuda_devices(FreeMemory free_memory);
Counters cuda_counters(int device);

// The C names of the functions above inside libnibble-cuda, for dlsym.
using MakeBackend = Backend* (*)(const CudaOptions* options);
using ListDevices = void (*)(FreeMemory free_memory, std::vector<DeviceDescription>* out);
using ReadCounters = void (*)(int device, Counters* out);
inline constexpr const char* kMakeBackendSymbol = "nibble_cuda_make_backend";
inline constexpr const char* kListDevicesSymbol = "nibble_cuda_list_devices";
inline constexpr const char* kReadCountersSymbol = "nibble_cuda_read_counters";

}  // namespace nibble::cuda
