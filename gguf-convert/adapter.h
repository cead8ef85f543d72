// LoRA adapters on disk: y = W x + scale * B (A x), read from and written to PEFT directories and
// GGUF LoRA files.
//
// Adapters follow the base in memory: B rows of attn_q and attn_k stand in the row order of the
// loaded base, like the rows of the weights themselves. PEFT files always hold the half order and
// GGUF LoRA files of llama the adjacent one; set_rope_style() and the writers convert.
//
// What a plain scale*B*A cannot say is Unsupported by name: DoRA, saved modules, biases, embedding
// LoRA, initializations that also changed the base (PiSSA, OLoRA, LoftQ, ...).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf-convert/model_config.h"

namespace nibble {

struct AdapterTensor {
  std::string name;  // of the base tensor, "blk.0.attn_q.weight"
  std::int64_t in = 0, out = 0, rank = 0;
  double alpha = 0;
  std::vector<float> a;  // [rank, in]
  std::vector<float> b;  // [out, rank]
};

struct AdapterFile {
  std::vector<AdapterTensor> tensors;  // ordered by block, then as the block runs
  double dropout = 0;                  // of the training run; not in GGUF
  bool use_rslora = false;             // scale is alpha / sqrt(rank) instead of alpha / rank
  std::string base_name;               // what it was trained on, for people and for PEFT
  RopeStyle rope_style = RopeStyle::half;
  std::int64_t head_dim = 0;  // of the base; 0: not known, needed only to change the row order

  double scale(const AdapterTensor& tensor) const;
  const AdapterTensor* find(const std::string& name) const;  // nullptr: none
};

// Whether `path` is a PEFT directory or a GGUF file of an adapter. Never throws.
bool is_adapter(const std::string& path);

// Reads a PEFT directory or a GGUF LoRA in its own row order.
AdapterFile read_adapter(const std::string& path);
// The same, in the row order of `base`; throws ShapeError when it does not fit `base`.
AdapterFile read_adapter(const std::string& path, const ModelConfig& base);

// Throws ShapeError, naming the tensor, unless every tensor is a linear of `base` with its shape.
void check_adapter(const AdapterFile& adapter, const ModelConfig& base, const std::string& path);

// Puts the B rows of q and k into another order. Throws Error when head_dim is needed and unknown.
void set_rope_style(AdapterFile& adapter, RopeStyle style);

// Writes adapter_config.json and adapter_model.safetensors, which appear together.
void write_peft(const AdapterFile& adapter, const std::string& directory);

// Writes a GGUF LoRA for llama.cpp. It has one alpha for all tensors, and scales by alpha / rank:
// rsLoRA becomes alpha * sqrt(rank). Throws Unsupported when no single alpha says the same.
void write_gguf_lora(const AdapterFile& adapter, const std::string& path);

}  // namespace nibble
