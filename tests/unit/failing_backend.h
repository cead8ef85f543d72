// A backend whose Nth reservation fails, for sweeps over N: device memory and host memory are
// counted in one sequence. Everything else is the wrapped backend's. It says that it cannot read
// host memory, so that a run takes what it takes on a device: weights that are not used from their
// file, an embedding table in host memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "engine/error.h"

namespace nibble::test {

class FailingBackend final : public Backend {
 public:
  struct Reservation {
    MemoryKind kind;
    std::string purpose;
    std::int64_t bytes;
  };

  // The reservation number `fail_at` (from 1; 0: none) fails, once. There were `there` bytes.
  explicit FailingBackend(std::unique_ptr<Backend> inner, std::size_t fail_at = 0,
                          std::int64_t there = 0)
      : inner_(std::move(inner)), fail_at_(fail_at), there_(there) {}

  // Everything asked for so far, what failed included.
  const std::vector<Reservation>& reservations() const { return reservations_; }

  BackendInfo info() const override {
    BackendInfo info = inner_->info();
    info.reads_host_memory = false;
    return info;
  }
  bool supports(const OpCall& call) const override { return inner_->supports(call); }
  std::int64_t scratch_bytes(const OpCall& call) const override {
    return inner_->scratch_bytes(call);
  }
  bool fuses(const Graph& graph, std::span<const std::int32_t> group,
             std::int32_t next) const override {
    return inner_->fuses(graph, group, next);
  }
  std::unique_ptr<Buffer> allocate(std::int64_t bytes, std::string_view purpose) override {
    count({MemoryKind::device, std::string(purpose), bytes});
    return inner_->allocate(bytes, purpose);
  }
  std::int64_t allocated_bytes() const override { return inner_->allocated_bytes(); }
  std::unique_ptr<Buffer> allocate_host(std::int64_t bytes, std::string_view purpose) override {
    count({MemoryKind::host, std::string(purpose), bytes});
    return inner_->allocate_host(bytes, purpose);
  }
  std::int64_t host_allocated_bytes() const override { return inner_->host_allocated_bytes(); }
  void upload(std::byte* to, std::span<const std::byte> from) override { inner_->upload(to, from); }
  void download(std::span<std::byte> to, const std::byte* from) override {
    inner_->download(to, from);
  }
  void clear(std::byte* to, std::int64_t bytes) override { inner_->clear(to, bytes); }
  std::unique_ptr<Executable> compile(const Plan& plan, const Bindings& bindings) override {
    return inner_->compile(plan, bindings);
  }

 private:
  void count(const Reservation& next) {
    reservations_.push_back(next);
    if (reservations_.size() != fail_at_) return;
    throw OutOfMemory(next.purpose + ": " + std::to_string(next.bytes) + " bytes were refused",
                      next.kind, next.bytes, there_);
  }

  std::unique_ptr<Backend> inner_;
  std::size_t fail_at_;
  std::int64_t there_;
  std::vector<Reservation> reservations_;
};

}  // namespace nibble::test
