// Writing safetensors: the header follows from the announced types and is padded with spaces to a
// multiple of 8 bytes, the tensors' bytes stream through.
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/error.h"
#include "gguf-convert/quoted.h"
#include "gguf-convert/safetensors.h"

namespace nibble {

SafetensorsWriter::SafetensorsWriter(const std::string& path,
                                     std::map<std::string, std::string> metadata)
    : file_(path), metadata_(std::move(metadata)) {}

void SafetensorsWriter::add(const std::string& name, const TensorType& type) {
  if (begun_)
    throw Error("SafetensorsWriter: tensor " + nibble::quoted(name) + " comes after begin()");
  if (name.empty() || name == "__metadata__") {
    throw Error("SafetensorsWriter: " + nibble::quoted(name) + " is no name for a tensor");
  }
  if (is_plane(type.dtype) || is_block(type.dtype)) {
    throw Unsupported("SafetensorsWriter: tensor " + nibble::quoted(name) + " is " + type.str() +
                      ", but safetensors holds F64, F32, BF16, F16, I64, I32, I8 and U8");
  }
  const std::int64_t size = bytes(type);
  if (!names_.insert(name).second) {
    throw Error("SafetensorsWriter: the tensor " + nibble::quoted(name) + " is added twice");
  }
  tensors_.push_back({name, type, size});
}

std::string SafetensorsWriter::header() const {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata_.empty()) json["__metadata__"] = metadata_;
  std::int64_t offset = 0;
  for (const Pending& tensor : tensors_) {
    nlohmann::ordered_json shape = nlohmann::ordered_json::array();
    for (int axis = 0; axis < tensor.type.shape.rank(); ++axis) {
      shape.push_back(tensor.type.shape[axis]);
    }
    json[tensor.name] = {{"dtype", name(tensor.type.dtype)},
                         {"shape", std::move(shape)},
                         {"data_offsets", {offset, offset + tensor.bytes}}};
    offset += tensor.bytes;
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::json::exception& error) {
    throw Error(std::string("SafetensorsWriter: a name or metadata is not UTF-8: ") + error.what());
  }
  text.resize(static_cast<std::size_t>(round_up(static_cast<std::int64_t>(text.size()), 8)), ' ');
  return text;
}

std::uint64_t SafetensorsWriter::file_bytes() const {
  std::uint64_t size = 8 + header().size();
  for (const Pending& tensor : tensors_) size += static_cast<std::uint64_t>(tensor.bytes);
  return size;
}

void SafetensorsWriter::begin() {
  if (begun_) throw Error("SafetensorsWriter: begin() is called twice");
  begun_ = true;
  const std::string text = header();
  const std::uint64_t size = text.size();
  file_.write(std::as_bytes(std::span(&size, 1)));
  file_.write(text);
  skip_complete();
}

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  if (!begun_ || current_ == tensors_.size()) {
    throw Error("SafetensorsWriter: " + std::to_string(bytes.size()) + " bytes come " +
                (begun_ ? "after the last tensor" : "before begin()"));
  }
  const Pending& tensor = tensors_[current_];
  if (bytes.size() > static_cast<std::uint64_t>(tensor.bytes - written_)) {
    throw Error("SafetensorsWriter: tensor " + nibble::quoted(tensor.name) + " has " +
                std::to_string(tensor.bytes) + " bytes, " + std::to_string(written_) +
                " are written and " + std::to_string(bytes.size()) + " more are given");
  }
  file_.write(bytes);
  written_ += static_cast<std::int64_t>(bytes.size());
  skip_complete();
}

// Steps past every tensor that has all its bytes, those of no bytes included.
void SafetensorsWriter::skip_complete() {
  while (current_ < tensors_.size() && written_ == tensors_[current_].bytes) {
    ++current_;
    written_ = 0;
  }
}

void SafetensorsWriter::finish() {
  if (!begun_) throw Error("SafetensorsWriter: finish() comes before begin()");
  if (current_ < tensors_.size()) {
    const Pending& tensor = tensors_[current_];
    throw Error("SafetensorsWriter: tensor " + nibble::quoted(tensor.name) + " has " +
                std::to_string(tensor.bytes) + " bytes, only " + std::to_string(written_) +
                " are written");
  }
  file_.commit();
}

}  // namespace nibble
