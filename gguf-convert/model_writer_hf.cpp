// Converted tensors into a Hugging Face directory: config.json, safetensors in one file or shards
// with an index, tokenizer files. The files appear together; see staged_directory.h.
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/json_fields.h"
#include "gguf-convert/model_writer.h"
#include "gguf-convert/names.h"
#include "gguf-convert/safetensors.h"
#include "gguf-convert/staged_directory.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

// What a Hugging Face directory has beside weights and config.json that a model needs to talk.
constexpr const char* kCarriedFiles[] = {"tokenizer.json",
                                         "tokenizer_config.json",
                                         "tokenizer.model",
                                         "vocab.json",
                                         "merges.txt",
                                         "added_tokens.json",
                                         "chat_template.jinja",
                                         "special_tokens_map.json",
                                         "generation_config.json"};

std::string torch_name(DType dtype) {
  if (dtype == DType::F32) return "float32";
  return dtype == DType::F16 ? "float16" : "bfloat16";
}

std::string shard_name(std::size_t index, std::size_t count) {
  if (count == 1) return "model.safetensors";
  char text[64];
  std::snprintf(text, sizeof text, "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return text;
}

// The number of the shard that each tensor goes to, in order.
std::vector<std::size_t> assign_shards(const ConvertPlan& plan, std::int64_t shard_bytes) {
  std::vector<std::size_t> shards;
  std::size_t shard = 0;
  std::int64_t filled = 0;
  for (const PlannedTensor& planned : plan.tensors) {
    const std::int64_t size = bytes(planned.target);
    if (filled > 0 && size > shard_bytes - filled) {
      ++shard;
      filled = 0;
    }
    filled += size;
    shards.push_back(shard);
  }
  return shards;
}

class HfModelWriter final : public ModelWriter {
 public:
  HfModelWriter(const Checkpoint& source, const ConvertPlan& plan, const ConvertOptions& options,
                const std::string& source_path, const std::string& directory,
                std::int64_t shard_bytes)
      : plan_(plan), shards_(assign_shards(plan, shard_bytes)), staged_(directory, "config.json") {
    if (fs::is_directory(source_path)) {
      carry_files(source_path, options);
    } else {
      make_files(source, options);
    }
    if (shards_.back() > 0) write_index();
    open_shard(0);
  }

  void write(std::size_t index, std::span<const std::byte> bytes) override {
    if (shards_[index] != current_) {
      writer_->finish();
      open_shard(shards_[index]);
    }
    writer_->write(bytes);
  }

  void finish() override {
    writer_->finish();
    staged_.commit();
  }

 private:
  void carry_files(const fs::path& from, const ConvertOptions& options) {
    for (const char* name : kCarriedFiles) {
      if (fs::exists(from / name)) {
        os::write_file(staged_.file(name), os::read_file((from / name).string()));
      }
    }
    const std::string path = (from / "config.json").string();
    auto config = nlohmann::ordered_json::parse(os::read_file(path));
    config.erase("dtype");  // what transformers 5 calls torch_dtype
    config["torch_dtype"] = torch_name(options.type);
    config["tie_word_embeddings"] = tied();
    os::write_file(staged_.file("config.json"), config.dump(2) + "\n");
  }

  void make_files(const Checkpoint& source, const ConvertOptions& options) {
    auto config =
        nlohmann::ordered_json::parse(config_to_json(source.config(), torch_name(options.type)));
    if (source.has_tokenizer()) {
      const TokenizerSpec tokenizer = source.tokenizer();
      os::write_file(staged_.file("tokenizer.json"), tokenizer_to_json(tokenizer));
      os::write_file(staged_.file("tokenizer_config.json"), tokenizer_config_to_json(tokenizer));
      if (tokenizer.bos >= 0) config["bos_token_id"] = tokenizer.bos;
      if (tokenizer.eos >= 0) config["eos_token_id"] = tokenizer.eos;
    }
    os::write_file(staged_.file("config.json"), config.dump(2) + "\n");
  }

  bool tied() const { return plan_.tensors.back().source->name != "output.weight"; }

  void write_index() {
    nlohmann::ordered_json map = nlohmann::ordered_json::object();
    for (std::size_t i = 0; i < plan_.tensors.size(); ++i) {
      map[name_of(i)] = shard_name(shards_[i], shards_.back() + 1);
    }
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", plan_.bytes}}},
                                          {"weight_map", map}};
    os::write_file(staged_.file("model.safetensors.index.json"), index.dump(2) + "\n");
  }

  void open_shard(std::size_t shard) {
    current_ = shard;
    writer_ =
        std::make_unique<SafetensorsWriter>(staged_.file(shard_name(shard, shards_.back() + 1)));
    for (std::size_t i = 0; i < plan_.tensors.size(); ++i) {
      if (shards_[i] == shard) writer_->add(name_of(i), plan_.tensors[i].target);
    }
    writer_->begin();
  }

  std::string name_of(std::size_t index) const {
    return hf_name(plan_.tensors[index].source->name).value();
  }

  const ConvertPlan& plan_;
  std::vector<std::size_t> shards_;
  StagedDirectory staged_;
  std::unique_ptr<SafetensorsWriter> writer_;
  std::size_t current_ = 0;
};

}  // namespace

std::unique_ptr<ModelWriter> make_hf_writer(const Checkpoint& source, const ConvertPlan& plan,
                                            const ConvertOptions& options,
                                            const std::string& source_path,
                                            const std::string& directory,
                                            std::int64_t shard_bytes) {
  return std::make_unique<HfModelWriter>(source, plan, options, source_path, directory,
                                         shard_bytes);
}

}  // namespace nibble
