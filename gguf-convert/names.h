// What a llama is made of: the name and shape of every tensor, what GGUF and Hugging Face call it,
// and the order of q and k rows. The only place that knows any of this.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/dtype.h"
#include "gguf-convert/model_config.h"

namespace nibble {

struct TensorSpec {
  std::string name;  // GGUF name
  Shape shape;
};

// Every tensor of a model with this config, embedding first, then blocks in order, then the output
// norm and, unless tied, the head.
std::vector<TensorSpec> model_tensors(const ModelConfig& config);

// "blk.3.attn_q.weight" <-> "model.layers.3.self_attn.q_proj.weight"; nullopt: no such name. Names
// need not end in ".weight": "blk.3.attn_q" <-> "model.layers.3.self_attn.q_proj".
std::optional<std::string> hf_name(std::string_view gguf_name);
std::optional<std::string> gguf_name(std::string_view hf_name);

// One of the seven linears of a decoder block: what LoRA targets and what 4 bits are for.
bool is_decoder_linear(std::string_view gguf_name);
// The block number of "blk.3.attn_q.weight"; -1 outside blocks.
std::int64_t block_of(std::string_view gguf_name);

// Whether RoPE style decides the row order of this tensor (and of the rows of its LoRA B).
bool has_rope_rows(std::string_view gguf_name);

// The row of the `from` order that holds what is row `row` of the `to` order. Heads stay where
// they are; inside a head of d rows, adjacent row p is half row (p % 2) * d/2 + p/2.
std::int64_t rope_source_row(std::int64_t row, std::int64_t head_dim, RopeStyle from, RopeStyle to);

// Reorders all rows of a matrix of `row_bytes` bytes a row. in.size() == out.size(), whole heads.
void reorder_rope_rows(std::span<const std::byte> in, std::span<std::byte> out,
                       std::int64_t row_bytes, std::int64_t head_dim, RopeStyle from, RopeStyle to);

}  // namespace nibble
