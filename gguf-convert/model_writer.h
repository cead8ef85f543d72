// The two places that converted tensors go to: a GGUF file or a Hugging Face directory. Everything
// but the tensors' bytes is written on construction, the bytes then in plan order, and finish()
// makes the result appear.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "gguf-convert/convert.h"

namespace nibble {

class ModelWriter {
 public:
  virtual ~ModelWriter() = default;
  // The next bytes of plan.tensors[index]; plane types whole, others in any number of pieces.
  virtual void write(std::size_t index, std::span<const std::byte> bytes) = 0;
  virtual void finish() = 0;
};

// All arguments are borrowed while the writer lives.
std::unique_ptr<ModelWriter> make_gguf_writer(const Checkpoint& source, const ConvertPlan& plan,
                                              const ConvertOptions& options,
                                              const std::string& path);

// `source_path` is where `source` was opened from: the tokenizer files and config.json of a
// Hugging Face directory are carried over rather than made anew. Weights are split into files of
// at most `shard_bytes`, if a tensor fits in that.
inline constexpr std::int64_t kShardBytes = 5'000'000'000;
std::unique_ptr<ModelWriter> make_hf_writer(const Checkpoint& source, const ConvertPlan& plan,
                                            const ConvertOptions& options,
                                            const std::string& source_path,
                                            const std::string& directory,
                                            std::int64_t shard_bytes = kShardBytes);

}  // namespace nibble
