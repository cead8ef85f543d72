// A checkpoint becoming the weights of a graph: which types they get, what that costs, and the
// bytes in a backend's memory.
//
// Planning reads headers only. On a backend that reads host memory, weights whose stored bytes are
// what the graph wants are used from the mapped file and cost nothing.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <regex>
#include <string>
#include <vector>

#include "engine/runtime.h"
#include "engine/trainer.h"
#include "gguf-convert/checkpoint.h"
#include "models/llama.h"

namespace nibble {

enum class Method {
  qlora,  // adapters over 4-bit weights: unquantized linears become NF4 while loading
  lora,   // adapters over the weights as they are
  full,   // every weight is trained
};

struct LoadOptions {
  Method method = Method::qlora;
  DType compute = DType::F32;
  QuantParams quant;                   // of NF4
  std::optional<std::regex> no_quant;  // matrices that stay as they are
  std::optional<DType> head;
  int threads = 1;
  // Every block gets the weights of block 0: for measuring speed with random weights, which take
  // longer to draw than to use.
  bool repeat_first_block = false;
};

class LoadedModel {
 public:
  // Plans. Throws Unsupported for full finetuning of quantized weights.
  LoadedModel(std::unique_ptr<Checkpoint> checkpoint, const BackendInfo& backend,
              const LoadOptions& options);

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const ModelConfig& config() const { return config_; }  // with the row order used in memory
  const std::map<std::string, TensorType>& types() const { return types_; }
  // What is kept in page-locked host memory: the linears of the blocks that `storage` streams, and
  // the embedding table, of which kernels read the rows they need. The table stays where leaving
  // would not help: on a backend that reads host memory, and where it is the output matrix too.
  // Trained weights stay. Only before reserve().
  void place(bool embedding_on_host, const StoragePolicy& storage);
  // Tells a runtime that is planned with that placement which pages reserve() will bring.
  void promise_pages(Runtime& runtime) const;
  std::int64_t weight_bytes() const { return weight_bytes_; }  // reserve() allocates exactly these
  std::int64_t embedding_bytes() const { return embedding_bytes_; }  // and these on the host
  std::int64_t streamed_bytes() const { return streamed_bytes_; }
  std::int64_t streamable_bytes() const;  // what streaming every block takes off the device
  std::int64_t mapped_bytes() const { return mapped_bytes_; }  // used from the file
  std::int64_t converted() const { return converted_; }        // tensors quantized while loading

  // Allocates the weights of `model` and binds them; reads nothing yet.
  void reserve(Runtime& runtime, const Llama& model);
  // Fills what reserve() allocated. `progress` gets (done, all) bytes.
  using Progress = std::function<void(std::int64_t, std::int64_t)>;
  void read(Backend& backend, const Progress& progress) const;
  // Full finetuning: the weights become the trainer's parameters.
  void load_parameters(Trainer& trainer, const Progress& progress) const;

 private:
  struct Weight {
    const Checkpoint::Tensor* source;
    TensorType type;
    bool mappable;  // the file's bytes serve as they are
    enum class Place { device, mapped, embedding, streamed } place = Place::device;
    std::int64_t offset = 0;  // in the buffer of its place
  };
  void lay_out();
  std::byte* address(const Weight& weight) const;
  bool is_converted(const Checkpoint::Tensor& tensor) const;

  std::unique_ptr<Checkpoint> checkpoint_;
  LoadOptions options_;
  ModelConfig config_;
  std::map<std::string, TensorType> types_;
  std::vector<Weight> weights_;
  BackendInfo backend_;
  std::int64_t weight_bytes_ = 0, embedding_bytes_ = 0, streamed_bytes_ = 0, mapped_bytes_ = 0;
  std::int64_t converted_ = 0;
  std::int64_t frequencies_offset_ = 0;
  std::unique_ptr<Buffer> buffer_, embedding_, streamed_;
};

}  // namespace nibble
