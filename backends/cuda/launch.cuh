// How the kernels of this backend start: each may become resident and set itself up while the one
// before it in the stream is ending (programmatic dependent launch, sm_90 and later), which hides
// most of what a launch costs in a graph of many short kernels.
//
// The contract: the first statement of a kernel started by start_kernel() is begin_kernel(), in
// every block and before any return or access of global memory (its parameters aside). A kernel
// that ends without having waited would let the one after it start before the one before it is
// done. Where there is work that nothing before can have written, admit_successor(), that work and
// wait_for_predecessor() take begin_kernel()'s place.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "backends/cuda/kernel.h"

namespace nibble::cuda {

// Until the kernels before this one are done and what they wrote is visible.
__device__ inline void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may become resident as multiprocessors have room.
__device__ inline void admit_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void begin_kernel() {
  admit_successor();
  wait_for_predecessor();
}

// Starts a kernel on launch.stream in clusters of `cluster` blocks. Throws DeviceError naming
// `name` when the launch is refused.
template <class... Params, class... Args>
void start_clusters(const char* name, void (*kernel)(Params...), int cluster, dim3 grid, dim3 block,
                    std::size_t shared_bytes, const Launch& launch, Args&&... args) {
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, kernel), name);
  // Never lowered: graphs recorded with more stay valid.
  if (const auto bytes = static_cast<int>(shared_bytes);
      bytes > compiled.maxDynamicSharedSizeBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  // Only code compiled for sm_90 or later waits for the kernel before it.
  if (launch.overlaps && launch.card->capability >= 90 && compiled.ptxVersion >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}
template <class... Params, class... Args>
void start_kernel(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                  std::size_t shared_bytes, const Launch& launch, Args&&... args) {
  start_clusters(name, kernel, 1, grid, block, shared_bytes, launch, std::forward<Args>(args)...);
}

}  // namespace nibble::cuda
