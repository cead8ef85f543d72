// A llama small enough to convert a hundred times in a test, and how to look at its weights.
#pragma once

#include <string>
#include <vector>

#include "gguf-convert/checkpoint.h"
#include "tests/unit/scratch.h"

namespace nibble::test {

// Untied, grouped heads, and a feed-forward size that is odd, so that rows of ffn_down are neither
// whole bytes of 4-bit codes nor whole blocks of any type.
inline constexpr const char* kTinyConfig =
    R"({"model_type":"llama","hidden_size":16,"intermediate_size":33,"num_hidden_layers":2,)"
    R"("num_attention_heads":2,"num_key_value_heads":1,"vocab_size":40,)"
    R"("max_position_embeddings":64,"initializer_range":0.5})";

// Writes the config and returns the source that draws its weights.
inline std::string tiny_source(const Scratch& scratch) {
  put(scratch / "tiny.json", kTinyConfig);
  return "random:" + (scratch / "tiny.json");
}

inline std::vector<float> values_of(const Checkpoint& model, const Checkpoint::Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.type.elements()));
  model.read_f32(tensor, 0, values);
  return values;
}

inline std::vector<std::byte> bytes_of(const Checkpoint& model, const Checkpoint::Tensor& tensor) {
  std::vector<std::byte> stored(static_cast<std::size_t>(bytes(tensor.type)));
  model.read(tensor, stored);
  return stored;
}

}  // namespace nibble::test
