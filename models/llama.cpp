#include "models/llama.h"

#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "engine/ops.h"

namespace nibble {
namespace {

std::string block_name(std::int64_t block, const std::string& rest) {
  return "blk." + std::to_string(block) + "." + rest;
}

RopePairs pairs(RopeStyle style) {
  return style == RopeStyle::half ? RopePairs::half : RopePairs::adjacent;
}

}  // namespace

const std::vector<std::string>& llama_linears() {
  static const std::vector<std::string> names = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                                 "ffn_gate", "ffn_up", "ffn_down"};
  return names;
}

Llama::Llama(ModelConfig config, std::map<std::string, TensorType> weights,
             std::optional<LoraSpec> lora, bool train_weights)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      lora_(std::move(lora)),
      train_weights_(train_weights) {
  if (train_weights_ && lora_) throw Error("a model trains its weights or an adapter, not both");
  if (!lora_) return;
  for (const std::string& target : lora_->targets) {
    const auto& known = llama_linears();
    if (std::find(known.begin(), known.end(), target) == known.end()) {
      throw Unsupported("LoRA on \"" + target +
                        "\": a llama block has attn_q, attn_k, attn_v, "
                        "attn_output, ffn_gate, ffn_up and ffn_down");
    }
  }
}

std::vector<std::string> Llama::weight_names() const {
  std::vector<std::string> names = {"token_embd.weight"};
  for (std::int64_t block = 0; block < config_.layers; ++block) {
    names.push_back(block_name(block, "attn_norm.weight"));
    for (int i = 0; i < 4; ++i) {
      names.push_back(block_name(block, llama_linears()[static_cast<std::size_t>(i)] + ".weight"));
    }
    names.push_back(block_name(block, "ffn_norm.weight"));
    for (int i = 4; i < 7; ++i) {
      names.push_back(block_name(block, llama_linears()[static_cast<std::size_t>(i)] + ".weight"));
    }
  }
  names.push_back("output_norm.weight");
  if (!config_.tied_embeddings) names.push_back("output.weight");
  return names;
}

ParameterTable Llama::parameters() const {
  ParameterTable table;
  if (train_weights_) {
    for (const std::string& name : weight_names()) {
      const Shape& shape = weights_.at(name).shape;
      table.add(name, shape.rows(), shape.cols());
    }
  }
  if (!lora_) return table;
  for (std::int64_t block = 0; block < config_.layers; ++block) {
    for (const std::string& linear : llama_linears()) {
      if (std::find(lora_->targets.begin(), lora_->targets.end(), linear) == lora_->targets.end()) {
        continue;
      }
      const Shape& shape = weights_.at(block_name(block, linear + ".weight")).shape;
      table.add(block_name(block, linear + ".lora_a"), lora_->rank, shape[1]);
      table.add(block_name(block, linear + ".lora_b"), shape[0], lora_->rank);
    }
  }
  return table;
}

std::vector<double> Llama::rope_frequencies() const {
  // In F32 step by step, as the models were trained: 1 / theta^(2i/d), over the divisor.
  std::vector<double> frequencies;
  for (std::int64_t i = 0; i < config_.head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config_.head_dim);
    float frequency = 1.0f / std::pow(static_cast<float>(config_.rope_theta), exponent);
    if (!config_.rope_freq_divisors.empty()) {
      frequency /= config_.rope_freq_divisors[static_cast<std::size_t>(i)];
    }
    frequencies.push_back(frequency);
  }
  return frequencies;
}

Tensor Llama::weight(Graph& graph, const std::string& name) const {
  const auto found = weights_.find(name);
  if (found == weights_.end()) throw Error("the model has no tensor \"" + name + "\"");
  if (train_weights_) return graph.parameter(name, {graph.compute(), found->second.shape, {}});
  return graph.weight(name, found->second);
}

void Llama::offload(Graph& graph, Tensor x, Activation what, const std::string& name,
                    std::int64_t block, const LossInputs* inputs) {
  if (inputs == nullptr || !inputs->training || !inputs->storage.offloads(block, what)) return;
  graph.offload(x, block_name(block, name), block);
}

// Lets the weights of streamed blocks come while the blocks before them are worked on.
class Llama::Streamer {
 public:
  Streamer(const Llama& model, Graph& graph, const StoragePolicy& storage)
      : model_(model), graph_(graph), storage_(storage) {}

  // Called before each block: what it reads is on its way, and so are the streamed blocks to come.
  void before(std::int64_t block) {
    if (streams(block)) ++needed_;
    for (; next_ < model_.config_.layers && started_ < needed_ + kStreamedAhead; ++next_) {
      if (streams(next_)) start(next_);
    }
  }

 private:
  bool streams(std::int64_t block) const { return storage_.streams(block, model_.config_.layers); }
  void start(std::int64_t block) {
    for (const std::string& linear : llama_linears()) {
      const std::string name = block_name(block, linear + ".weight");
      graph_.stream(name, model_.weights_.at(name), block);
    }
    ++started_;
  }

  const Llama& model_;
  Graph& graph_;
  StoragePolicy storage_;
  std::int64_t needed_ = 0, started_ = 0, next_ = 0;  // next_: the first block not looked at
};

Tensor Llama::rope_frequency_weight(Graph& graph) const {
  return graph.weight("rope_frequencies", {graph.accumulate(), {config_.head_dim / 2}, {}});
}

// Adapters are numbered by block and linear whatever the targets are, so that a linear's dropout
// does not depend on which others have an adapter.
std::int32_t Llama::adapter_number(std::int64_t block, int linear) const {
  return static_cast<std::int32_t>(block * 7 + linear);
}

Tensor Llama::linear_layer(Graph& graph, Tensor x, std::int64_t block, int linear_number,
                           const LossInputs* inputs) const {
  const std::string& kind = llama_linears()[static_cast<std::size_t>(linear_number)];
  const std::string name = block_name(block, kind);
  const Tensor w = weight(graph, name + ".weight");
  if (!lora_ ||
      std::find(lora_->targets.begin(), lora_->targets.end(), kind) == lora_->targets.end()) {
    return linear(x, w);
  }
  const Shape& shape = w.shape();
  const Tensor a =
      graph.parameter(name + ".lora_a", {graph.compute(), {lora_->rank, shape[1]}, {}});
  const Tensor b =
      graph.parameter(name + ".lora_b", {graph.compute(), {shape[0], lora_->rank}, {}});
  LoraDropout dropout;
  if (inputs != nullptr && inputs->training && lora_->dropout > 0) {
    dropout = {static_cast<float>(lora_->dropout), adapter_number(block, linear_number),
               inputs->rng, inputs->ordinal};
  }
  return lora_linear(x, w, a, b, static_cast<float>(lora_->scale()), dropout);
}

// What the feed-forward layer adds to x.
Tensor Llama::mlp(Graph& graph, Tensor x, std::int64_t block, const LossInputs* inputs,
                  const std::string& part) const {
  const Tensor n = rms_norm(x, weight(graph, block_name(block, "ffn_norm.weight")),
                            static_cast<float>(config_.rms_eps));
  const Tensor gate = linear_layer(graph, n, block, 4, inputs);
  offload(graph, gate, Activation::gate, "gate" + part, block, inputs);
  const Tensor up = linear_layer(graph, n, block, 5, inputs);
  offload(graph, up, Activation::up, "up" + part, block, inputs);
  return linear_layer(graph, swiglu(gate, up), block, 6, inputs);
}

// x and what the layer adds, for some rows at a time, so that its wide values are never there for
// all. The last rows come first: the backward pass then meets the first rows first, and sums over
// tokens in the order in which it always does.
Tensor Llama::mlp_by_rows(Graph& graph, Tensor x, std::int64_t block,
                          const LossInputs& inputs) const {
  const std::int64_t rows = x.shape()[0], most = inputs.storage.mlp_rows;
  std::vector<std::pair<std::int64_t, Tensor>> parts;
  std::int64_t end = rows, begin = (rows - 1) / most * most;
  if (rows - begin < kRowTile) begin -= most;  // too few rows for kernels of many
  for (std::int64_t first = begin; first >= 0; end = first, first -= most) {
    const std::int64_t count = end - first;
    LossInputs part = inputs;
    if (lora_ && lora_->dropout > 0) part.ordinal = slice_rows(inputs.ordinal, first, count);
    parts.emplace_back(
        first, mlp(graph, slice_rows(x, first, count), block, &part, "." + std::to_string(first)));
  }
  for (const auto& [first, y] : parts) x = add_rows(x, y, first);
  return x;
}

// One block around `attend(q, k, v)`, which is where training and decoding differ.
template <class Attend>
Tensor Llama::decoder_block(Graph& graph, Tensor x, Tensor positions, std::int64_t block,
                            const LossInputs* inputs, Attend attend) const {
  const auto head_dim = static_cast<std::int32_t>(config_.head_dim);
  const auto eps = static_cast<float>(config_.rms_eps);
  const Tensor frequencies = rope_frequency_weight(graph);
  const auto layer = [&](Tensor input, int number) {
    return linear_layer(graph, input, block, number, inputs);
  };
  const auto rotate = [&](Tensor input) {
    return rope(input, positions, frequencies, head_dim, pairs(config_.rope_style));
  };
  Tensor n = rms_norm(x, weight(graph, block_name(block, "attn_norm.weight")), eps);
  // What shares n stands together, then what a backend may turn in one launch.
  const Tensor q = layer(n, 0);
  const Tensor k = layer(n, 1);
  const Tensor v = layer(n, 2);
  const Tensor turned_q = rotate(q);
  const Tensor turned_k = rotate(k);
  x = add(x, layer(attend(turned_q, turned_k, v), 3));
  if (inputs != nullptr && inputs->storage.mlp_rows > 0 &&
      x.shape()[0] > inputs->storage.mlp_rows) {
    return mlp_by_rows(graph, x, block, *inputs);
  }
  return add(x, mlp(graph, x, block, inputs, "gate"));
}

Tensor Llama::build_loss(Graph& graph, const LossInputs& inputs) const {
  const auto head_dim = static_cast<std::int32_t>(config_.head_dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  Tensor x = embedding(inputs.tokens, weight(graph, "token_embd.weight"));
  rope_frequency_weight(graph);
  Streamer streamer(*this, graph, inputs.storage);
  for (std::int64_t block = 0; block < config_.layers; ++block) {
    streamer.before(block);
    offload(graph, x, Activation::input, "input", block, &inputs);
    graph.begin_segment(inputs.storage.of(block));
    x = decoder_block(graph, x, inputs.positions, block, &inputs,
                      [&](Tensor q, Tensor k, Tensor v) {
                        const Tensor o = attention(q, k, v, inputs.span_begin, {head_dim, scale});
                        // The large one last: it has until the next copy to leave.
                        offload(graph, graph.output_of(o, 1), Activation::attention,
                                "attention_lse", block, &inputs);
                        offload(graph, o, Activation::attention, "attention", block, &inputs);
                        return o;
                      });
    graph.end_segment();
  }
  x = rms_norm(x, weight(graph, "output_norm.weight"), static_cast<float>(config_.rms_eps));
  const Tensor head =
      weight(graph, config_.tied_embeddings ? "token_embd.weight" : "output.weight");
  return linear_cross_entropy(x, head, inputs.labels, inputs.loss_rows, inputs.training,
                              inputs.storage.loss_rows);
}

Tensor Llama::build_logits(Graph& graph, const DecodeInputs& inputs, std::int64_t context) const {
  const auto head_dim = static_cast<std::int32_t>(config_.head_dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const TensorType cache_type{graph.compute(), {config_.kv_heads, context, config_.head_dim}, {}};
  Tensor x = embedding(inputs.tokens, weight(graph, "token_embd.weight"));
  Streamer streamer(*this, graph, inputs.storage);
  for (std::int64_t block = 0; block < config_.layers; ++block) {
    streamer.before(block);
    x = decoder_block(
        graph, x, inputs.positions, block, nullptr, [&](Tensor q, Tensor k, Tensor v) {
          const Tensor keys = kv_append(graph.state(block_name(block, "cache_k"), cache_type), k,
                                        inputs.position, head_dim);
          const Tensor values = kv_append(graph.state(block_name(block, "cache_v"), cache_type), v,
                                          inputs.position, head_dim);
          return attention_cached(q, keys, values, inputs.position, {head_dim, scale});
        });
  }
  x = rms_norm(x, weight(graph, "output_norm.weight"), static_cast<float>(config_.rms_eps));
  const Tensor head =
      weight(graph, config_.tied_embeddings ? "token_embd.weight" : "output.weight");
  return linear_stat(embedding(inputs.last, x), head);
}

}  // namespace nibble
