// The GGUF writer: the header is collected in memory, tensor bytes stream through to the file, so
// a conversion holds no more than the piece it is writing. Offsets follow from the announced types.
// Source: ggml docs/gguf.md.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/error.h"
#include "gguf-convert/ggml_types.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

// GGUF's numbers for value types.
constexpr std::uint32_t kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9, kU64 = 10,
                        kI64 = 11, kF64 = 12;

template <typename T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

std::string encode(const std::string& text) { return raw<std::uint64_t>(text.size()) + text; }

template <typename T>
std::string encode_items(std::uint32_t type, std::span<const T> values) {
  std::string bytes = raw(type) + raw<std::uint64_t>(values.size());
  if (!values.empty()) {
    bytes.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
  }
  return bytes;
}

std::uint64_t padded(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace

GgufWriter::GgufWriter(const std::string& path, std::uint32_t alignment)
    : file_(path), alignment_(alignment) {
  if (alignment < 8 || (alignment & (alignment - 1)) != 0) {
    throw Error("GgufWriter: alignment " + std::to_string(alignment) +
                " is not a power of two from 8 up");
  }
  if (alignment != 32) set_u32("general.alignment", alignment);
}

void GgufWriter::set(const std::string& key, std::uint32_t type, const std::string& encoded) {
  if (begun_) throw Error("GgufWriter: metadata " + quoted(key) + " comes after begin()");
  if (key.empty()) throw Error("GgufWriter: a metadata key is empty");
  if (!keys_.insert(key).second) {
    throw Error("GgufWriter: the metadata key " + quoted(key) + " is set twice");
  }
  metadata_ += encode(key) + raw(type) + encoded;
}

void GgufWriter::set_u32(const std::string& key, std::uint32_t value) {
  set(key, kU32, raw(value));
}
void GgufWriter::set_u64(const std::string& key, std::uint64_t value) {
  set(key, kU64, raw(value));
}
void GgufWriter::set_i32(const std::string& key, std::int32_t value) { set(key, kI32, raw(value)); }
void GgufWriter::set_f32(const std::string& key, float value) { set(key, kF32, raw(value)); }
void GgufWriter::set_f64(const std::string& key, double value) { set(key, kF64, raw(value)); }
void GgufWriter::set_bool(const std::string& key, bool value) {
  set(key, kBool, raw<std::uint8_t>(value ? 1 : 0));
}
void GgufWriter::set_string(const std::string& key, const std::string& value) {
  set(key, kString, encode(value));
}
void GgufWriter::set_strings(const std::string& key, std::span<const std::string> values) {
  std::string bytes = raw(kString) + raw<std::uint64_t>(values.size());
  for (const std::string& value : values) bytes += encode(value);
  set(key, kArray, bytes);
}
void GgufWriter::set_f32s(const std::string& key, std::span<const float> values) {
  set(key, kArray, encode_items(kF32, values));
}
void GgufWriter::set_i32s(const std::string& key, std::span<const std::int32_t> values) {
  set(key, kArray, encode_items(kI32, values));
}
void GgufWriter::set_i64s(const std::string& key, std::span<const std::int64_t> values) {
  set(key, kArray, encode_items(kI64, values));
}

void GgufWriter::add(const std::string& name, const TensorType& type) {
  if (begun_) throw Error("GgufWriter: tensor " + quoted(name) + " comes after begin()");
  if (name.empty() || name.size() > 63) {
    throw Error("GgufWriter: the tensor name " + quoted(name) + " has " +
                std::to_string(name.size()) + " bytes, wanted 1 to 63");
  }
  if (!ggml_from_dtype(type.dtype)) {
    throw Unsupported("GgufWriter: tensor " + quoted(name) + " is " + type.str() +
                      ", but GGUF holds " + readable_ggml_types());
  }
  const std::int64_t size = bytes(type);
  if (!names_.insert(name).second) {
    throw Error("GgufWriter: the tensor " + quoted(name) + " is added twice");
  }
  tensors_.push_back({name, type, size});
}

std::string GgufWriter::header() const {
  std::string text = "GGUF" + raw<std::uint32_t>(3) + raw<std::uint64_t>(tensors_.size()) +
                     raw<std::uint64_t>(keys_.size()) + metadata_;
  std::uint64_t offset = 0;
  for (const Pending& tensor : tensors_) {
    const Shape& shape = tensor.type.shape;
    text += encode(tensor.name) + raw(static_cast<std::uint32_t>(shape.rank()));
    for (int axis = shape.rank(); axis-- > 0;) text += raw<std::int64_t>(shape[axis]);
    text += raw(*ggml_from_dtype(tensor.type.dtype)) + raw(offset);
    offset = padded(offset + static_cast<std::uint64_t>(tensor.bytes), alignment_);
  }
  return text;
}

std::uint64_t GgufWriter::file_bytes() const {
  std::uint64_t size = padded(header().size(), alignment_);
  for (const Pending& tensor : tensors_) {
    size += padded(static_cast<std::uint64_t>(tensor.bytes), alignment_);
  }
  return size;
}

void GgufWriter::pad(std::uint64_t position) {
  file_.write(std::string(static_cast<std::size_t>(padded(position, alignment_) - position), '\0'));
}

void GgufWriter::begin() {
  if (begun_) throw Error("GgufWriter: begin() is called twice");
  begun_ = true;
  file_.write(header());
  pad(file_.position());
  skip_complete();
}

void GgufWriter::write(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  if (!begun_ || current_ == tensors_.size()) {
    throw Error("GgufWriter: " + std::to_string(bytes.size()) + " bytes come " +
                (begun_ ? "after the last tensor" : "before begin()"));
  }
  const Pending& tensor = tensors_[current_];
  if (bytes.size() > static_cast<std::uint64_t>(tensor.bytes - written_)) {
    throw Error("GgufWriter: tensor " + quoted(tensor.name) + " has " +
                std::to_string(tensor.bytes) + " bytes, " + std::to_string(written_) +
                " are written and " + std::to_string(bytes.size()) + " more are given");
  }
  file_.write(bytes);
  written_ += static_cast<std::int64_t>(bytes.size());
  skip_complete();
}

// Pads and steps past every tensor that has all its bytes, those of no bytes included.
void GgufWriter::skip_complete() {
  while (current_ < tensors_.size() && written_ == tensors_[current_].bytes) {
    pad(file_.position());
    ++current_;
    written_ = 0;
  }
}

void GgufWriter::finish() {
  if (!begun_) throw Error("GgufWriter: finish() comes before begin()");
  if (current_ < tensors_.size()) {
    const Pending& tensor = tensors_[current_];
    throw Error("GgufWriter: tensor " + quoted(tensor.name) + " has " +
                std::to_string(tensor.bytes) + " bytes, only " + std::to_string(written_) +
                " are written");
  }
  file_.commit();
}

}  // namespace nibble
