// What a tokenizer file holds, whichever format it came from: GGUF metadata or tokenizer.json.
// models/tokenizer.h turns it into something that encodes and decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace nibble {

class GgufFile;
class GgufWriter;

enum class TokenType : std::int32_t {
  normal = 1,
  unknown = 2,
  control = 3,
  user_defined = 4,
  unused = 5,
  byte = 6,
};

struct TokenizerSpec {
  std::string model;  // "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE)
  std::string pre;    // pre-tokenizer by llama.cpp's name: "gpt-2", "smollm", "llama-bpe", ...
  std::vector<std::string> tokens;  // byte-level BPE tokens in the GPT-2 byte-to-char alphabet
  std::vector<float> scores;        // "llama" only
  std::vector<TokenType> types;
  // "left right", by rank. For "llama" only when the scores do not say the same; other readers of
  // GGUF ignore them there.
  std::vector<std::string> merges;
  std::int32_t bos = -1, eos = -1, unk = -1, pad = -1, eot = -1;  // -1: none
  bool add_bos = false, add_eos = false, add_space_prefix = false;
  bool ignore_merges = false;
  std::string chat_template;  // Jinja text, empty when the file has none
};

TokenizerSpec tokenizer_from_gguf(const GgufFile& file);
void write_tokenizer(const TokenizerSpec& spec, GgufWriter& writer);  // tokenizer.ggml.* keys

// A Hugging Face directory: tokenizer.json with tokenizer_config.json where there is one, or a
// SentencePiece tokenizer.model. Throws FormatError, or Unsupported by name.
bool has_tokenizer_files(const std::string& directory);
TokenizerSpec tokenizer_from_directory(const std::string& directory);

// The same from memory; `path` is for messages, `config` may be empty.
TokenizerSpec tokenizer_from_json(const std::string& json, const std::string& config,
                                  const std::string& path);
TokenizerSpec tokenizer_from_sentencepiece(std::span<const std::byte> bytes,
                                           const std::string& path);

// tokenizer.json text that transformers reads back with the same ids.
std::string tokenizer_to_json(const TokenizerSpec& spec);
std::string tokenizer_config_to_json(const TokenizerSpec& spec);

}  // namespace nibble
