#include "tools/export.h"

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "gguf-convert/convert.h"
#include "gguf-convert/model_writer.h"

namespace nibble {
namespace {

// The trained weights seen as a checkpoint, so that they are written by the code that converts any
// other one.
class TrainedCheckpoint final : public Checkpoint {
 public:
  explicit TrainedCheckpoint(const FinetuneSetup& setup)
      : setup_(setup), config_(setup.loaded->config()) {
    for (const ParameterSegment& s : setup.trainer->parameters().segments()) {
      const Shape& shape = setup.loaded->types().at(s.name).shape;
      tensors_.push_back({s.name, {DType::F32, shape, {}}, "the trained model"});
    }
  }
  const ModelConfig& config() const override { return config_; }
  const std::vector<Tensor>& tensors() const override { return tensors_; }
  std::span<const std::byte> mapped(const Tensor&) const override { return {}; }
  void read(const Tensor& tensor, std::span<std::byte> out) const override {
    const std::vector<float>& values = cached(tensor.name);
    std::memcpy(out.data(), values.data(), out.size());
  }
  void read_f32(const Tensor& tensor, std::int64_t begin, std::span<float> out) const override {
    const std::vector<float>& values = cached(tensor.name);
    std::copy_n(values.begin() + begin, out.size(), out.begin());
  }
  void forget(const Tensor&) const override {}
  bool has_tokenizer() const override { return true; }
  TokenizerSpec tokenizer() const override { return setup_.tokenizer->spec(); }

 private:
  // Tensors are read in pieces: the last one read is kept.
  const std::vector<float>& cached(const std::string& name) const {
    if (name != cached_name_) {
      cached_ = setup_.trainer->parameter(name);
      cached_name_ = name;
    }
    return cached_;
  }
  const FinetuneSetup& setup_;
  ModelConfig config_;
  std::vector<Tensor> tensors_;
  mutable std::string cached_name_;
  mutable std::vector<float> cached_;
};

}  // namespace

AdapterFile trained_adapter(const FinetuneSetup& setup) {
  AdapterFile adapter;
  const ModelConfig& config = setup.loaded->config();
  adapter.dropout = setup.recipe.dropout;
  adapter.base_name = setup.recipe.model;
  adapter.rope_style = config.rope_style;
  adapter.head_dim = config.head_dim;
  for (const ParameterSegment& s : setup.trainer->parameters().segments()) {
    if (!s.name.ends_with(".lora_a")) continue;
    const std::string linear = s.name.substr(0, s.name.size() - std::string(".lora_a").size());
    const ParameterSegment& b = setup.trainer->parameters().at(linear + ".lora_b");
    adapter.tensors.push_back({linear + ".weight", s.cols, b.rows, s.rows, setup.recipe.alpha,
                               setup.trainer->parameter(s.name), setup.trainer->parameter(b.name)});
  }
  return adapter;
}

void set_adapter(Trainer& trainer, const AdapterFile& adapter) {
  for (const ParameterSegment& s : trainer.parameters().segments()) {
    const bool is_a = s.name.ends_with(".lora_a");
    const std::string base = s.name.substr(0, s.name.rfind('.')) + ".weight";
    const AdapterTensor* tensor = adapter.find(base);
    if (tensor == nullptr) {
      throw Error("the adapter has no matrices for " + base + "; it must cover every target");
    }
    trainer.set_parameter(s.name, is_a ? tensor->a : tensor->b);
  }
}

std::vector<std::string> export_adapter(const FinetuneSetup& setup, const std::string& directory) {
  const AdapterFile adapter = trained_adapter(setup);
  write_peft(adapter, directory + "/adapter");
  write_gguf_lora(adapter, directory + "/adapter.gguf");
  return {directory + "/adapter", directory + "/adapter.gguf"};
}

std::vector<std::string> export_model(const FinetuneSetup& setup, const std::string& directory) {
  const TrainedCheckpoint source(setup);
  ConvertOptions options;
  options.type = DType::F32;
  const ConvertPlan plan = plan_conversion(source, options, nullptr);
  const std::string path = directory + "/model.gguf";
  const auto writer = make_gguf_writer(source, plan, options, path);
  std::vector<std::byte> bytes_of_tensor;
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const PlannedTensor& tensor = plan.tensors[i];
    bytes_of_tensor.resize(static_cast<std::size_t>(bytes(tensor.target)));
    convert_tensor(source, *tensor.source, tensor.target, plan.style, bytes_of_tensor);
    writer->write(i, bytes_of_tensor);
  }
  writer->finish();
  return {path};
}

}  // namespace nibble
