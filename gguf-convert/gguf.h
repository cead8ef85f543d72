// GGUF v3: a memory-mapped reader and a streaming writer.
//
// Layout (little endian): magic, version, counts, key/values, tensor infos, padding, data. Extents
// are stored fastest first, so Shape is the reverse of `ne`. Nothing in a file is trusted: every
// count, length and offset is checked against what is left of the file before it is used.
// Source: ggml docs/gguf.md.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "engine/dtype.h"
#include "engine/os.h"

namespace nibble {

struct GgufArray;

// One metadata value. Integers of every width arrive as int64 (u64 past 2^63 is a FormatError).
using GgufValue = std::variant<std::int64_t, double, bool, std::string, GgufArray>;

// Arrays keep one vector of their kind; element widths matter only to the writer.
struct GgufArray {
  std::variant<std::vector<std::int64_t>, std::vector<double>, std::vector<bool>,
               std::vector<std::string>>
      items;
};

struct GgufTensor {
  std::string name;
  TensorType type;                   // plane tensors appear as their I8/F32 parts
  std::uint64_t offset = 0;          // from the start of the file
  std::span<const std::byte> bytes;  // inside the mapping
};

class GgufFile {
 public:
  // Maps and checks the file. Throws FormatError with file and byte offset.
  explicit GgufFile(const std::string& path);
  // The same from memory, which must outlive the object; `name` is for messages.
  GgufFile(const std::string& name, std::span<const std::byte> bytes);

  const std::string& path() const { return path_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  // file order
  const GgufTensor* find(std::string_view name) const;                 // nullptr: none

  // Metadata by key. The typed forms return the fallback when the key is absent and throw
  // FormatError when it is there with another type.
  bool has(std::string_view key) const;
  std::int64_t integer(std::string_view key, std::int64_t fallback) const;
  double real(std::string_view key, double fallback) const;
  bool boolean(std::string_view key, bool fallback) const;
  std::string string(std::string_view key, std::string_view fallback) const;
  const std::vector<std::string>* strings(std::string_view key) const;    // nullptr: absent
  const std::vector<std::int64_t>* integers(std::string_view key) const;
  const std::vector<double>* reals(std::string_view key) const;
  // Where the value of `key` starts in the file, for messages; 0 when there is no such key.
  std::uint64_t offset(std::string_view key) const {
    const auto found = keys_.find(key);
    return found == keys_.end() ? 0 : value_offsets_[found->second];
  }
  // All metadata in file order, for `inspect`.
  const std::vector<std::pair<std::string, GgufValue>>& metadata() const { return metadata_; }

 private:
  void read(std::span<const std::byte> bytes);
  const GgufValue* value(std::string_view key) const;
  template <typename T>
  const T* scalar(std::string_view key, const char* wanted) const;
  template <typename T>
  const std::vector<T>* array(std::string_view key, const char* wanted) const;
  std::string path_;
  os::MappedFile file_;  // unused when the bytes are somebody else's
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<std::uint64_t> value_offsets_;  // of metadata_[i], for error messages
  std::map<std::string, std::size_t, std::less<>> keys_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> names_;
};

// Writes metadata, then tensors in the order announced, padding between them. Usage: set...(),
// add() for every tensor, begin(), then for each tensor in order write() its bytes in any number
// of pieces (no piece spans two tensors), then finish(), which renames the file into place. A call
// out of that order, a duplicate key or name, or bytes that do not match throw Error.
class GgufWriter {
 public:
  explicit GgufWriter(const std::string& path, std::uint32_t alignment = 32);
  void set_u32(const std::string& key, std::uint32_t value);
  void set_u64(const std::string& key, std::uint64_t value);
  void set_i32(const std::string& key, std::int32_t value);
  void set_f32(const std::string& key, float value);
  void set_f64(const std::string& key, double value);
  void set_bool(const std::string& key, bool value);
  void set_string(const std::string& key, const std::string& value);
  void set_strings(const std::string& key, std::span<const std::string> values);
  void set_f32s(const std::string& key, std::span<const float> values);
  void set_i32s(const std::string& key, std::span<const std::int32_t> values);
  void set_i64s(const std::string& key, std::span<const std::int64_t> values);
  void add(const std::string& name, const TensorType& type);  // not for plane types
  void begin();
  void write(std::span<const std::byte> bytes);
  void finish();
  std::uint64_t file_bytes() const;  // of the whole file, known once every tensor is added

 private:
  void set(const std::string& key, std::uint32_t type, const std::string& encoded);
  std::string header() const;
  void pad(std::uint64_t position);
  void skip_complete();
  os::AtomicFile file_;
  std::uint32_t alignment_;
  std::string metadata_;
  std::set<std::string> keys_, names_;
  struct Pending {
    std::string name;
    TensorType type;
    std::int64_t bytes;
  };
  std::vector<Pending> tensors_;
  bool begun_ = false;
  std::size_t current_ = 0;   // the tensor being written
  std::int64_t written_ = 0;  // bytes of it so far
};

}  // namespace nibble
