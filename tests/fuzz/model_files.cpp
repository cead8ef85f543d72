// Truncated and damaged models and adapters: NF4 files, the configuration and weights of Hugging
// Face directories, PEFT directories, GGUF LoRA. Every tensor that is accepted is decoded and
// copied, so that the sanitizers see each byte that a trainer would touch.
#include <doctest/doctest.h>

#include <filesystem>
#include <sstream>

#include "gguf-convert/adapter.h"
#include "gguf-convert/convert.h"
#include "tests/fuzz/mutate.h"
#include "tests/unit/scratch.h"
#include "tests/unit/tiny_checkpoint.h"

using namespace nibble;
using test::get;
using test::Outcomes;
using test::Scratch;

namespace {

void read_model(const std::string& path) {
  const auto model = open_checkpoint(path);
  for (const Checkpoint::Tensor& tensor : model->tensors()) {
    test::values_of(*model, tensor);
    test::bytes_of(*model, tensor);
    model->mapped(tensor);
    model->forget(tensor);
  }
}

void read_lora(const std::string& path) {
  static const ModelConfig base = config_from_json(test::kTinyConfig, "tiny");
  read_adapter(path, base);
}

// For a file inside a directory: opens the directory.
test::Reader parent_of(void (*reader)(const std::string&)) {
  return [reader](const std::string& path) {
    reader(std::filesystem::path(path).parent_path().string());
  };
}

// Every prefix of the header is refused, and so are `samples` longer ones (none for text, whose
// last byte may go unnoticed); 2,000 mutations are read or refused.
void damage(const std::string& file, std::size_t header, int samples, const test::Reader& reader) {
  const std::string good = get(file);
  REQUIRE(header <= good.size());
  REQUIRE_NOTHROW(reader(file));
  const Outcomes cut = test::read_prefixes(file, good, header, samples, 1, reader);
  CHECK(cut.read == 0);
  CHECK(cut.refused >= static_cast<int>(header));
  const Outcomes mutated = test::read_mutations(file, good, header, 2000, 2, reader);
  CHECK(mutated.read + mutated.refused == 2000);
  CHECK(mutated.refused > 500);
  test::put(file, good);
}

std::string converted(const Scratch& scratch, const std::string& leaf, DType type) {
  ConvertRequest request;
  request.source = test::tiny_source(scratch);
  request.destination = scratch / leaf;
  request.options.type = type;
  const bool gguf = type == DType::NF4;
  request.options.container = gguf ? Container::gguf : Container::huggingface;
  std::ostringstream out, log;
  REQUIRE(convert(request, out, log) == 0);
  return request.destination;
}

AdapterFile small_adapter() {
  AdapterFile adapter;
  adapter.head_dim = 8;
  adapter.tensors.push_back({"blk.0.attn_q.weight", 16, 16, 2, 4, std::vector<float>(32, 0.5f),
                             std::vector<float>(32, 0.25f)});
  adapter.tensors.push_back({"blk.1.ffn_down.weight", 33, 16, 2, 4, std::vector<float>(66, 0.5f),
                             std::vector<float>(32, 0.25f)});
  return adapter;
}

}  // namespace

TEST_CASE("damaged NF4 files") {
  Scratch scratch;
  const std::string path = converted(scratch, "n.gguf", DType::NF4);
  damage(path, get(path).rfind("output.weight") + 30, 20, read_model);
}

TEST_CASE("damaged Hugging Face directories") {
  Scratch scratch;
  const std::string path = converted(scratch, "hf", DType::BF16);
  const std::string config = path + "/config.json", weights = path + "/model.safetensors";
  damage(config, get(config).rfind('}'), 0, parent_of(read_model));
  damage(weights, get(weights).find("}}") + 2, 20, parent_of(read_model));
}

TEST_CASE("damaged PEFT directories") {
  Scratch scratch;
  write_peft(small_adapter(), scratch / "peft");
  const std::string config = scratch / "peft/adapter_config.json";
  const std::string weights = scratch / "peft/adapter_model.safetensors";
  damage(config, get(config).rfind('}'), 0, parent_of(read_lora));
  damage(weights, get(weights).find("}}") + 2, 20, parent_of(read_lora));
}

TEST_CASE("damaged GGUF LoRA") {
  Scratch scratch;
  const std::string path = scratch / "lora.gguf";
  write_gguf_lora(small_adapter(), path);
  damage(path, get(path).rfind("lora_b") + 30, 20, read_lora);
}
