// Reading safetensors files and directories. The header's JSON is parsed with a callback that sees
// every event: it refuses nesting that no header has before it can grow, and duplicate names, which
// a parsed object would silently merge.
#include "gguf-convert/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "engine/error.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little endian");

using Json = nlohmann::json;

constexpr std::uint64_t kLongestHeader = 100'000'000;  // the reference implementation's limit
constexpr std::uint64_t kHeaderBegin = 8;              // after its length
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr int kDeepest = 3;  // header, tensor, shape; an index has two levels

// Parses the JSON object at `text`, which begins at byte `begin` of `path`.
Json parse_object(std::string_view text, const std::string& path, std::uint64_t begin) {
  std::vector<std::set<std::string>> open;  // the keys so far of every object being read
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kDeepest) {
      throw FormatError(path, begin,
                        "the JSON is nested deeper than " + std::to_string(kDeepest) + " levels");
    }
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key &&
        !open.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw FormatError(path, begin,
                        "the JSON has the name " +
                            nibble::quoted(parsed.get_ref<const std::string&>()) + " twice");
    }
    return true;
  };
  Json json;
  try {
    json = Json::parse(text.begin(), text.end(), check);
  } catch (const Json::parse_error& error) {
    const std::uint64_t at = error.byte > 0 ? error.byte - 1 : 0;  // it counts from 1
    throw FormatError(path, begin + std::min<std::uint64_t>(at, text.size()),
                      std::string("this is not JSON: ") + error.what());
  } catch (const Json::exception& error) {
    throw FormatError(path, begin, std::string("this is not JSON: ") + error.what());
  }
  if (!json.is_object()) throw FormatError(path, begin, "the JSON is not an object");
  return json;
}

// One entry of a header, with what messages about it need.
class Entry {
 public:
  Entry(const std::string& path, std::string_view header, const std::string& name, const Json& json)
      : path_(path), header_(header), name_(name), json_(json) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw FormatError(path_, position(), "tensor " + nibble::quoted(name_) + " " + what);
  }

  DType dtype() const {
    const auto found = json_.find("dtype");
    if (found == json_.end() || !found->is_string()) fail("has no \"dtype\" string");
    const auto& text = found->get_ref<const std::string&>();
    constexpr DType kAll[] = {DType::F64, DType::F32, DType::BF16, DType::F16,
                              DType::I64, DType::I32, DType::I8,   DType::U8};
    for (const DType dtype : kAll) {
      if (text == name(dtype)) return dtype;
    }
    throw Unsupported(path_ + ": tensor " + nibble::quoted(name_) + " has dtype " +
                      nibble::quoted(text) +
                      "; supported are F64, F32, BF16, F16, I64, I32, I8 and U8");
  }

  Shape shape() const {
    const std::vector<std::uint64_t> extents = numbers("shape");
    if (extents.size() > 4) {
      throw Unsupported(path_ + ": tensor " + nibble::quoted(name_) + " has " +
                        std::to_string(extents.size()) + " dimensions; at most 4 are supported");
    }
    std::vector<std::int64_t> checked;
    for (const std::uint64_t extent : extents) {
      if (extent > std::uint64_t{1} << 62) {
        fail("has an extent of " + std::to_string(extent) + "; the file is damaged");
      }
      checked.push_back(static_cast<std::int64_t>(extent));
    }
    const Shape shape{std::span<const std::int64_t>(checked)};
    try {
      shape.elements();
    } catch (const ShapeError& error) {
      fail(std::string("is too large: ") + error.what());
    }
    return shape;
  }

  // [begin, end) within `available` bytes of data.
  std::pair<std::uint64_t, std::uint64_t> offsets(std::uint64_t available) const {
    const std::vector<std::uint64_t> pair = numbers("data_offsets");
    if (pair.size() != 2 || pair[0] > pair[1]) {
      fail("has no \"data_offsets\" of the form [begin, end]");
    }
    if (pair[1] > available) {
      fail("ends at byte " + std::to_string(pair[1]) + " of the data, but the file has " +
           std::to_string(available) + "; it is truncated");
    }
    return {pair[0], pair[1]};
  }

 private:
  std::vector<std::uint64_t> numbers(const char* key) const {
    const auto found = json_.find(key);
    if (found == json_.end() || !found->is_array()) {
      fail(std::string("has no \"") + key + "\" array");
    }
    std::vector<std::uint64_t> values;
    for (const Json& item : *found) {
      if (!item.is_number_unsigned()) {
        fail(std::string("has a \"") + key + "\" that is not all whole numbers from 0 up");
      }
      values.push_back(item.get<std::uint64_t>());
    }
    return values;
  }

  // Where the entry stands in the file, as far as its name is written without escapes.
  std::uint64_t position() const {
    const std::size_t found = header_.find('"' + name_ + '"');
    return kHeaderBegin + (found == std::string_view::npos ? 0 : found);
  }

  const std::string& path_;
  std::string_view header_;
  const std::string& name_;
  const Json& json_;
};

std::string_view header_text(const std::string& path, std::span<const std::byte> file) {
  std::uint64_t size = 0;
  if (file.size() < sizeof size) {
    throw FormatError(path, 0,
                      "not a safetensors file: it has " + std::to_string(file.size()) +
                          " bytes, wanted at least 8");
  }
  std::memcpy(&size, file.data(), sizeof size);
  if (size > kLongestHeader || size > file.size() - sizeof size) {
    throw FormatError(path, 0,
                      "not a safetensors file, or truncated: a header of " + std::to_string(size) +
                          " bytes is announced and the file has " + std::to_string(file.size()));
  }
  return {reinterpret_cast<const char*>(file.data()) + sizeof size, static_cast<std::size_t>(size)};
}

std::map<std::string, std::string> read_metadata(const std::string& path, const Json& json) {
  std::map<std::string, std::string> metadata;
  if (!json.is_object()) throw FormatError(path, kHeaderBegin, "\"__metadata__\" is not an object");
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) {
      throw FormatError(path, kHeaderBegin, "metadata " + nibble::quoted(key) + " is not a string");
    }
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

void check_size(const Entry& entry, const SafetensorsTensor& tensor, std::uint64_t size) {
  const auto wide = static_cast<std::uint64_t>(info(tensor.type.dtype).block_bytes);
  const auto elements = static_cast<std::uint64_t>(tensor.type.elements());
  if (size % wide != 0 || size / wide != elements) {
    entry.fail("is " + tensor.type.str() + ", which does not fill the " + std::to_string(size) +
               " bytes between its offsets");
  }
}

// The data must be the tensors one after the other; `tensors` are ordered by offset.
void check_cover(const std::string& path, const std::vector<SafetensorsTensor>& tensors,
                 std::uint64_t data, std::uint64_t file_bytes) {
  std::uint64_t expected = data;
  for (const SafetensorsTensor& tensor : tensors) {
    if (tensor.offset != expected) {
      throw FormatError(path, tensor.offset,
                        "tensor " + nibble::quoted(tensor.name) + " begins here, wanted byte " +
                            std::to_string(expected) +
                            " (the tensors must follow each other without holes or overlap)");
    }
    expected += tensor.bytes.size();
  }
  if (expected != file_bytes) {
    throw FormatError(
        path, expected,
        "the tensors end here, but the file has " + std::to_string(file_bytes) + " bytes");
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : path_(path), file_(path) {
  const std::span<const std::byte> file = file_.bytes();
  const std::string_view header = header_text(path_, file);
  const std::uint64_t data = kHeaderBegin + header.size();
  const Json json = parse_object(header, path_, kHeaderBegin);
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      metadata_ = read_metadata(path_, value);
      continue;
    }
    const Entry entry(path_, header, name, value);
    if (!value.is_object()) entry.fail("is not an object with dtype, shape and data_offsets");
    SafetensorsTensor tensor;
    tensor.name = name;
    tensor.type = {entry.dtype(), entry.shape(), {}};
    tensor.file = path_;
    const auto [first, last] = entry.offsets(file.size() - data);
    check_size(entry, tensor, last - first);
    tensor.offset = data + first;
    tensor.bytes = file.subspan(static_cast<std::size_t>(tensor.offset),
                                static_cast<std::size_t>(last - first));
    tensors_.push_back(std::move(tensor));
  }
  // Tensors without elements share their offset with the next one and come before it.
  std::sort(tensors_.begin(), tensors_.end(),
            [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
              return std::pair(a.offset, a.bytes.size()) < std::pair(b.offset, b.bytes.size());
            });
  check_cover(path_, tensors_, data, file.size());
  for (std::size_t i = 0; i < tensors_.size(); ++i) names_.emplace(tensors_[i].name, i);
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? nullptr : &tensors_[found->second];
}

namespace {

bool is_file(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}

std::string join(const std::string& directory, const std::string& name) {
  return directory.empty() || directory.back() == '/' ? directory + name : directory + '/' + name;
}

// Whether `name` is a file of the directory itself: an index must not lead out of it.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

// Tensor name to shard file name.
std::map<std::string, std::string> read_index(const std::string& path) {
  const os::MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() > kLongestHeader) {
    throw FormatError(
        path, 0,
        "an index of " + std::to_string(bytes.size()) + " bytes, at most 100 MB are supported");
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const Json json = parse_object(text, path, 0);
  const auto found = json.find("weight_map");
  if (found == json.end() || !found->is_object()) {
    throw FormatError(path, 0, "\"weight_map\" is missing; it must map tensors to files");
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : found->items()) {
    if (!shard.is_string() || !is_plain_name(shard.get_ref<const std::string&>())) {
      throw FormatError(path, 0,
                        "\"weight_map\" gives tensor " + nibble::quoted(tensor) +
                            " no file name of this directory");
    }
    shards[tensor] = shard.get<std::string>();
  }
  return shards;
}

}  // namespace

bool has_safetensors(const std::string& directory) {
  return is_file(join(directory, kSingle)) || is_file(join(directory, kIndex));
}

SafetensorsDirectory::SafetensorsDirectory(const std::string& directory) {
  std::map<std::string, std::string> index;
  std::set<std::string> files;
  const std::string index_path = join(directory, kIndex);
  if (is_file(join(directory, kSingle))) {
    files.insert(kSingle);
  } else if (is_file(index_path)) {
    index = read_index(index_path);
    for (const auto& [tensor, shard] : index) files.insert(shard);
  } else {
    throw Error(directory + ": neither " + kSingle + " nor " + kIndex +
                " is there; weights are read from safetensors files");
  }
  shards_.reserve(files.size());  // tensors_ points into the shards
  for (const std::string& file : files) {
    shards_.emplace_back(join(directory, file));
    for (const SafetensorsTensor& tensor : shards_.back().tensors()) {
      const auto [at, inserted] = names_.emplace(tensor.name, &tensor);
      if (!inserted) {
        throw FormatError(
            tensor.file, tensor.offset,
            "tensor " + nibble::quoted(tensor.name) + " is also in " + at->second->file);
      }
      tensors_.push_back(&tensor);
    }
  }
  for (const auto& [tensor, shard] : index) {
    const SafetensorsTensor* found = find(tensor);
    if (found == nullptr || found->file != join(directory, shard)) {
      throw FormatError(index_path, 0,
                        "tensor " + nibble::quoted(tensor) + " should be in " +
                            nibble::quoted(shard) + ", but it is not; download the shards" +
                            " again");
    }
  }
}

const SafetensorsTensor* SafetensorsDirectory::find(std::string_view name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? nullptr : found->second;
}

}  // namespace nibble
