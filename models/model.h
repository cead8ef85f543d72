// The seam between the trainer or the sampler and a model family.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/parameters.h"
#include "engine/trainer.h"

namespace nibble {

// The inputs of a decoding program that appends `tokens` to the KV cache and scores what follows.
struct DecodeInputs {
  Tensor tokens;          // I32 [n]
  Tensor positions;       // I32 [n]: position + 0, 1, ...
  Tensor position;        // I32 [1]: rows already in the cache
  Tensor last;            // I32 [1]: the row whose logits are wanted
  StoragePolicy storage;  // of which only the streamed blocks matter
};

class Model {
 public:
  virtual ~Model() = default;
  // Trainable parameters, in the order of the flat arrays; empty for a frozen model.
  virtual ParameterTable parameters() const = 0;
  // Appends the forward pass; returns output 0 of linear_cross_entropy.
  virtual Tensor build_loss(Graph& graph, const LossInputs& inputs) const = 0;
  // Appends one decoding pass over a cache of `context` rows; returns logits, stat [1, vocab].
  virtual Tensor build_logits(Graph& graph, const DecodeInputs& inputs,
                              std::int64_t context) const = 0;
};

}  // namespace nibble
