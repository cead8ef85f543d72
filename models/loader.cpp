#include "models/loader.h"

#include <algorithm>
#include <mutex>

#include "engine/error.h"
#include "engine/parallel.h"
#include "gguf-convert/convert.h"
#include "gguf-convert/names.h"

namespace nibble {
namespace {

bool is_quantized(DType dtype) { return is_plane(dtype) || is_block(dtype); }

// "attn_q.weight" of "blk.7.attn_q.weight"; empty outside the blocks.
std::string_view block_part(std::string_view name) {
  if (!name.starts_with("blk.")) return {};
  return name.substr(name.find('.', 4) + 1);
}

ConvertOptions convert_options(const LoadOptions& options) {
  ConvertOptions convert;
  convert.type = DType::NF4;
  convert.quant = options.quant;
  convert.no_quant = options.no_quant;
  convert.head = options.head;
  return convert;
}

}  // namespace

bool LoadedModel::is_converted(const Checkpoint::Tensor& tensor) const {
  return options_.method == Method::qlora && !is_quantized(tensor.type.dtype) &&
         !(converted_type(*checkpoint_, tensor, convert_options(options_)) == tensor.type);
}

LoadedModel::LoadedModel(std::unique_ptr<Checkpoint> checkpoint, const BackendInfo& backend,
                         const LoadOptions& options)
    : checkpoint_(std::move(checkpoint)),
      options_(options),
      config_(checkpoint_->config()),
      backend_(backend) {
  // Rows of q and k take the order of converted weights (half) when all of them are converted;
  // otherwise the stored bytes decide.
  bool all_rotated_converted = true;
  for (const Checkpoint::Tensor& t : checkpoint_->tensors()) {
    if (has_rope_rows(t.name) && !is_converted(t)) all_rotated_converted = false;
  }
  if (all_rotated_converted) config_.rope_style = RopeStyle::half;
  for (const Checkpoint::Tensor& t : checkpoint_->tensors()) {
    if (t.name == "rope_freqs.weight") continue;  // part of the config
    if (options_.method == Method::full && is_quantized(t.type.dtype)) {
      throw Unsupported(t.file + ": " + t.name + " is " + std::string(name(t.type.dtype)) +
                        "; --method full trains unquantized models only: convert it with "
                        "gguf-convert --type bf16, or use --method qlora");
    }
    Weight weight{.source = &t, .type = t.type, .mappable = false};
    if (is_converted(t)) {
      weight.type = converted_type(*checkpoint_, t, convert_options(options_));
      if (is_quantized(weight.type.dtype)) ++converted_;
    }
    types_[t.name] = weight.type;
    if (options_.method == Method::full) continue;
    const bool reordered =
        has_rope_rows(t.name) && config_.rope_style != checkpoint_->config().rope_style;
    weight.mappable = backend.reads_host_memory && weight.type == t.type && !reordered &&
                      !checkpoint_->mapped(t).empty();
    weights_.push_back(weight);
  }
  place(false, {});
}

void LoadedModel::place(bool embedding_on_host, const StoragePolicy& storage) {
  using Place = Weight::Place;
  const bool embedding_leaves =
      embedding_on_host && !backend_.reads_host_memory && !config_.tied_embeddings;
  weight_bytes_ = embedding_bytes_ = streamed_bytes_ = mapped_bytes_ = 0;
  for (Weight& w : weights_) {
    if (is_decoder_linear(w.source->name) &&
        storage.streams(block_of(w.source->name), config_.layers)) {
      w.place = Place::streamed;
    } else if (embedding_leaves && w.source->name == "token_embd.weight") {
      w.place = Place::embedding;
    } else {
      w.place = w.mappable ? Place::mapped : Place::device;
    }
    std::int64_t& total = w.place == Place::streamed    ? streamed_bytes_
                          : w.place == Place::embedding ? embedding_bytes_
                          : w.place == Place::mapped    ? mapped_bytes_
                                                        : weight_bytes_;
    w.offset = total;
    total += w.place == Place::mapped ? bytes(w.type) : round_up(bytes(w.type), backend_.alignment);
  }
  frequencies_offset_ = weight_bytes_;
  const std::int64_t element = options_.compute == DType::F64 ? 8 : 4;
  weight_bytes_ =
      round_up(weight_bytes_ + element * config_.head_dim / 2, backend_.allocation_bytes);
}

std::int64_t LoadedModel::streamable_bytes() const {
  std::int64_t sum = 0;
  for (const Weight& w : weights_) {
    if (is_decoder_linear(w.source->name) && !w.mappable) {
      sum += round_up(bytes(w.type), backend_.alignment);
    }
  }
  return sum;
}

void LoadedModel::promise_pages(Runtime& runtime) const {
  for (const Weight& w : weights_) {
    if (w.place == Weight::Place::streamed) runtime.bind(w.source->name, nullptr);
  }
}

std::byte* LoadedModel::address(const Weight& w) const {
  switch (w.place) {
    case Weight::Place::mapped:
      // Weights are never written through their address: the graph has no op that could.
      return const_cast<std::byte*>(checkpoint_->mapped(*w.source).data());
    case Weight::Place::embedding:
      return embedding_->data() + w.offset;
    case Weight::Place::streamed:
      return streamed_->data() + w.offset;
    case Weight::Place::device:
      break;
  }
  return buffer_->data() + w.offset;
}

// Tensors are independent of each other: threads take them one by one, each with a buffer of its
// own, so at most `threads` are held in host memory at a time.
void LoadedModel::read(Backend& backend, const Progress& progress) const {
  const int threads = std::max(options_.threads, 1);
  std::vector<std::vector<std::byte>> buffers(static_cast<std::size_t>(threads));
  std::mutex mutex;
  std::int64_t done = 0;
  parallel_for(threads, std::ssize(weights_), [&](std::int64_t task, int thread) {
    const Weight& w = weights_[static_cast<std::size_t>(task)];
    if (w.place == Weight::Place::mapped) return;
    const std::string_view in_block = options_.repeat_first_block ? block_part(w.source->name) : "";
    if (!in_block.empty() && !w.source->name.starts_with("blk.0.")) return;
    std::vector<std::byte>& host = buffers[static_cast<std::size_t>(thread)];
    host.resize(static_cast<std::size_t>(bytes(w.type)));
    convert_tensor(*checkpoint_, *w.source, w.type, config_.rope_style, host);
    const std::lock_guard lock(mutex);
    backend.upload(address(w), host);
    for (const Weight& other : weights_) {
      if (in_block.empty() || &other == &w) continue;
      if (block_part(other.source->name) != in_block || !(other.type == w.type)) continue;
      backend.upload(address(other), host);
      done += bytes(other.type);
    }
    checkpoint_->forget(*w.source);
    done += bytes(w.type);
    if (progress) progress(done, weight_bytes_ + embedding_bytes_ + streamed_bytes_);
  });
}

void LoadedModel::reserve(Runtime& runtime, const Llama& model) {
  Backend& backend = runtime.backend();
  buffer_ = backend.allocate(weight_bytes_, "weights");
  if (embedding_bytes_ > 0) {
    embedding_ = backend.allocate_host(embedding_bytes_, "input embedding");
  }
  if (streamed_bytes_ > 0) streamed_ = backend.allocate_host(streamed_bytes_, "streamed weights");
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  backend.upload(buffer_->data() + frequencies_offset_,
                 encode({stat, {config_.head_dim / 2}, {}}, model.rope_frequencies()));
  runtime.bind("rope_frequencies", buffer_->data() + frequencies_offset_);
  for (const Weight& w : weights_) runtime.bind(w.source->name, address(w));
}

void LoadedModel::load_parameters(Trainer& trainer, const Progress& progress) const {
  std::int64_t done = 0;
  std::vector<float> values;
  for (const ParameterSegment& s : trainer.parameters().segments()) {
    const Checkpoint::Tensor* tensor = checkpoint_->find(s.name);
    if (tensor == nullptr) throw Error("the checkpoint has no tensor \"" + s.name + "\"");
    values.resize(static_cast<std::size_t>(s.elements()));
    checkpoint_->read_f32(*tensor, 0, values);
    trainer.set_parameter(s.name, values);
    checkpoint_->forget(*tensor);
    done += s.elements();
    if (progress) progress(done, trainer.parameters().trainable());
  }
}

}  // namespace nibble
