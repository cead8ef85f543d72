// Device memory, and the way of bytes between it and ordinary host memory.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <span>

#include "engine/backend.h"

namespace nibble::cuda {

// cudaMalloc, counted in `total`, which must outlive the buffer. No bytes: no allocation.
class DeviceBuffer final : public Buffer {
 public:
  DeviceBuffer(std::int64_t bytes, std::int64_t& total);
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() override;
  std::byte* data() override { return data_; }
  std::int64_t size() const override { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::int64_t bytes_;
  std::int64_t& total_;
};

// Page-locked host memory, cleared; counted in the same way. Throws OutOfMemory.
class PinnedBuffer final : public Buffer {
 public:
  PinnedBuffer(std::int64_t bytes, std::string_view purpose, std::int64_t& total);
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer() override;
  std::byte* data() override { return data_; }
  std::int64_t size() const override { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::int64_t bytes_;
  std::int64_t& total_;
};

// Pinned slots through which uploads travel: the caller's memory is free again when upload()
// returns, while the copy itself goes on beside the host. Slots are reused in turn, each after the
// copies out of it are done.
class Staging {
 public:
  explicit Staging(cudaStream_t stream);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();
  void upload(std::byte* to, std::span<const std::byte> from);
  void download(std::span<std::byte> to, const std::byte* from);  // waits for the stream

 private:
  static constexpr std::size_t kSlotBytes = std::size_t{8} << 20;
  struct Slot {
    std::byte* data = nullptr;
    cudaEvent_t done = nullptr;
  };
  struct Empty {};
  Staging(cudaStream_t stream, Empty);
  void next_slot();
  cudaStream_t stream_;
  std::array<Slot, 4> slots_;
  std::size_t current_ = 0, used_ = 0;  // bytes of the current slot in use
  std::byte* landing_ = nullptr;        // downloads
};

}  // namespace nibble::cuda
