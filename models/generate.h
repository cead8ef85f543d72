// Decoding with a KV cache, and choosing the next token.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/runtime.h"
#include "models/model.h"
#include "models/tokenizer.h"

namespace nibble {

struct SampleOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1, min_p = 0;
  std::int64_t top_k = 0;  // 0: all
  std::uint64_t seed = 0;
  std::int64_t max_tokens = 256;
};

// Two programs in a Runtime (the trainer's or one of its own): one token at a time, and prompts in
// chunks. Both end in the choice of the next token, where the logits are: what comes back to the
// host is an id. Construct before Runtime::allocate(); the model must outlive the constructor only.
class Decoder {
 public:
  // `sample` without max_tokens is fixed for the decoder's life. `storage` says which weights are
  // streamed.
  Decoder(Runtime& runtime, const Model& model, DType compute, std::int64_t context,
          std::int64_t vocab, const SampleOptions& sample = {}, const StoragePolicy& storage = {});
  void reset() { position_ = 0; }
  // Runs both programs once, so that what the device needs for them is taken; leaves values in the
  // cache that nobody may read.
  void warm_up();
  // Appends tokens to the cache; returns F32 logits [vocab] of what follows the last one. Throws
  // Error when the context is full.
  const std::vector<float>& append(std::span<const std::int32_t> tokens);
  struct Choice {
    std::int32_t id;
    float logprob;  // natural log, of the unmodified distribution
  };
  // Appends tokens and chooses what follows the last one: token number `index` of a generation.
  // Throws Error when the context is full, and for logits that are not finite. With a hook the
  // steps run one by one, and it sees each.
  Choice choose(std::span<const std::int32_t> tokens, std::uint64_t index,
                const Executable::Hook& hook = {});
  std::int64_t position() const { return position_; }
  std::int64_t context() const { return context_; }

 private:
  struct Program {
    std::int64_t rows;
    int number;
    Ref logits, id, logprob;
  };
  Program add_program(const Model& model, std::int64_t rows, const StoragePolicy& storage) const;
  void run(const Program& program, std::span<const std::int32_t> tokens,
           const Executable::Hook& hook);
  const Program& run_all(std::span<const std::int32_t> tokens, const Executable::Hook& hook);

  Runtime& runtime_;
  DType compute_;
  std::int64_t context_;
  SampleOptions sample_;
  Program prompt_, token_;
  std::int64_t position_ = 0;
  std::vector<float> logits_;
};

struct Generation {
  std::vector<std::int32_t> ids;  // with the end token, if one came
  std::vector<float> logprobs;    // natural log, one per id
  std::string text;               // valid UTF-8, without the end token
  bool ended = false;             // by an end token; false: max_tokens or a full context
  double prompt_seconds = 0, seconds = 0;
};

// Continues `prompt` from an empty cache, as the decoder samples. `show` receives text as it
// becomes complete.
Generation generate(Decoder& decoder, const Tokenizer& tokenizer,
                    std::span<const std::int32_t> prompt, std::int64_t max_tokens,
                    const std::function<bool(const std::string&)>& show = {});

}  // namespace nibble
