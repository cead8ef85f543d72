// The GGUF reader: one pass over the header with a cursor that checks every length against what is
// left of the file before it is used, so that a hostile file costs no more memory than its size
// justifies. Tensor data is never touched, only located.
//
// Stricter than ggml where a lax reading could only hide damage: bools are 0 or 1 and alignment is
// at least 8 (the GGUF text asks for a multiple of 8), so every plain tensor is aligned in the
// mapping. As in ggml, tensor offsets must be the running sum of padded sizes in file order.
// Source: ggml docs/gguf.md and src/gguf.cpp.
#include "gguf-convert/gguf.h"

#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "engine/error.h"
#include "gguf-convert/ggml_types.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are little endian");

constexpr std::uint64_t kLongest = std::uint64_t{1} << 30;  // ggml's limit on strings and arrays
constexpr std::size_t kLongestName = 63;                    // GGML_MAX_NAME with its NUL is 64

enum ValueType : std::uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
  kTypeCount,
};
constexpr std::uint64_t kTypeBytes[kTypeCount] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};

std::string type_list() { return "types are 0 (u8) to 12 (f64)"; }

// Reads forward through the file and knows where it is when something is wrong.
class Cursor {
 public:
  Cursor(const std::string& file, std::span<const std::byte> bytes) : file_(file), bytes_(bytes) {}

  std::uint64_t position() const { return at_; }
  std::uint64_t left() const { return bytes_.size() - at_; }

  [[noreturn]] void fail_at(std::uint64_t offset, const std::string& what) const {
    throw FormatError(file_, offset, what);
  }

  template <typename T>
  T read(const char* what) {
    need(sizeof(T), what);
    T value;
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  std::string string(const char* what) {
    const std::uint64_t begin = at_;
    const auto size = read<std::uint64_t>(what);
    if (size > kLongest || size > left()) {
      fail_at(begin, std::string(what) + " of " + std::to_string(size) +
                         " bytes, but the file has " + std::to_string(left()) +
                         " bytes left; it is truncated or damaged");
    }
    std::string text(reinterpret_cast<const char*>(bytes_.data()) + at_,
                     static_cast<std::size_t>(size));
    at_ += size;
    return text;
  }

  void need(std::uint64_t size, const char* what) const {
    if (size > left()) {
      fail_at(at_, std::string("the file ends inside ") + what + " (" + std::to_string(size) +
                       " bytes wanted, " + std::to_string(left()) + " left); it is truncated");
    }
  }

 private:
  const std::string& file_;
  std::span<const std::byte> bytes_;
  std::uint64_t at_ = 0;
};

std::int64_t read_integer(Cursor& cursor, std::uint32_t type) {
  constexpr const char* what = "an integer";
  switch (type) {
    case kU8:
      return cursor.read<std::uint8_t>(what);
    case kI8:
      return cursor.read<std::int8_t>(what);
    case kU16:
      return cursor.read<std::uint16_t>(what);
    case kI16:
      return cursor.read<std::int16_t>(what);
    case kU32:
      return cursor.read<std::uint32_t>(what);
    case kI32:
      return cursor.read<std::int32_t>(what);
    case kI64:
      return cursor.read<std::int64_t>(what);
    default:
      break;
  }
  const std::uint64_t begin = cursor.position();
  const auto value = cursor.read<std::uint64_t>(what);
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    cursor.fail_at(begin, "the integer " + std::to_string(value) + " is past 2^63 - 1");
  }
  return static_cast<std::int64_t>(value);
}

double read_real(Cursor& cursor, std::uint32_t type) {
  if (type == kF32) return cursor.read<float>("an f32");
  return cursor.read<double>("an f64");
}

bool read_bool(Cursor& cursor) {
  const std::uint64_t begin = cursor.position();
  const auto value = cursor.read<std::uint8_t>("a bool");
  if (value > 1) {
    cursor.fail_at(begin, "a bool has the value " + std::to_string(value) + ", wanted 0 or 1");
  }
  return value == 1;
}

template <typename T, typename Read>
GgufArray read_items(std::uint64_t count, Read read) {
  std::vector<T> items;
  items.reserve(static_cast<std::size_t>(count));  // the caller has seen that so many fit
  for (std::uint64_t i = 0; i < count; ++i) items.push_back(read());
  return {std::move(items)};
}

GgufArray read_array(Cursor& cursor) {
  const std::uint64_t begin = cursor.position();
  const auto type = cursor.read<std::uint32_t>("an array's element type");
  const auto count = cursor.read<std::uint64_t>("an array's length");
  if (type == kArray) cursor.fail_at(begin, "an array of arrays; nested arrays are not supported");
  if (type >= kTypeCount) {
    cursor.fail_at(begin,
                   "unknown array element type " + std::to_string(type) + "; " + type_list());
  }
  if (count > kLongest || count > cursor.left() / kTypeBytes[type]) {
    cursor.fail_at(begin, "an array of " + std::to_string(count) + " elements, but the file has " +
                              std::to_string(cursor.left()) +
                              " bytes left; it is truncated or damaged");
  }
  switch (type) {
    case kF32:
    case kF64:
      return read_items<double>(count, [&] { return read_real(cursor, type); });
    case kBool:
      return read_items<bool>(count, [&] { return read_bool(cursor); });
    case kString:
      return read_items<std::string>(count, [&] { return cursor.string("a string"); });
    default:
      return read_items<std::int64_t>(count, [&] { return read_integer(cursor, type); });
  }
}

GgufValue read_value(Cursor& cursor, std::uint32_t type) {
  switch (type) {
    case kF32:
    case kF64:
      return read_real(cursor, type);
    case kBool:
      return read_bool(cursor);
    case kString:
      return cursor.string("a string");
    case kArray:
      return read_array(cursor);
    default:
      return read_integer(cursor, type);
  }
}

struct Counts {
  std::uint64_t tensors, values;
};

Counts read_preamble(Cursor& cursor) {
  if (cursor.read<std::uint32_t>("the magic number") != 0x46554747) {
    cursor.fail_at(0, "not a GGUF file: it does not begin with \"GGUF\"");
  }
  const auto version = cursor.read<std::uint32_t>("the version");
  if ((version & 0xffff) == 0) {
    cursor.fail_at(4, "a big-endian GGUF file; convert it to little endian");
  }
  if (version != 2 && version != 3) {
    cursor.fail_at(4, "GGUF version " + std::to_string(version) +
                          "; versions 2 and 3 are supported, convert the model again");
  }
  const auto tensors = cursor.read<std::uint64_t>("the tensor count");
  const auto values = cursor.read<std::uint64_t>("the metadata count");
  // The least that an entry occupies bounds how many there can be.
  constexpr std::uint64_t tensor_bytes = 8 + 4 + 4 + 8, value_bytes = 8 + 1 + 4 + 1;
  if (tensors > cursor.left() / tensor_bytes || values > cursor.left() / value_bytes) {
    cursor.fail_at(8, std::to_string(tensors) + " tensors and " + std::to_string(values) +
                          " metadata values do not fit in the " + std::to_string(cursor.left()) +
                          " bytes that follow; the file is truncated or damaged");
  }
  return {tensors, values};
}

Shape read_shape(Cursor& cursor, const std::string& tensor) {
  const std::uint64_t begin = cursor.position();
  const auto rank = cursor.read<std::uint32_t>("a tensor's rank");
  if (rank > 4) {
    cursor.fail_at(begin, "tensor " + quoted(tensor) + " has " + std::to_string(rank) +
                              " dimensions, at most 4 are possible");
  }
  std::int64_t extents[4];
  for (std::uint32_t axis = rank; axis-- > 0;) {
    const auto extent = cursor.read<std::uint64_t>("a tensor's extents");
    if (extent > std::uint64_t{1} << 62) {
      cursor.fail_at(begin, "tensor " + quoted(tensor) + " has an extent of " +
                                std::to_string(extent) + "; the file is damaged");
    }
    extents[axis] = static_cast<std::int64_t>(extent);
  }
  const Shape shape(std::span<const std::int64_t>(extents, rank));
  try {
    shape.elements();
  } catch (const ShapeError& error) {
    cursor.fail_at(begin, "tensor " + quoted(tensor) + ": " + error.what());
  }
  return shape;
}

// Bytes of the tensor's data, known to be at most `limit`.
std::uint64_t checked_bytes(const Cursor& cursor, std::uint64_t begin, const GgufTensor& tensor,
                            std::uint64_t limit) {
  const DTypeInfo& layout = info(tensor.type.dtype);
  const Shape& shape = tensor.type.shape;
  if (shape.cols() % layout.block != 0) {
    cursor.fail_at(begin, "tensor " + quoted(tensor.name) + " of type " + std::string(layout.name) +
                              " has rows of " + std::to_string(shape.cols()) +
                              " elements, wanted a multiple of " + std::to_string(layout.block));
  }
  const auto blocks = static_cast<std::uint64_t>(shape.elements() / layout.block);
  const auto block_bytes = static_cast<std::uint64_t>(layout.block_bytes);
  if (blocks > limit / block_bytes) {
    cursor.fail_at(begin, "tensor " + quoted(tensor.name) + " " + tensor.type.str() +
                              " is larger than the file; it is truncated or damaged");
  }
  return blocks * block_bytes;
}

GgufTensor read_tensor_info(Cursor& cursor, const std::string& path) {
  const std::uint64_t begin = cursor.position();
  GgufTensor tensor;
  tensor.name = cursor.string("a tensor's name");
  if (tensor.name.empty() || tensor.name.size() > kLongestName) {
    cursor.fail_at(begin, "the tensor name " + quoted(tensor.name) + " has " +
                              std::to_string(tensor.name.size()) + " bytes, wanted 1 to 63");
  }
  tensor.type.shape = read_shape(cursor, tensor.name);
  const auto type = cursor.read<std::uint32_t>("a tensor's type");
  const std::optional<DType> dtype = dtype_from_ggml(type);
  if (!dtype) {
    throw Unsupported(path + ": tensor " + quoted(tensor.name) + " has " + ggml_type_name(type) +
                      "; supported are " + readable_ggml_types());
  }
  tensor.type.dtype = *dtype;
  tensor.offset = cursor.read<std::uint64_t>("a tensor's offset");
  return tensor;
}

// Turns offsets into positions in the file and finds each tensor's bytes. Sizes are at most the
// file's, so neither the sum nor the padding overflows: the sum is compared with the file before
// the next size is added.
void locate_tensors(const Cursor& cursor, const std::vector<std::uint64_t>& begins,
                    std::span<const std::byte> file, std::uint64_t alignment,
                    std::vector<GgufTensor>& tensors) {
  const auto padded = [alignment](std::uint64_t value) {
    return (value + alignment - 1) / alignment * alignment;
  };
  const std::uint64_t data = padded(cursor.position());
  std::uint64_t expected = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    GgufTensor& tensor = tensors[i];
    const std::uint64_t size = checked_bytes(cursor, begins[i], tensor, file.size());
    if (tensor.offset != expected) {
      cursor.fail_at(begins[i], "tensor " + quoted(tensor.name) + " has offset " +
                                    std::to_string(tensor.offset) + ", wanted " +
                                    std::to_string(expected) +
                                    " (each tensor follows the padded end of the last)");
    }
    tensor.offset = data + expected;
    if (tensor.offset > file.size() || size > file.size() - tensor.offset) {
      cursor.fail_at(begins[i], "tensor " + quoted(tensor.name) + " ends at byte " +
                                    std::to_string(tensor.offset + size) + ", but the file has " +
                                    std::to_string(file.size()) + " bytes; it is truncated");
    }
    tensor.bytes =
        file.subspan(static_cast<std::size_t>(tensor.offset), static_cast<std::size_t>(size));
    expected = padded(expected + size);
  }
}

std::string kind_name(const GgufValue& value) {
  if (const auto* array = std::get_if<GgufArray>(&value)) {
    constexpr const char* kItems[] = {"integers", "real numbers", "bools", "strings"};
    return std::string("an array of ") + kItems[array->items.index()];
  }
  constexpr const char* kNames[] = {"an integer", "a real number", "a bool", "a string"};
  return kNames[value.index()];
}

[[noreturn]] void wrong_kind(const std::string& path, std::uint64_t offset, std::string_view key,
                             const GgufValue& value, const char* wanted) {
  throw FormatError(path, offset,
                    "metadata " + quoted(key) + " is " + kind_name(value) + ", wanted " + wanted);
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : path_(path), file_(path) { read(file_.bytes()); }

GgufFile::GgufFile(const std::string& name, std::span<const std::byte> bytes) : path_(name) {
  read(bytes);
}

void GgufFile::read(std::span<const std::byte> bytes) {
  Cursor cursor(path_, bytes);
  const Counts counts = read_preamble(cursor);
  for (std::uint64_t i = 0; i < counts.values; ++i) {
    const std::uint64_t begin = cursor.position();
    std::string key = cursor.string("a metadata key");
    if (key.empty()) cursor.fail_at(begin, "a metadata key is empty");
    const std::uint64_t at = cursor.position();
    const auto type = cursor.read<std::uint32_t>("a metadata type");
    if (type >= kTypeCount) {
      cursor.fail_at(at, "metadata " + quoted(key) + " has unknown type " + std::to_string(type) +
                             "; " + type_list());
    }
    if (!keys_.emplace(key, metadata_.size()).second) {
      cursor.fail_at(begin, "the metadata key " + quoted(key) + " appears twice");
    }
    value_offsets_.push_back(at);
    GgufValue value = read_value(cursor, type);
    metadata_.emplace_back(std::move(key), std::move(value));
  }
  const std::int64_t alignment = integer("general.alignment", 32);
  if (alignment < 8 || alignment > (1 << 30) || (alignment & (alignment - 1)) != 0) {
    throw FormatError(path_, value_offsets_[keys_.at("general.alignment")],
                      "general.alignment is " + std::to_string(alignment) +
                          ", wanted a power of two from 8 to 2^30");
  }

  std::vector<std::uint64_t> begins;  // of each tensor's entry, for messages
  for (std::uint64_t i = 0; i < counts.tensors; ++i) {
    begins.push_back(cursor.position());
    GgufTensor tensor = read_tensor_info(cursor, path_);
    if (!names_.emplace(tensor.name, tensors_.size()).second) {
      cursor.fail_at(begins.back(), "the tensor " + quoted(tensor.name) + " appears twice");
    }
    tensors_.push_back(std::move(tensor));
  }
  locate_tensors(cursor, begins, bytes, static_cast<std::uint64_t>(alignment), tensors_);
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? nullptr : &tensors_[found->second];
}

const GgufValue* GgufFile::value(std::string_view key) const {
  const auto found = keys_.find(key);
  return found == keys_.end() ? nullptr : &metadata_[found->second].second;
}

bool GgufFile::has(std::string_view key) const { return keys_.find(key) != keys_.end(); }

template <typename T>
const T* GgufFile::scalar(std::string_view key, const char* wanted) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return nullptr;
  if (const T* typed = std::get_if<T>(found)) return typed;
  wrong_kind(path_, value_offsets_[keys_.find(key)->second], key, *found, wanted);
}

template <typename T>
const std::vector<T>* GgufFile::array(std::string_view key, const char* wanted) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return nullptr;
  if (const auto* items = std::get_if<GgufArray>(found)) {
    if (const auto* typed = std::get_if<std::vector<T>>(&items->items)) return typed;
  }
  wrong_kind(path_, value_offsets_[keys_.find(key)->second], key, *found, wanted);
}

std::int64_t GgufFile::integer(std::string_view key, std::int64_t fallback) const {
  const auto* found = scalar<std::int64_t>(key, "an integer");
  return found == nullptr ? fallback : *found;
}

double GgufFile::real(std::string_view key, double fallback) const {
  const auto* found = scalar<double>(key, "a real number");
  return found == nullptr ? fallback : *found;
}

bool GgufFile::boolean(std::string_view key, bool fallback) const {
  const auto* found = scalar<bool>(key, "a bool");
  return found == nullptr ? fallback : *found;
}

std::string GgufFile::string(std::string_view key, std::string_view fallback) const {
  const auto* found = scalar<std::string>(key, "a string");
  return found == nullptr ? std::string(fallback) : *found;
}

const std::vector<std::string>* GgufFile::strings(std::string_view key) const {
  return array<std::string>(key, "an array of strings");
}

const std::vector<std::int64_t>* GgufFile::integers(std::string_view key) const {
  return array<std::int64_t>(key, "an array of integers");
}

const std::vector<double>* GgufFile::reals(std::string_view key) const {
  return array<double>(key, "an array of real numbers");
}

}  // namespace nibble
