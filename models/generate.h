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

// Two programs in a Runtime (the trainer's or one of its own): one token at a time, and prompts in
// chunks. Construct before Runtime::allocate(); the model must outlive the constructor only.
class Decoder {
 public:
  Decoder(Runtime& runtime, const Model& model, DType compute, std::int64_t context,
          std::int64_t vocab);
  void reset() { position_ = 0; }
  // Appends tokens to the cache; returns F32 logits [vocab] of what follows the last one. Throws
  // Error when the context is full.
  const std::vector<float>& append(std::span<const std::int32_t> tokens);
  std::int64_t position() const { return position_; }
  std::int64_t context() const { return context_; }

 private:
  struct Program {
    std::int64_t rows;
    int number;
    Ref logits;
  };
  Program add_program(const Model& model, std::int64_t rows) const;
  void run(const Program& program, std::span<const std::int32_t> tokens);

  Runtime& runtime_;
  DType compute_;
  std::int64_t context_;
  Program prompt_, token_;
  std::int64_t position_ = 0;
  std::vector<float> logits_;
};

struct SampleOptions {
  double temperature = 0;  // 0: the most likely token
  double top_p = 1, min_p = 0;
  std::int64_t top_k = 0;  // 0: all
  std::uint64_t seed = 0;
  std::int64_t max_tokens = 256;
};

// Token number `index` of a generation from logits; log-probability (of the unmodified
// distribution) goes to `logprob`. Ties go to the lower id. Throws Error for logits that are not
// finite.
std::int32_t choose_token(std::span<const float> logits, const SampleOptions& options,
                          std::uint64_t index, float& logprob);

struct Generation {
  std::vector<std::int32_t> ids;  // with the end token, if one came
  std::vector<float> logprobs;    // natural log, one per id
  std::string text;               // valid UTF-8, without the end token
  bool ended = false;             // by an end token; false: max_tokens or a full context
  double prompt_seconds = 0, seconds = 0;
};

// Continues `prompt` from an empty cache. `show` receives text as it becomes complete.
Generation generate(Decoder& decoder, const Tokenizer& tokenizer,
                    std::span<const std::int32_t> prompt, const SampleOptions& options,
                    const std::function<bool(const std::string&)>& show = {});

}  // namespace nibble
