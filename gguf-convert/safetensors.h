// safetensors: a memory-mapped reader, a directory of shards, and a streaming writer.
//
// Layout: u64 header length (little endian), a JSON header {name: {"dtype", "shape",
// "data_offsets": [begin, end]}, "__metadata__": {string: string}}, then the tensors' bytes. As in
// the reference implementation the data is exactly the tensors, without holes or overlap, and the
// header is at most 100 MB. A tensor's bytes need not be aligned to its type: copy before casting.
// Source: huggingface/safetensors README and safetensors/src/tensor.rs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/dtype.h"
#include "engine/os.h"

namespace nibble {

struct SafetensorsTensor {
  std::string name;
  TensorType type;                   // a plain type
  std::string file;                  // the path it lies in
  std::uint64_t offset = 0;          // from the start of that file
  std::span<const std::byte> bytes;  // inside the mapping
};

class SafetensorsFile {
 public:
  // Maps and checks the file. Throws FormatError with file and byte offset, and Unsupported for
  // dtypes that Nibble lacks, naming the tensor.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }  // by offset
  const SafetensorsTensor* find(std::string_view name) const;                 // nullptr: none
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  std::string path_;
  os::MappedFile file_;
  std::map<std::string, std::string> metadata_;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> names_;
};

// The tensors of a Hugging Face directory, in whatever shard they lie: model.safetensors, or else
// the shards that model.safetensors.index.json names. Every tensor of the index must be in its
// shard, and no name may be in two.
class SafetensorsDirectory {
 public:
  explicit SafetensorsDirectory(const std::string& directory);
  SafetensorsDirectory(SafetensorsDirectory&&) = default;
  SafetensorsDirectory& operator=(SafetensorsDirectory&&) = default;

  // Shard by shard, in each by offset. Pointers live as long as this object, also when moved.
  const std::vector<const SafetensorsTensor*>& tensors() const { return tensors_; }
  const SafetensorsTensor* find(std::string_view name) const;  // nullptr: none

 private:
  std::vector<SafetensorsFile> shards_;
  std::vector<const SafetensorsTensor*> tensors_;
  std::map<std::string, const SafetensorsTensor*, std::less<>> names_;
};

// Whether the directory has weights that SafetensorsDirectory opens.
bool has_safetensors(const std::string& directory);

// Writes tensors in the order announced. Usage as GgufWriter: add() for every tensor, begin(), then
// write() the bytes of each in order in any number of pieces, then finish(), which renames the file
// into place. Calls out of that order, duplicate names and bytes that do not match throw Error.
// Announce wider types first where readers should find every tensor aligned.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(const std::string& path,
                             std::map<std::string, std::string> metadata = {{"format", "pt"}});
  void add(const std::string& name, const TensorType& type);  // plain types only
  void begin();
  void write(std::span<const std::byte> bytes);
  void finish();
  std::uint64_t file_bytes() const;  // of the whole file, known once every tensor is added

 private:
  std::string header() const;
  void skip_complete();
  os::AtomicFile file_;
  std::map<std::string, std::string> metadata_;
  struct Pending {
    std::string name;
    TensorType type;
    std::int64_t bytes;
  };
  std::vector<Pending> tensors_;
  std::set<std::string> names_;
  bool begun_ = false;
  std::size_t current_ = 0;   // the tensor being written
  std::int64_t written_ = 0;  // bytes of it so far
};

}  // namespace nibble
