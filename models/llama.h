// The llama family as a graph: Llama 1-3, SmolLM2, Mistral without window.
//
// Pre-norm decoder blocks: x += Wo attention(rope(Wq n), rope(Wk n), Wv n) with n = rms_norm(x);
// x += Wdown swiglu(Wgate n, Wup n) with n = rms_norm(x); then a norm and the head, which may be
// the embedding table. Grouped heads, both RoPE pairings, frequency divisors (llama3 scaling).
// Source: arXiv 2302.13971, 2407.21783.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gguf-convert/model_config.h"
#include "models/model.h"

namespace nibble {

// LoRA on linears of the decoder blocks, named as in GGUF: attn_q, attn_k, attn_v, attn_output,
// ffn_gate, ffn_up, ffn_down.
struct LoraSpec {
  std::int64_t rank = 16;
  double alpha = 32;
  double dropout = 0;
  std::vector<std::string> targets;  // as listed above
  double scale() const { return alpha / static_cast<double>(rank); }
};

// The seven linears of a block, in order.
const std::vector<std::string>& llama_linears();

class Llama final : public Model {
 public:
  // `weights` are the storage types by GGUF name. With `train_weights` every weight is a parameter
  // (full finetuning) and `lora` must be empty.
  Llama(ModelConfig config, std::map<std::string, TensorType> weights, std::optional<LoraSpec> lora,
        bool train_weights);

  ParameterTable parameters() const override;
  Tensor build_loss(Graph& graph, const LossInputs& inputs) const override;
  Tensor build_logits(Graph& graph, const DecodeInputs& inputs,
                      std::int64_t context) const override;

  const ModelConfig& config() const { return config_; }
  const std::optional<LoraSpec>& lora() const { return lora_; }
  // Angle per position of each pair of a head, [head_dim / 2]: the weight "rope_frequencies".
  std::vector<double> rope_frequencies() const;
  // Names of the weights that the graph reads, without "rope_frequencies".
  std::vector<std::string> weight_names() const;
  bool trains_weights() const { return train_weights_; }

 private:
  Tensor weight(Graph& graph, const std::string& name) const;
  Tensor linear_layer(Graph& graph, Tensor x, std::int64_t block, int linear,
                      const LossInputs* inputs) const;
  Tensor rope_frequency_weight(Graph& graph) const;
  // Lets x of a block wait on the host, where the policy has it so.
  static void offload(Graph& graph, Tensor x, Activation what, const std::string& name,
                      std::int64_t block, const LossInputs* inputs);
  Tensor mlp(Graph& graph, Tensor x, std::int64_t block, const LossInputs* inputs,
             const std::string& part) const;
  Tensor mlp_by_rows(Graph& graph, Tensor x, std::int64_t block, const LossInputs& inputs) const;
  template <class Attend>
  Tensor decoder_block(Graph& graph, Tensor x, Tensor positions, std::int64_t block,
                       const LossInputs* inputs, Attend attend) const;
  class Streamer;
  std::int32_t adapter_number(std::int64_t block, int linear) const;

  ModelConfig config_;
  std::map<std::string, TensorType> weights_;
  std::optional<LoraSpec> lora_;
  bool train_weights_;
};

}  // namespace nibble
