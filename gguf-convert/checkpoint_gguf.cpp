// A GGUF file as a checkpoint: stock llama files as they are, and Nibble's own, in which each NF4
// tensor is stored as planes NAME.codes, NAME.absmax, ... and shown as one tensor.
//
// The writer stores planes in the order and at the offsets of planes() in engine/dtype.h, so a
// tensor of planes is usually one stretch of the mapping. A file by someone who stored them
// elsewhere is read too, by copying the planes together on first use.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <set>

#include "engine/error.h"
#include "engine/quantize.h"
#include "gguf-convert/checkpoint_formats.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

// The planes of one tensor as found in the file; planes that it does not have are nullptr.
using PlaneTensors = std::array<const GgufTensor*, 5>;

struct PlaneExtent {
  std::int64_t offset, bytes;
};

std::array<PlaneExtent, 5> extents(const Planes& p) {
  return {{{p.codes, p.codes_bytes},
           {p.absmax, p.absmax_bytes},
           {p.scale, p.scale_bytes},
           {p.offset, p.offset_bytes},
           {p.map, p.map_bytes}}};
}

PlaneTensors find_planes(const GgufFile& file, const std::string& name) {
  PlaneTensors planes{};
  for (std::size_t i = 0; i < planes.size(); ++i) planes[i] = file.find(name + kPlaneSuffixes[i]);
  return planes;
}

Shape plane_shape(const GgufFile& file, const TensorSpec& spec, const GgufTensor& codes) {
  const std::string key = std::string(kQuantShapeKey) + "." + spec.name;
  if (const auto* extents = file.integers(key)) {
    const auto& e = *extents;
    const bool valid = e.size() == 2 && std::all_of(e.begin(), e.end(), [](std::int64_t n) {
                         return n > 0 && n < std::int64_t{1} << 31;
                       });
    if (!valid) throw FormatError(file.path(), 0, key + " is not two positive extents");
    return {e[0], e[1]};
  }
  if (codes.type.shape.rank() != 2) {
    throw FormatError(file.path(), codes.offset,
                      codes.name + " has one extent, and " + key + " is missing");
  }
  return {codes.type.shape[0], codes.type.shape[1] * 2};
}

// The type that the planes of `spec` make up. Throws FormatError when they do not fit together.
TensorType plane_type(const GgufFile& file, const TensorSpec& spec, const PlaneTensors& found) {
  const std::string& path = file.path();
  const std::string quant = file.string(kQuantTypeKey, "");
  if (file.integer(kQuantVersionKey, 0) != kQuantVersion || quant != "nf4") {
    throw Unsupported(path + ": planes of type " + nibble::quoted(quant) + ", version " +
                      std::to_string(file.integer(kQuantVersionKey, 0)) +
                      "; supported is nf4, version 1");
  }
  if (found[1] == nullptr) throw FormatError(path, 0, spec.name + ".absmax is missing");
  const std::int64_t common = file.integer(kQuantBlockKey, 64);
  const std::int64_t block = file.integer(std::string(kQuantBlockKey) + "." + spec.name, common);
  if (block < 32 || block > 4096 || (block & (block - 1)) != 0) {
    throw FormatError(
        path, 0,
        "quantization block " + std::to_string(block) + " is not a power of two from 32 to 4096");
  }
  TensorType type{DType::NF4, plane_shape(file, spec, *found[0]), {}};
  type.quant.block = static_cast<std::int32_t>(block);
  type.quant.double_quant = found[1]->type.dtype == DType::I8;
  type.quant.custom_map = found[4] != nullptr;

  const auto wanted = extents(planes(type));
  for (std::size_t i = 0; i < found.size(); ++i) {
    const bool bytes_plane = i == 0 || (i == 1 && type.quant.double_quant);
    const DType dtype = bytes_plane ? DType::I8 : DType::F32;
    const std::int64_t size =
        found[i] == nullptr ? 0 : static_cast<std::int64_t>(found[i]->bytes.size());
    if (size != wanted[i].bytes || (size > 0 && found[i]->type.dtype != dtype)) {
      throw FormatError(path, found[i] == nullptr ? 0 : found[i]->offset,
                        spec.name + kPlaneSuffixes[i] + " has " + std::to_string(size) +
                            " bytes; " + type.str() + " at block " + std::to_string(block) +
                            " needs " + std::to_string(wanted[i].bytes) + " of " +
                            std::string(name(dtype)));
    }
  }
  return type;
}

enum class Origin { mapping, memory };

class GgufCheckpoint final : public Checkpoint {
 public:
  GgufCheckpoint(GgufFile file, std::uint64_t file_bytes, Origin origin)
      : file_(std::move(file)),
        config_(config_from_gguf(file_)),
        file_bytes_(file_bytes),
        origin_(origin) {
    const std::string& path = file_.path();
    check_layer_count(config_, file_.tensors().size(), path);
    for (const TensorSpec& spec : model_tensors(config_)) add(spec);
    for (const GgufTensor& tensor : file_.tensors()) refuse_unknown(tensor);
    if (config_.name.empty()) config_.name = std::filesystem::path(path).stem().string();
  }

  const ModelConfig& config() const override { return config_; }
  const std::vector<Tensor>& tensors() const override { return tensors_; }

  std::span<const std::byte> mapped(const Tensor& tensor) const override {
    return entry(tensor).stretch;
  }

  void read(const Tensor& tensor, std::span<std::byte> out) const override {
    const std::span<const std::byte> stored = stored_bytes(tensor);
    if (stored.size() != out.size()) throw ShapeError(tensor.name + ": wrong size of destination");
    std::copy(stored.begin(), stored.end(), out.begin());
  }

  void read_f32(const Tensor& tensor, std::int64_t begin, std::span<float> out) const override {
    dequantize(tensor.type, stored_bytes(tensor).data(), begin, out);
  }

  void forget(const Tensor& tensor) const override {
    Entry& e = entry(tensor);
    const std::lock_guard lock(mutex_);
    e.assembled = {};
    if (origin_ == Origin::memory) return;  // pages of a heap would come back as zeros
    if (e.plain != nullptr) os::forget(e.plain->bytes);
    for (const GgufTensor* plane : e.planes) {
      if (plane != nullptr) os::forget(plane->bytes);
    }
  }

  bool has_tokenizer() const override {
    const std::string model = file_.string("tokenizer.ggml.model", "");
    return !model.empty() && model != "none" && model != "no_vocab";
  }

  TokenizerSpec tokenizer() const override {
    if (!has_tokenizer()) throw Unsupported(file_.path() + ": the file has no tokenizer");
    return tokenizer_from_gguf(file_);
  }

 private:
  struct Entry {
    const GgufTensor* plain = nullptr;
    PlaneTensors planes{};
    std::span<const std::byte> stretch;  // in the mapping, in the engine's layout; or empty
    std::vector<std::byte> assembled;    // otherwise: made by the first reader
  };

  void add(const TensorSpec& spec) {
    Entry entry;
    entry.plain = file_.find(spec.name);
    Tensor tensor{spec.name, {}, file_.path()};
    if (entry.plain != nullptr) {
      known_.insert(spec.name);
      tensor.type = entry.plain->type;
      check_tensor(spec, tensor.type, file_.path(), entry.plain->offset);
      // ggml pads to general.alignment, which a file may set below what F32 needs.
      const auto address = reinterpret_cast<std::uintptr_t>(entry.plain->bytes.data());
      if (address % alignof(double) == 0) entry.stretch = entry.plain->bytes;
    } else {
      entry.planes = find_planes(file_, spec.name);
      if (entry.planes[0] == nullptr) {
        throw FormatError(file_.path(), 0,
                          "tensor " + spec.name + " is missing; a llama with " +
                              std::to_string(config_.layers) + " layers has it");
      }
      tensor.type = plane_type(file_, spec, entry.planes);
      check_tensor(spec, tensor.type, file_.path(), entry.planes[0]->offset);
      for (const char* suffix : kPlaneSuffixes) known_.insert(spec.name + suffix);
      entry.stretch = contiguous(tensor.type, entry.planes);
    }
    index_.emplace(spec.name, entries_.size());
    entries_.push_back(std::move(entry));
    tensors_.push_back(std::move(tensor));
  }

  // The planes as one span of the mapping, trailing padding included; empty when they are not in
  // planes() order, not aligned, or the file ends before the last padding does.
  std::span<const std::byte> contiguous(const TensorType& type, const PlaneTensors& found) const {
    const Planes p = nibble::planes(type);
    const auto wanted = extents(p);
    const std::byte* base = found[0]->bytes.data();
    if (reinterpret_cast<std::uintptr_t>(base) % kHostPlaneAlignment != 0) return {};
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (found[i] != nullptr && found[i]->bytes.data() != base + wanted[i].offset) return {};
    }
    const auto end = found[0]->offset + static_cast<std::uint64_t>(p.bytes);
    if (end > file_bytes_) return {};
    return {base, static_cast<std::size_t>(p.bytes)};
  }

  // A tensor that the graph would ignore changes what the model computes, so it is refused; the
  // rotary tables of old converters hold nothing that the configuration does not.
  void refuse_unknown(const GgufTensor& tensor) const {
    const bool table =
        tensor.name == "rope_freqs.weight" || tensor.name.find("rot_embd") != std::string::npos;
    if (table || known_.count(tensor.name) != 0) return;
    throw Unsupported(file_.path() + ": tensor " + nibble::quoted(tensor.name) +
                      " is not part of a llama without biases; this variant is not supported");
  }

  Entry& entry(const Tensor& tensor) const {
    const auto it = index_.find(tensor.name);
    if (it == index_.end()) throw Error(file_.path() + ": no tensor " + tensor.name);
    return entries_[it->second];
  }

  std::span<const std::byte> stored_bytes(const Tensor& tensor) const {
    Entry& e = entry(tensor);
    if (!e.stretch.empty()) return e.stretch;
    const std::lock_guard lock(mutex_);
    if (e.assembled.empty()) assemble(tensor, e);
    return e.assembled;
  }

  static void assemble(const Tensor& tensor, Entry& e) {
    if (e.plain != nullptr) {
      e.assembled.assign(e.plain->bytes.begin(), e.plain->bytes.end());
      return;
    }
    const Planes p = nibble::planes(tensor.type);
    const auto wanted = extents(p);
    e.assembled.resize(static_cast<std::size_t>(p.bytes));
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      if (e.planes[i] == nullptr) continue;
      const auto& bytes = e.planes[i]->bytes;
      std::copy(bytes.begin(), bytes.end(), e.assembled.begin() + wanted[i].offset);
    }
  }

  GgufFile file_;
  ModelConfig config_;
  std::uint64_t file_bytes_ = 0;
  Origin origin_;
  std::vector<Tensor> tensors_;
  mutable std::mutex mutex_;  // guards Entry::assembled
  mutable std::vector<Entry> entries_;
  std::map<std::string, std::size_t, std::less<>> index_;
  std::set<std::string, std::less<>> known_;
};

}  // namespace

std::unique_ptr<Checkpoint> open_gguf_checkpoint(const std::string& path) {
  return std::make_unique<GgufCheckpoint>(GgufFile(path), std::filesystem::file_size(path),
                                          Origin::mapping);
}

std::unique_ptr<Checkpoint> open_gguf_checkpoint(const std::string& name,
                                                 std::span<const std::byte> bytes) {
  return std::make_unique<GgufCheckpoint>(GgufFile(name, bytes), bytes.size(), Origin::memory);
}

}  // namespace nibble
