// A Hugging Face directory as a checkpoint: config.json, safetensors in one file or shards, and
// tokenizer files. Tensors are F32, F16 or BF16 and are used from the mapping where the file
// aligns them.
#include <filesystem>
#include <map>

#include "engine/error.h"
#include "engine/os.h"
#include "engine/quantize.h"
#include "gguf-convert/checkpoint_formats.h"
#include "gguf-convert/json_fields.h"
#include "gguf-convert/quoted.h"
#include "gguf-convert/safetensors.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

std::string config_path(const std::string& directory) {
  return (fs::path(directory) / "config.json").string();
}

// What transformers would load from another kind of file or unpack first.
void refuse_variants(const nlohmann::json& config, const std::string& directory) {
  const std::string path = config_path(directory);
  if (const auto* quantization = JsonFields(config, path).object("quantization_config")) {
    const std::string method = JsonFields(*quantization, path).string("quant_method", "");
    throw Unsupported(path + ": weights quantized by " + nibble::quoted(method) +
                      " are not supported; supported are directories in F32, F16 or BF16");
  }
  if (has_safetensors(directory)) return;
  for (const char* name : {"pytorch_model.bin", "pytorch_model.bin.index.json"}) {
    if (fs::exists(fs::path(directory) / name)) {
      throw Unsupported(directory + ": " + name +
                        " is not supported; supported is model.safetensors (transformers writes "
                        "it with save_pretrained)");
    }
  }
}

std::string load_config(const std::string& directory) {
  const std::string path = config_path(directory);
  if (fs::exists(fs::path(directory) / "adapter_config.json") && !fs::exists(path)) {
    throw Error(directory + ": this is a LoRA adapter, not a model; pass it as --adapter");
  }
  if (!fs::exists(path)) {
    throw Error(directory +
                ": there is no config.json; a model is a Hugging Face directory, a "
                ".gguf file or random:CONFIG.json");
  }
  std::string text = os::read_file(path);
  refuse_variants(parse_json_object(text, path), directory);
  return text;
}

class HfCheckpoint final : public Checkpoint {
 public:
  explicit HfCheckpoint(const std::string& directory)
      : directory_(directory),
        config_text_(load_config(directory)),
        config_(config_from_json(config_text_, config_path(directory))),
        files_(directory) {
    const fs::path path = fs::absolute(directory).lexically_normal();
    const fs::path leaf = path.has_filename() ? path.filename() : path.parent_path().filename();
    if (config_.name.empty()) config_.name = leaf.string();
    find_head();
    check_layer_count(config_, files_.tensors().size(), directory);
    for (const TensorSpec& spec : model_tensors(config_)) add(spec);
    for (const SafetensorsTensor* tensor : files_.tensors()) refuse_unknown(*tensor);
  }

  const ModelConfig& config() const override { return config_; }
  const std::vector<Tensor>& tensors() const override { return tensors_; }

  std::span<const std::byte> mapped(const Tensor& tensor) const override {
    const SafetensorsTensor& stored = entry(tensor);
    const auto address = reinterpret_cast<std::uintptr_t>(stored.bytes.data());
    const auto alignment = static_cast<std::uintptr_t>(info(stored.type.dtype).block_bytes);
    return address % alignment == 0 ? stored.bytes : std::span<const std::byte>();
  }

  void read(const Tensor& tensor, std::span<std::byte> out) const override {
    const auto stored = entry(tensor).bytes;
    if (stored.size() != out.size()) throw ShapeError(tensor.name + ": wrong size of destination");
    std::copy(stored.begin(), stored.end(), out.begin());
  }

  void read_f32(const Tensor& tensor, std::int64_t begin, std::span<float> out) const override {
    dequantize(tensor.type, entry(tensor).bytes.data(), begin, out);
  }

  void forget(const Tensor& tensor) const override { os::forget(entry(tensor).bytes); }

  bool has_tokenizer() const override { return has_tokenizer_files(directory_); }

  TokenizerSpec tokenizer() const override {
    if (!has_tokenizer()) throw Unsupported(directory_ + ": there is no tokenizer.json");
    return tokenizer_from_directory(directory_);
  }

 private:
  // transformers ties when the configuration says so, whatever the file holds. Untied is its
  // default, so a configuration that says nothing beside a file without a head is read as tied.
  void find_head() {
    const std::string path = config_path(directory_);
    const nlohmann::json json = parse_json_object(config_text_, path);
    const bool said = JsonFields(json, path).has("tie_word_embeddings");
    if (!said && files_.find("lm_head.weight") == nullptr) config_.tied_embeddings = true;
  }

  void add(const TensorSpec& spec) {
    const std::string name = hf_name(spec.name).value();
    const SafetensorsTensor* stored = files_.find(name);
    if (stored == nullptr) {
      throw FormatError(directory_, 0, "tensor " + name + " is missing; config.json asks for it");
    }
    check_tensor({name, spec.shape}, stored->type, stored->file, stored->offset);
    entries_.emplace(spec.name, stored);
    tensors_.push_back({spec.name, stored->type, stored->file});
  }

  void refuse_unknown(const SafetensorsTensor& tensor) const {
    const auto name = gguf_name(tensor.name);
    if (name && entries_.count(*name) != 0) return;
    const bool tied_copy = tensor.name == "lm_head.weight" && config_.tied_embeddings;
    const bool table = tensor.name.find("rotary_emb.inv_freq") != std::string::npos;
    if (tied_copy || table) return;
    throw Unsupported(tensor.file + ": tensor " + nibble::quoted(tensor.name) +
                      " is not part of a llama without biases as config.json describes it");
  }

  const SafetensorsTensor& entry(const Tensor& tensor) const {
    const auto it = entries_.find(tensor.name);
    if (it == entries_.end()) throw Error(directory_ + ": no tensor " + tensor.name);
    return *it->second;
  }

  std::string directory_, config_text_;
  ModelConfig config_;
  SafetensorsDirectory files_;
  std::vector<Tensor> tensors_;
  std::map<std::string, const SafetensorsTensor*> entries_;  // by GGUF name
};

}  // namespace

std::unique_ptr<Checkpoint> open_hf_checkpoint(const std::string& directory) {
  return std::make_unique<HfCheckpoint>(directory);
}

}  // namespace nibble
