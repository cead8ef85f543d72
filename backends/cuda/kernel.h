// A CUDA kernel: three plain functions. Each file backends/cuda/NAME.cu defines NAME_kernel for the
// op NAME, forward and backward of one idea in one file.
//
// run() only enqueues on launch.stream: no allocation, no synchronization, no host read of device
// memory, so that every call can be captured into a CUDA graph. Work is cut into pieces whose
// results do not depend on scheduling and sums run in an order fixed by the shapes: no float
// atomics. The same call gives the same bytes, always.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "engine/backend.h"

namespace nibble::cuda {

class Blas;  // blas.h

// What routes and scratch sizes may depend on: the card, and which kernels the caller allows.
struct Card {
  int capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  std::int64_t shared_bytes = 99 * 1024;  // a block may use
  bool hopper = false;                    // capability 90 and the Hopper kernels are allowed
};

struct Launch {
  cudaStream_t stream = nullptr;
  // Copies from and to host memory run beside the kernels, on these.
  cudaStream_t copy_in = nullptr, copy_out = nullptr;
  // The kernel may become resident before the one in front of it has ended.
  bool overlaps = true;
  const Card* card = nullptr;
  Blas* blas = nullptr;
};

struct Kernel {
  // Whether the dtypes of the call are covered.
  bool (*supports)(const OpCall& call);
  // Scratch in bytes, a pure function of the call's types and params and the card; null: none.
  std::int64_t (*scratch_bytes)(const OpCall& call, const Card& card);
  void (*run)(const OpCall& call, const Launch& launch);
};

// Throws DeviceError naming `what` when `status` is not success.
void check(cudaError_t status, const char* what);

}  // namespace nibble::cuda
