#include <algorithm>

#include "engine/error.h"
#include "models/text_encoders.h"
#include "models/unicode.h"

namespace nibble {
namespace {

bool is_printable_byte(unsigned b) {
  return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
}

struct Alphabet {
  std::array<char32_t, 256> of_byte{};
  std::array<std::int16_t, 0x144> to_byte{};  // by code point; -1: not of the alphabet
  Alphabet() {
    to_byte.fill(-1);
    char32_t next = 0x100;
    for (unsigned b = 0; b < 256; ++b) {
      of_byte[b] = is_printable_byte(b) ? b : next++;
      to_byte[of_byte[b]] = static_cast<std::int16_t>(b);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

char32_t alphabet_char(unsigned char byte) { return alphabet().of_byte[byte]; }

std::string bytes_of_alphabet(std::string_view token) {
  std::string bytes;
  bytes.reserve(token.size());
  for (std::size_t at = 0; at < token.size();) {
    const Utf8Char c = decode_utf8(token, at);
    const bool known = c.state == Utf8Char::State::valid && c.code < alphabet().to_byte.size() &&
                       alphabet().to_byte[c.code] >= 0;
    if (!known) return std::string(token);
    bytes += static_cast<char>(alphabet().to_byte[c.code]);
    at += c.length;
  }
  return bytes;
}

BpeEncoder::BpeEncoder(const TokenizerSpec& spec, const TokenIndex& index)
    : pre_(spec.pre),
      merges_(spec.merges.size()),
      vocabulary_(static_cast<std::int32_t>(spec.tokens.size())) {
  if (!is_pre_tokenizer(pre_)) {
    throw Unsupported("pre-tokenizer \"" + pre_ + "\" of a byte-level BPE vocabulary; supported: " +
                      supported_pre_tokenizers());
  }
  for (int b = 0; b < 256; ++b) {
    std::string text;
    append_utf8(text, alphabet_char(static_cast<unsigned char>(b)));
    byte_symbols_[static_cast<std::size_t>(b)] = symbol(text, index);
  }
  for (std::size_t rank = 0; rank < spec.merges.size(); ++rank) {
    const std::string& merge = spec.merges[rank];
    const std::size_t space = merge.find(' ', 1);  // the left part may itself start with a space
    if (space == std::string::npos || space + 1 == merge.size()) {
      throw Error("tokenizer: merge " + std::to_string(rank) +
                  " is not two symbols separated by a space; the tokenizer file is damaged");
    }
    const std::string left = merge.substr(0, space), right = merge.substr(space + 1);
    merges_.add(symbol(left, index), symbol(right, index),
                {static_cast<std::uint32_t>(rank), symbol(left + right, index)});
  }
  extra_symbols_.clear();
  if (!spec.ignore_merges) return;
  for (const auto& [text, id] : index) whole_words_.emplace(bytes_of_alphabet(text), id);
}

std::int32_t BpeEncoder::symbol(std::string_view text, const TokenIndex& index) {
  if (const auto found = index.find(text); found != index.end()) return found->second;
  const auto next = vocabulary_ + static_cast<std::int32_t>(spelled_.size());
  const auto [extra, inserted] = extra_symbols_.emplace(text, next);
  if (!inserted) return extra->second;
  std::vector<std::int32_t> ids;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = decode_utf8(text, at).length;
    const auto found = index.find(text.substr(at, length));
    if (found != index.end()) ids.push_back(found->second);
    at += length;
  }
  spelled_.push_back(std::move(ids));
  return next;
}

void BpeEncoder::encode_word(std::string_view word, std::vector<std::int32_t>& scratch,
                             std::vector<std::int32_t>& out) const {
  if (!whole_words_.empty()) {
    const auto found = whole_words_.find(std::string(word));
    if (found != whole_words_.end()) {
      out.push_back(found->second);
      return;
    }
  }
  scratch.clear();
  for (const char c : word) {
    const std::int32_t symbol = byte_symbols_[static_cast<unsigned char>(c)];
    if (symbol < vocabulary_) scratch.push_back(symbol);
  }
  merges_.merge(scratch);
  for (const std::int32_t s : scratch) {
    if (s < vocabulary_) {
      out.push_back(s);
    } else {
      const auto& ids = spelled_[static_cast<std::size_t>(s - vocabulary_)];
      out.insert(out.end(), ids.begin(), ids.end());
    }
  }
}

void BpeEncoder::encode(std::string_view text, std::vector<std::int32_t>& out) const {
  std::vector<std::int32_t> scratch;
  for (const std::string_view word : split_words(pre_, text)) encode_word(word, scratch, out);
}

}  // namespace nibble
