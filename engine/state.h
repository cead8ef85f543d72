// Where training state is written to and read from. The engine names tensors; the file behind is
// the caller's choice.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "engine/dtype.h"

namespace nibble {

class StateSink {
 public:
  virtual ~StateSink() = default;
  virtual void write(std::string_view name, const TensorType& type,
                     std::span<const std::byte> bytes) = 0;
};

class StateSource {
 public:
  virtual ~StateSource() = default;
  // Fills `bytes` with the tensor; throws Error naming it when it is missing or of another type.
  virtual void read(std::string_view name, const TensorType& type, std::span<std::byte> bytes) = 0;
};

}  // namespace nibble
