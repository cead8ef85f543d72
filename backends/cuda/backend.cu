// Opening a device, handing out its memory, and the C symbols of libnibble-cuda.
#include <dlfcn.h>

#include <algorithm>
#include <optional>

#include "backends/cuda/blas.h"
#include "backends/cuda/cuda_backend.h"
#include "backends/cuda/executable.h"
#include "backends/cuda/kernel.h"
#include "backends/cuda/memory.h"
#include "engine/error.h"

namespace nibble::cuda {
namespace {

constexpr std::int64_t kAlignment = 256;
constexpr std::int64_t kAllocationBytes = 2 << 20;  // a page of device memory
constexpr int kOldest = 80;
// Left free for what is not counted: recorded programs, loaded modules. A bench of eight programs
// took under 100 MiB beside the context, which is already there when free memory is read.
constexpr std::int64_t kReserve = 256 << 20;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// The number of devices; throws what a user can act on.
int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (status == cudaErrorInsufficientDriver && driver > 0) {
    throw DeviceError("CUDA is not available: the NVIDIA driver supports CUDA " +
                          version_text(driver) + ", this build needs " + version_text(runtime) +
                          "; update the driver, or use --backend cpu",
                      static_cast<int>(status));
  }
  if (status == cudaErrorInsufficientDriver) {
    throw DeviceError("CUDA is not available: no NVIDIA driver is installed; use --backend cpu",
                      static_cast<int>(status));
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    throw DeviceError(
        "CUDA is not available: the driver shows no device (CUDA_VISIBLE_DEVICES may hide it); use "
        "--backend cpu",
        static_cast<int>(cudaErrorNoDevice));
  }
  check(status, "looking for devices");
  return count;
}

DeviceDescription describe_device(int number) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, number), "reading the device's properties");
  DeviceDescription d;
  d.number = number;
  d.name = properties.name;
  d.capability = 10 * properties.major + properties.minor;
  d.multiprocessors = properties.multiProcessorCount;
  d.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  return d;
}

#ifdef NIBBLE_HOPPER
constexpr bool kHasHopperKernels = true;
#else
constexpr bool kHasHopperKernels = false;
#endif

__global__ void probe() {}

// NVML by hand: the library comes with the driver, its header may not be there. Calls f(symbol,
// device), where symbol(name) finds a function; false when anything is missing.
template <class F>
bool with_nvml(int device, F&& f) {
  static void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  const auto symbol = [](const char* name) { return dlsym(library, name); };
  const auto init = reinterpret_cast<int (*)()>(symbol("nvmlInit_v2"));
  const auto find =
      reinterpret_cast<int (*)(const char*, void**)>(symbol("nvmlDeviceGetHandleByPciBusId_v2"));
  char bus[32];
  void* handle = nullptr;
  return init != nullptr && find != nullptr && init() == 0 &&
         cudaDeviceGetPCIBusId(bus, sizeof bus, device) == cudaSuccess && find(bus, &handle) == 0 &&
         f(symbol, handle);
}

double total_joules(int device) {
  unsigned long long millijoules = 0;
  const bool known = with_nvml(device, [&](auto symbol, void* handle) {
    const auto read = reinterpret_cast<int (*)(void*, unsigned long long*)>(
        symbol("nvmlDeviceGetTotalEnergyConsumption"));
    return read != nullptr && read(handle, &millijoules) == 0;
  });
  return known ? 1e-3 * static_cast<double>(millijoules) : -1;
}

// Memory in use by everything on the card, without making a context; -1: not known.
std::int64_t nvml_used_bytes(int device) {
  struct {
    unsigned long long total, free, used;
  } memory{};
  const bool known = with_nvml(device, [&](auto symbol, void* handle) {
    const auto read = reinterpret_cast<int (*)(void*, void*)>(symbol("nvmlDeviceGetMemoryInfo"));
    return read != nullptr && read(handle, &memory) == 0;
  });
  return known ? static_cast<std::int64_t>(memory.used) : -1;
}

// What both backends below know: the kernels of a card.
class CardBackend : public Backend {
 public:
  bool supports(const OpCall& call) const override {
    return find_kernel(call.node->op).supports(call);
  }
  std::int64_t scratch_bytes(const OpCall& call) const override {
    const Kernel& kernel = find_kernel(call.node->op);
    return kernel.scratch_bytes == nullptr ? 0 : kernel.scratch_bytes(call, card_);
  }
  bool fuses(const Graph& graph, std::span<const std::int32_t> group,
             std::int32_t next) const override {
    return fuses_group(graph, group, next);
  }

 protected:
  BackendInfo info_of(const std::string& name, std::int64_t memory_bytes) const {
    return {.name = name,
            .description = description_.name + (card_.hopper ? "" : ", sm_80 kernels"),
            .alignment = kAlignment,
            .allocation_bytes = kAllocationBytes,
            .plane_alignment = kHostPlaneAlignment,
            .reads_host_memory = false,
            .memory_bytes = memory_bytes,
            .rounds_operands = true};
  }
  DeviceDescription description_;
  Card card_;
};

// What a backend on such a card would plan, without the card.
class PlanningBackend final : public CardBackend {
 public:
  PlanningBackend(const DeviceDescription& device, bool hopper_kernels) {
    description_ = device;
    card_.capability = device.capability;
    card_.multiprocessors = device.multiprocessors;
    card_.hopper = kHasHopperKernels && device.capability == 90 && hopper_kernels;
    // Of a block (CUDA C++ Programming Guide, technical specifications by compute capability).
    const int kib = device.capability == 80 ? 163 : device.capability == 90 ? 227 : 99;
    card_.shared_bytes = kib * 1024;
  }
  BackendInfo info() const override { return info_of("cuda", description_.memory_bytes); }
  std::unique_ptr<Buffer> allocate(std::int64_t, std::string_view) override { refuse(); }
  std::int64_t allocated_bytes() const override { return 0; }
  std::unique_ptr<Buffer> allocate_host(std::int64_t, std::string_view) override { refuse(); }
  std::int64_t host_allocated_bytes() const override { return 0; }
  void upload(std::byte*, std::span<const std::byte>) override { refuse(); }
  void download(std::span<std::byte>, const std::byte*) override { refuse(); }
  void clear(std::byte*, std::int64_t) override { refuse(); }
  std::unique_ptr<Executable> compile(const Plan&, const Bindings&) override { refuse(); }

 private:
  [[noreturn]] void refuse() const {
    throw Unsupported("this backend only plans for " + description_.name);
  }
};

class CudaBackend final : public CardBackend {
 public:
  explicit CudaBackend(const CudaOptions& options) : CudaBackend(options, Closed{}) {
    const int count = device_count();
    if (device_ < 0 || device_ >= count) {
      throw DeviceError(
          "there is no CUDA device " + std::to_string(device_) + "; there " +
              (count == 1 ? "is 1, number 0" : "are " + std::to_string(count) + ", from 0"),
          static_cast<int>(cudaErrorInvalidDevice));
    }
    description_ = describe_device(device_);
    if (description_.capability < kOldest) {
      throw Unsupported(description_.name + " has compute capability " +
                        std::to_string(description_.capability / 10) + "." +
                        std::to_string(description_.capability % 10) +
                        ", 8.0 or newer is supported; use --backend cpu");
    }
    used_before_ = nvml_used_bytes(device_);
    check(cudaSetDevice(device_), description_.name.c_str());
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total),
          (description_.name + " cannot be used; another program may hold all of its memory")
              .c_str());
    free_bytes_ = static_cast<std::int64_t>(free);
    if (used_before_ >= 0) {
      // The two count what the driver itself holds differently: only the change says something.
      used_before_ += static_cast<std::int64_t>(total - free) - nvml_used_bytes(device_);
    }
    card_.capability = description_.capability;
    card_.multiprocessors = description_.multiprocessors;
    check_targets();
    card_.hopper = kHasHopperKernels && description_.capability == 90 && options.hopper_kernels;
    int shared = 0;
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_),
          "reading the device's properties");
    card_.shared_bytes = shared;
    for (cudaStream_t* stream : {&stream_, &copy_in_, &copy_out_}) {
      check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
    }
    staging_.emplace(stream_);
    blas_.emplace();
  }

  ~CudaBackend() override {
    staging_.reset();  // waits for the stream
    for (const cudaStream_t stream : {stream_, copy_in_, copy_out_}) {
      if (stream != nullptr) cudaStreamDestroy(stream);
    }
  }

  BackendInfo info() const override {
    return info_of("cuda:" + std::to_string(device_),
                   free_bytes_ > kReserve ? free_bytes_ - kReserve : 0);
  }

  std::unique_ptr<Buffer> allocate(std::int64_t bytes, std::string_view purpose) override {
    refuse_if_poisoned();
    check_memory_limit(purpose, MemoryKind::device, bytes, allocated_, limit_);
    try {
      check(cudaSetDevice(device_), "cudaSetDevice");
      return std::make_unique<DeviceBuffer>(bytes, allocated_);
    } catch (const DeviceError& e) {
      if (e.code != static_cast<int>(cudaErrorMemoryAllocation)) {
        poison_ = e.what();  // the fault of an earlier kernel
        throw;
      }
      cudaGetLastError();
      std::size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw OutOfMemory(std::string(purpose) + ": " + std::to_string(bytes) + " bytes of " +
                            description_.name + " are not to be had, " + std::to_string(free) +
                            " are free; another program may hold the rest",
                        MemoryKind::device, allocated_ + bytes,
                        static_cast<std::int64_t>(free) + allocated_);
    }
  }
  std::int64_t allocated_bytes() const override { return allocated_; }
  std::int64_t overhead_bytes() const override {
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "reading free memory");
    return static_cast<std::int64_t>(total - free) - std::max<std::int64_t>(used_before_, 0) -
           allocated_;
  }
  std::unique_ptr<Buffer> allocate_host(std::int64_t bytes, std::string_view purpose) override {
    check_memory_limit(purpose, MemoryKind::host, bytes, host_allocated_, host_limit_);
    std::unique_ptr<Buffer> buffer;
    guarded([&] { buffer = std::make_unique<PinnedBuffer>(bytes, purpose, host_allocated_); });
    return buffer;
  }
  std::int64_t host_allocated_bytes() const override { return host_allocated_; }

  void upload(std::byte* to, std::span<const std::byte> from) override {
    guarded([&] { staging_->upload(to, from); });
  }
  void download(std::span<std::byte> to, const std::byte* from) override {
    guarded([&] { staging_->download(to, from); });
  }
  void clear(std::byte* to, std::int64_t bytes) override {
    if (bytes == 0) return;
    guarded([&] {
      check(cudaMemsetAsync(to, 0, static_cast<std::size_t>(bytes), stream_), "clearing memory");
    });
  }

  std::unique_ptr<Executable> compile(const Plan& plan, const Bindings& bindings) override;

  // Runs `work`, after which a device error poisons the backend: what the device holds is lost.
  template <class Work>
  void guarded(Work&& work) {
    refuse_if_poisoned();
    try {
      check(cudaSetDevice(device_), "cudaSetDevice");  // per thread; loading uses several
      work();
    } catch (const DeviceError& e) {
      poison_ = e.what();
      throw DeviceError(poison_ +
                            "; what the device held is lost, the last checkpoint is intact: "
                            "start again with --resume",
                        e.code);
    }
  }

 private:
  // From the end of this constructor on the destructor runs, also when opening the device throws.
  struct Closed {};
  CudaBackend(const CudaOptions& options, Closed)
      : device_(options.device),
        limit_(options.memory_limit),
        host_limit_(options.host_memory_limit) {}
  // Whether this build has code that the card can run.
  void check_targets() const {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
      const std::string number = std::to_string(description_.capability);
      throw Unsupported("this build has no kernels for " + description_.name + " (sm_" + number +
                        "); build with -Dgpu_targets=" + (number == "90" ? "90a" : number) +
                        ", or use --backend cpu");
    }
    check(status, description_.name.c_str());
  }

  void refuse_if_poisoned() const {
    if (poison_.empty()) return;
    throw DeviceError("the CUDA backend stopped after an error (" + poison_ + "); start again", 0);
  }

  int device_;
  std::int64_t limit_, host_limit_;
  std::int64_t free_bytes_ = 0;
  std::int64_t used_before_ = -1;  // by others, before this backend's context; -1: not known
  cudaStream_t stream_ = nullptr, copy_in_ = nullptr, copy_out_ = nullptr;
  std::optional<Staging> staging_;
  std::optional<Blas> blas_;
  std::int64_t allocated_ = 0, host_allocated_ = 0;
  std::string poison_;
};

// An executable whose device errors poison its backend.
class GuardedExecutable final : public Executable {
 public:
  GuardedExecutable(CudaBackend& backend, const Plan& plan, const Bindings& bindings,
                    const Launch& launch)
      : backend_(backend), executable_(plan, bindings, launch) {}
  void run() override {
    backend_.guarded([&] { executable_.run(); });
  }
  void run_checked(const Hook& hook) override {
    backend_.guarded([&] { executable_.run_checked(hook); });
  }
  void prepare() override {
    backend_.guarded([&] { executable_.prepare(); });
  }
  double seconds() const override {
    double seconds = 0;
    backend_.guarded([&] { seconds = executable_.seconds(); });
    return seconds;
  }

 private:
  CudaBackend& backend_;
  CudaExecutable executable_;
};

std::unique_ptr<Executable> CudaBackend::compile(const Plan& plan, const Bindings& bindings) {
  return std::make_unique<GuardedExecutable>(*this, plan, bindings,
                                             Launch{.stream = stream_,
                                                    .copy_in = copy_in_,
                                                    .copy_out = copy_out_,
                                                    .card = &card_,
                                                    .blas = &*blas_});
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  if (options.planned_for != nullptr) {
    return std::make_unique<PlanningBackend>(*options.planned_for, options.hopper_kernels);
  }
  return std::make_unique<CudaBackend>(options);
}

std::vector<DeviceDescription> cuda_devices(FreeMemory free_memory) {
  std::vector<DeviceDescription> devices;
  const int count = device_count();
  for (int i = 0; i < count; ++i) {
    DeviceDescription d = describe_device(i);
    std::size_t free = 0, total = 0;
    if (free_memory == FreeMemory::read) {
      if (cudaSetDevice(i) == cudaSuccess && cudaMemGetInfo(&free, &total) == cudaSuccess) {
        d.free_bytes = static_cast<std::int64_t>(free);
      }
      cudaGetLastError();  // a card that is full or taken is no error of the others
    }
    devices.push_back(d);
  }
  return devices;
}

Counters cuda_counters(int device) {
  Counters counters;
  std::size_t free = 0, total = 0;
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaMemGetInfo(&free, &total), "reading free memory");
  counters.device_used_bytes = static_cast<std::int64_t>(total - free);
  counters.joules = total_joules(device);
  return counters;
}

}  // namespace nibble::cuda

extern "C" {
__attribute__((visibility("default"))) nibble::Backend* nibble_cuda_make_backend(
    const nibble::cuda::CudaOptions* options) {
  return nibble::cuda::make_cuda_backend(*options).release();
}
__attribute__((visibility("default"))) void nibble_cuda_list_devices(
    nibble::cuda::FreeMemory free_memory, std::vector<nibble::cuda::DeviceDescription>* out) {
  *out = nibble::cuda::cuda_devices(free_memory);
}
__attribute__((visibility("default"))) void nibble_cuda_read_counters(int device,
                                                                      nibble::cuda::Counters* out) {
  *out = nibble::cuda::cuda_counters(device);
}
}
