#include "backends/cuda/load.h"

#include "engine/error.h"
#include "engine/os.h"

namespace nibble::cuda {
namespace {

const os::Library& library() {
  static const os::Library loaded = [] {
    const std::string directory = os::executable_directory(), file = "libnibble-cuda.so";
    const std::vector<std::string> names = {directory + "/" + file,
                                            directory + "/../backends/cuda/" + file,
                                            directory + "/../lib/" + file, file};
    return os::Library(names);
  }();
  return loaded;
}

template <class Function>
Function symbol(const char* name) {
  const os::Library& loaded = library();
  if (!loaded.loaded()) {
    throw Unsupported("CUDA is not available: " + loaded.error() +
                      "; libnibble-cuda is built where the CUDA toolkit is");
  }
  void* found = loaded.symbol(name);
  if (found == nullptr) {
    throw Unsupported("CUDA is not available: libnibble-cuda belongs to another version");
  }
  return reinterpret_cast<Function>(found);
}

}  // namespace

std::unique_ptr<Backend> open_cuda(const CudaOptions& options) {
  return std::unique_ptr<Backend>(symbol<MakeBackend>(kMakeBackendSymbol)(&options));
}

Devices find_cuda_devices(FreeMemory free_memory) {
  Devices devices;
  try {
    symbol<ListDevices>(kListDevicesSymbol)(free_memory, &devices.list);
  } catch (const Error& e) {
    devices.unavailable = e.what();
  }
  return devices;
}

Counters read_cuda_counters(int device) {
  Counters counters;
  symbol<ReadCounters>(kReadCountersSymbol)(device, &counters);
  return counters;
}

}  // namespace nibble::cuda
