// Everything Nibble asks of the operating system. Implemented by os_posix.cpp and os_windows.cpp;
// no other file includes a system header. Failures throw DeviceError with errno as code and a
// message that names the path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

namespace nibble::os {

// A whole file mapped read-only. Movable; the mapping lives as long as the object. Throws
// OutOfMemory when there is no room for it.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Hints that `bytes` (inside a mapping) will not be read again soon, so that a streaming
// conversion does not count its whole source as resident.
void forget(std::span<const std::byte> bytes);

// Writes to a hidden sibling of `path` and renames onto `path` in commit(): the old file stays
// intact until then and is what remains when anything throws. Not thread safe.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();  // without commit(): removes the temporary file
  void write(std::span<const std::byte> bytes);
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  void write(const std::string& text);
  std::uint64_t position() const { return position_; }
  void commit();  // flush to disk, rename

 private:
  void flush();
  std::string path_, temporary_, buffer_;
  int file_ = -1;
  std::uint64_t position_ = 0;
};

void write_file(const std::string& path, const std::string& text);  // through AtomicFile
void append_file(const std::string& path, const std::string& text);
std::string read_file(const std::string& path);
void sync_directory(const std::string& path);
// Names in a directory, sorted. (std::filesystem's iterator ends the process when memory runs out.)
std::vector<std::string> directory_entries(const std::string& path);

int physical_cores();                // usable by this process (affinity, cgroup), at least 1
std::int64_t memory_bytes();         // of the machine or the cgroup, the smaller
std::int64_t peak_resident_bytes();  // of this process so far
double seconds();                    // monotonic
bool is_terminal(int descriptor);
int terminal_columns(int descriptor);  // 80 when unknown

// A shared library that need not be there.
class Library {
 public:
  explicit Library(std::span<const std::string> names);  // the first that loads
  explicit Library(std::initializer_list<std::string> names)
      : Library(std::span<const std::string>(names.begin(), names.size())) {}
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library();
  void* symbol(const char* name) const;  // nullptr: no library, or not in it
  bool loaded() const { return handle_ != nullptr; }
  const std::string& error() const { return error_; }  // why the last name did not load

 private:
  void* handle_ = nullptr;
  std::string error_;
};

std::string executable_directory();  // of the running program; empty when unknown

// From then on the first interrupt (Ctrl-C) or termination signal only sets a flag; a second one
// ends the process with status 130.
void catch_interrupt();
bool interrupted();

}  // namespace nibble::os
