// A model on disk, whatever its format: a Hugging Face directory, a GGUF file, or
// random:CONFIG.json. One view for the trainer, `inspect` and conversion: GGUF tensor names,
// engine types, and bytes that are either mapped or produced on demand.
//
// Row order is the file's: config.rope_style says which (see RopeStyle).
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/dtype.h"
#include "gguf-convert/model_config.h"
#include "gguf-convert/tokenizer_spec.h"

namespace nibble {

class Checkpoint {
 public:
  struct Tensor {
    std::string name;  // GGUF name, "blk.0.attn_q.weight"
    TensorType type;   // NF4 planes of a Nibble GGUF appear as one NF4 tensor
    std::string file;  // for messages
  };

  virtual ~Checkpoint() = default;
  virtual const ModelConfig& config() const = 0;
  virtual const std::vector<Tensor>& tensors() const = 0;
  const Tensor* find(std::string_view name) const;  // nullptr: none

  // The stored bytes in the engine's host layout when they lie in the file exactly like that
  // (so that they can be used from the mapping); empty otherwise. 32-byte aligned for planes.
  virtual std::span<const std::byte> mapped(const Tensor& tensor) const = 0;

  // Copies the stored bytes in the engine's host layout. `out` is bytes(tensor.type) long.
  virtual void read(const Tensor& tensor, std::span<std::byte> out) const = 0;

  // Decodes elements [begin, begin + out.size()) to F32.
  virtual void read_f32(const Tensor& tensor, std::int64_t begin, std::span<float> out) const = 0;

  // The pages of `tensor` will not be needed again soon.
  virtual void forget(const Tensor& tensor) const = 0;

  virtual bool has_tokenizer() const = 0;
  virtual TokenizerSpec tokenizer() const = 0;  // throws Unsupported when !has_tokenizer()
};

// Opens `source`: a directory, a .gguf path, or random:CONFIG.json (weights N(0,
// initializer_range), element i of tensor t from philox(seed, hash(name), i); norms 1; 2-D tensors
// BF16). Throws FormatError, Unsupported (architecture, tensor type: lists what is supported).
std::unique_ptr<Checkpoint> open_checkpoint(const std::string& source, std::uint64_t seed = 0);

// A GGUF model in memory, 32-byte aligned, which must outlive the result; `name` is for messages.
std::unique_ptr<Checkpoint> open_gguf_checkpoint(const std::string& name,
                                                 std::span<const std::byte> bytes);

}  // namespace nibble
