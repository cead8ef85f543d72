// Text to token ids and back, for the two families of vocabularies that llama-like models use:
// SentencePiece-BPE ("llama") and byte-level BPE ("gpt2").
//
// encode() first cuts out special tokens, literally and longest first, then encodes what lies
// between. decode(encode(text)) is `text` again, byte for byte, when every byte has a token and
// the text holds no special token's text. Malformed UTF-8 in the input is encoded byte by byte.
//
// Limits: no Unicode normalization (llama.cpp does none either; Qwen's NFC matters only for text
// that is not composed already), no LSTRIP/RSTRIP attributes, no unigram or WordPiece models.
// Semantics: llama.cpp on GGUF metadata. Where it and the original differ the original wins: plain
// text never becomes a control token, and bytes that are not UTF-8 are kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gguf-convert/tokenizer_spec.h"

namespace nibble {

struct EncodeOptions {
  bool add_special = false;    // BOS in front and EOS behind, where the model wants them
  bool parse_special = false;  // text such as <|im_end|> becomes the control token
  bool continues = false;      // the text goes on after other tokens: no space is put in front
};

struct DecodeOptions {
  bool special = false;    // show control tokens as text
  bool continues = false;  // the ids follow others: keep the space that a first piece may carry
};

// Immutable: any number of threads may use one.
class Tokenizer {
 public:
  // Throws Unsupported for an unknown model or pre-tokenizer, Error for an inconsistent spec.
  explicit Tokenizer(TokenizerSpec spec);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  std::vector<std::int32_t> encode(std::string_view text, EncodeOptions options = {}) const;
  // Throws Error for an id outside the vocabulary.
  std::string decode(std::span<const std::int32_t> ids, DecodeOptions options = {}) const;

  // The bytes that a token stands for, control tokens as their text. Need not be valid UTF-8.
  const std::string& piece(std::int32_t id) const;
  std::int32_t size() const;
  const TokenizerSpec& spec() const;
  std::optional<std::int32_t> find(std::string_view token_text) const;  // any type of token
  bool is_special(std::int32_t id) const;  // control or unknown: not shown unless asked for
  bool is_end(std::int32_t id) const;      // generation stops here

 private:
  struct State;
  void encode_plain(std::string_view text, bool space_prefix, std::vector<std::int32_t>& out) const;
  std::unique_ptr<const State> state_;
};

// Decodes a stream of tokens into text that is valid UTF-8 after every step: a character whose
// bytes come in several tokens is held back until it is complete; malformed bytes become U+FFFD.
// Borrows the tokenizer.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, DecodeOptions options = {})
      : tokenizer_(tokenizer), options_(options) {}
  std::string push(std::int32_t id);  // what can be shown now, possibly nothing
  std::string finish();               // what was held back

 private:
  const Tokenizer& tokenizer_;
  DecodeOptions options_;
  std::string held_;
};

}  // namespace nibble
