// The two ways of turning plain text into token ids that Tokenizer chooses between. Both work on
// text without special tokens; both are immutable and may be used by any number of threads.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "gguf-convert/tokenizer_spec.h"
#include "models/merge_table.h"

namespace nibble {

// The tokens that plain text can turn into, by their text. Control, unknown, byte and unused
// tokens are left out on purpose: no text may spell its way into </s>.
using TokenIndex = std::unordered_map<std::string_view, std::int32_t>;

// GPT-2's reversible map from bytes to printable characters: 0x21-0x7E, 0xA1-0xAC and 0xAE-0xFF
// are themselves, the other 68 bytes are U+0100, U+0101, ... in ascending order.
char32_t alphabet_char(unsigned char byte);
// The bytes of a token written in that alphabet; the text itself when it is not.
std::string bytes_of_alphabet(std::string_view token);
// The byte that a SentencePiece byte token such as <0x0A> stands for; -1 for other text.
int byte_of_token(std::string_view token);

// Byte-level BPE (Radford et al. 2019; Sennrich et al., ACL 2016): the text is cut into words by
// the pre-tokenizer, the bytes of each word are merged by the rank of the file's merges.
class BpeEncoder {
 public:
  // Throws Unsupported for a pre-tokenizer it does not know, Error for a malformed merge.
  BpeEncoder(const TokenizerSpec& spec, const TokenIndex& index);
  void encode(std::string_view text, std::vector<std::int32_t>& out) const;

 private:
  std::int32_t symbol(std::string_view text, const TokenIndex& index);
  void encode_word(std::string_view word, std::vector<std::int32_t>& scratch,
                   std::vector<std::int32_t>& out) const;

  std::string pre_;
  MergeTable merges_;
  std::array<std::int32_t, 256> byte_symbols_{};
  // Symbols from `vocabulary_` on are no tokens. Bytes without a token are dropped before merging,
  // so their neighbours may merge (SmolLM2 lacks some control characters; Hugging Face's tokenizers
  // does this, llama.cpp drops them afterwards). spelled_[i] are the byte tokens that stand for the
  // i-th merge result without a token.
  std::int32_t vocabulary_;
  std::vector<std::vector<std::int32_t>> spelled_;
  std::unordered_map<std::string, std::int32_t> extra_symbols_;
  std::unordered_map<std::string, std::int32_t> whole_words_;  // filled for ignore_merges only
};

// SentencePiece-BPE (Kudo and Richardson, EMNLP 2018): spaces become U+2581, characters are merged
// by the score of the token that results; characters outside the vocabulary become byte tokens.
class SpmEncoder {
 public:
  SpmEncoder(const TokenizerSpec& spec, const TokenIndex& index);
  enum class Prefix { none, space };
  void encode(std::string_view text, Prefix prefix, std::vector<std::int32_t>& out) const;

 private:
  void add_merges(std::int32_t id, std::string_view text, std::uint32_t rank,
                  const TokenIndex& index);
  void add_listed_merges(const TokenizerSpec& spec, const TokenIndex& index);
  void flush(std::vector<std::int32_t>& word, std::vector<std::int32_t>& out) const;
  void spell(std::int32_t symbol, std::vector<std::int32_t>& out) const;

  MergeTable merges_;
  std::unordered_map<char32_t, std::int32_t> chars_;  // tokens of one character
  std::array<std::int32_t, 256> byte_ids_{};          // -1: the vocabulary lacks the byte
  std::int32_t unk_;
  // No token continues across a word's start, so words can be merged one by one.
  bool words_are_separate_ = true;
};

// Cuts text into words. `pre` is one of supported_pre_tokenizers().
bool is_pre_tokenizer(std::string_view pre);
std::string supported_pre_tokenizers();  // for messages
std::vector<std::string_view> split_words(std::string_view pre, std::string_view text);

}  // namespace nibble
