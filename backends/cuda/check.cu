#include "backends/cuda/kernel.h"
#include "engine/error.h"

namespace nibble::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw DeviceError(std::string(what) + ": " + cudaGetErrorString(status) + " (CUDA error " +
                        std::to_string(static_cast<int>(status)) + ")",
                    static_cast<int>(status));
}

}  // namespace nibble::cuda
