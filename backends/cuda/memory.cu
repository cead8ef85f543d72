#include "backends/cuda/memory.h"

#include <algorithm>
#include <cstring>

#include "backends/cuda/kernel.h"
#include "engine/error.h"

namespace nibble::cuda {

namespace {

// Page-locked host memory. Throws OutOfMemory; `held` bytes are there already.
std::byte* pin(std::int64_t bytes, std::string_view purpose, std::int64_t held) {
  void* data = nullptr;
  const cudaError_t status =
      cudaHostAlloc(&data, static_cast<std::size_t>(bytes), cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation || status == cudaErrorNotSupported) {
    cudaGetLastError();
    throw OutOfMemory(std::string(purpose) + ": " + std::to_string(bytes) +
                          " bytes of host memory cannot be page-locked (" +
                          cudaGetErrorString(status) +
                          "); free some, raise the limit (ulimit -l, the container's memory), or "
                          "lower --host-memory",
                      MemoryKind::host, held + bytes, 0);
  }
  check(status, "page-locking host memory");
  return static_cast<std::byte*>(data);
}

}  // namespace

DeviceBuffer::DeviceBuffer(std::int64_t bytes, std::int64_t& total) : bytes_(bytes), total_(total) {
  if (bytes == 0) return;
  void* data = nullptr;
  check(cudaMalloc(&data, static_cast<std::size_t>(bytes)), "cudaMalloc");
  data_ = static_cast<std::byte*>(data);
  total_ += bytes_;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ == nullptr) return;
  cudaFree(data_);
  total_ -= bytes_;
}

PinnedBuffer::PinnedBuffer(std::int64_t bytes, std::string_view purpose, std::int64_t& total)
    : bytes_(bytes), total_(total) {
  if (bytes == 0) return;
  data_ = pin(bytes, purpose, total);
  std::memset(data_, 0, static_cast<std::size_t>(bytes));
  total_ += bytes_;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ == nullptr) return;
  cudaFreeHost(data_);
  total_ -= bytes_;
}

// From the end of the first constructor on the destructor runs, also when the second one throws.
Staging::Staging(cudaStream_t stream, Empty) : stream_(stream) {}

Staging::Staging(cudaStream_t stream) : Staging(stream, Empty{}) {
  for (Slot& slot : slots_) {
    slot.data = pin(kSlotBytes, "upload slot", 0);
    check(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "cudaEventCreate");
  }
  landing_ = pin(kSlotBytes, "download slot", 0);
}

Staging::~Staging() {
  cudaStreamSynchronize(stream_);
  for (const Slot& slot : slots_) {
    if (slot.done != nullptr) cudaEventDestroy(slot.done);
    if (slot.data != nullptr) cudaFreeHost(slot.data);
  }
  if (landing_ != nullptr) cudaFreeHost(landing_);
}

void Staging::next_slot() {
  check(cudaEventRecord(slots_[current_].done, stream_), "upload");
  current_ = (current_ + 1) % slots_.size();
  used_ = 0;
  check(cudaEventSynchronize(slots_[current_].done), "upload");
}

void Staging::upload(std::byte* to, std::span<const std::byte> from) {
  while (!from.empty()) {
    if (used_ == kSlotBytes) next_slot();
    const std::size_t count = std::min(from.size(), kSlotBytes - used_);
    std::byte* staged = slots_[current_].data + used_;
    std::memcpy(staged, from.data(), count);
    check(cudaMemcpyAsync(to, staged, count, cudaMemcpyDefault, stream_), "upload");
    used_ = std::min(kSlotBytes, (used_ + count + 255) / 256 * 256);
    to += count;
    from = from.subspan(count);
  }
}

void Staging::download(std::span<std::byte> to, const std::byte* from) {
  while (!to.empty()) {
    const std::size_t count = std::min(to.size(), kSlotBytes);
    check(cudaMemcpyAsync(landing_, from, count, cudaMemcpyDefault, stream_), "download");
    check(cudaStreamSynchronize(stream_), "waiting for the device");
    std::memcpy(to.data(), landing_, count);
    to = to.subspan(count);
    from += count;
  }
}

}  // namespace nibble::cuda
