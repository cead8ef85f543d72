// The exceptions of the public API. Every message is one line and says where, what was found,
// what was wanted and what to do about it (see README, "Errors").
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace nibble {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Shapes or dtypes of an operation's inputs do not fit together.
class ShapeError : public Error {
 public:
  using Error::Error;
};

// A file is not what its format says. The message is "FILE: at byte OFFSET: what was found".
class FormatError : public Error {
 public:
  FormatError(std::string file, std::uint64_t offset, const std::string& what)
      : Error(file + ": at byte " + std::to_string(offset) + ": " + what),
        file(std::move(file)),
        offset(offset) {}
  std::string file;
  std::uint64_t offset;  // bytes from the start of `file`
};

// The operating system or a device refused. `code` is errno or the device's own error number.
class DeviceError : public Error {
 public:
  DeviceError(const std::string& what, int code) : Error(what), code(code) {}
  int code;
};

// What a backend computes in, or what it has of the host's: page-locked on a device.
enum class MemoryKind { device, host };

// Memory cannot be had. `needed_bytes`: what is held and what was asked for; `budget_bytes`: what
// is held and what was there, or the limit that was set; 0: not known. The message names purpose
// and bytes.
class OutOfMemory : public Error {
 public:
  OutOfMemory(const std::string& what, MemoryKind kind, std::int64_t needed_bytes,
              std::int64_t budget_bytes)
      : Error(what), kind(kind), needed_bytes(needed_bytes), budget_bytes(budget_bytes) {}
  MemoryKind kind;
  std::int64_t needed_bytes, budget_bytes;
};

// Something that exists but that Nibble, or one backend of it, cannot do. Names what is supported.
class Unsupported : public Error {
 public:
  using Error::Error;
};

}  // namespace nibble
