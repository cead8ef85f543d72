// Hands out pieces of a kernel's scratch, each aligned to a cache line. A kernel takes its pieces
// in one function, which scratch_bytes calls on an empty object to learn how much to ask for.
//
// Only for files compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/dtype.h"

namespace nibble::cpu::NIBBLE_ISA {

class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(void* base) : base_(static_cast<std::byte*>(base)) {}

  // Room for `count` values of T; null while only measuring.
  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t at = used_;
    used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  std::int64_t used() const { return used_; }

 private:
  std::byte* base_ = nullptr;
  std::int64_t used_ = 0;
};

}  // namespace nibble::cpu::NIBBLE_ISA
