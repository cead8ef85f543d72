// libnibble-cuda, loaded when it is asked for: programs link this file and run on machines without
// CUDA. The library is looked for beside the program, where a build tree and an installation have
// it, and on the system's path; once loaded it stays.
#pragma once

#include "backends/cuda/cuda_backend.h"

namespace nibble::cuda {

// Throws Unsupported "CUDA is not available: REASON" when the library cannot be loaded, and what
// make_cuda_backend() throws.
std::unique_ptr<Backend> open_cuda(const CudaOptions& options);

struct Devices {
  std::vector<DeviceDescription> list;
  std::string unavailable;  // why the list is empty
};
Devices find_cuda_devices(FreeMemory free_memory = FreeMemory::skip);

// Of an opened device.
Counters read_cuda_counters(int device);

}  // namespace nibble::cuda
