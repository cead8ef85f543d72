// Which format a source is in, and the checks that every format makes.
#include "gguf-convert/checkpoint.h"

#include <filesystem>

#include "engine/error.h"
#include "gguf-convert/checkpoint_formats.h"

namespace nibble {

namespace fs = std::filesystem;

const Checkpoint::Tensor* Checkpoint::find(std::string_view name) const {
  for (const Tensor& tensor : tensors()) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

void check_tensor(const TensorSpec& spec, const TensorType& type, const std::string& file,
                  std::uint64_t offset) {
  if (!(type.shape == spec.shape)) {
    throw FormatError(file, offset,
                      spec.name + " has shape " + type.shape.str() +
                          "; the configuration asks for " + spec.shape.str());
  }
  const bool vector = spec.shape.rank() == 1;
  if (!is_float(type.dtype) && (vector || (!is_block(type.dtype) && !is_plane(type.dtype)))) {
    throw FormatError(file, offset,
                      spec.name + " is stored as " + std::string(name(type.dtype)) + "; wanted " +
                          (vector ? "F32, F16 or BF16" : "a floating-point or quantized type"));
  }
}

void check_layer_count(const ModelConfig& config, std::size_t tensors, const std::string& file) {
  if (static_cast<std::uint64_t>(config.layers) <= tensors) return;
  throw FormatError(file, 0,
                    "there are " + std::to_string(tensors) + " tensors; a llama with " +
                        std::to_string(config.layers) + " layers has more");
}

std::unique_ptr<Checkpoint> open_checkpoint(const std::string& source, std::uint64_t seed) {
  constexpr std::string_view kRandom = "random:";
  if (source.compare(0, kRandom.size(), kRandom) == 0) {
    return open_random_checkpoint(source.substr(kRandom.size()), seed);
  }
  std::error_code error;
  if (fs::is_directory(source, error)) return open_hf_checkpoint(source);
  if (!fs::exists(source, error)) {
    throw Error(source +
                ": no such file or directory; a model is a Hugging Face directory, a .gguf file or "
                "random:CONFIG.json");
  }
  return open_gguf_checkpoint(source);
}

}  // namespace nibble
