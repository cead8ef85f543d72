// How a score-ordered vocabulary becomes a merge table: every way of splitting a token into two
// shorter symbols is a merge that makes it, and its rank is the place of its score among all
// scores. Characters that are no token are negative symbols that carry themselves: they take part
// in merges like any other and are spelled in byte tokens if they are still there at the end.
#include <algorithm>
#include <cmath>
#include <functional>

#include "engine/error.h"
#include "models/text_encoders.h"
#include "models/unicode.h"

namespace nibble {
namespace {

constexpr std::string_view space_mark = "\xE2\x96\x81";  // U+2581
constexpr char32_t space_mark_code = 0x2581;
// Longer tokens than any model has; keeps a damaged file from costing quadratic time.
constexpr std::size_t max_token_bytes = 512;

// Symbols below zero: -2 - code point, and past the code points -2 - (raw_byte + byte).
constexpr char32_t raw_byte = 0x110000;
std::int32_t char_symbol(char32_t code) { return -2 - static_cast<std::int32_t>(code); }

}  // namespace

int byte_of_token(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    const bool digit = c >= '0' && c <= '9', upper = c >= 'A' && c <= 'F';
    if (!digit && !upper) return -1;
    byte = 16 * byte + (digit ? c - '0' : c - 'A' + 10);
  }
  return byte;
}

SpmEncoder::SpmEncoder(const TokenizerSpec& spec, const TokenIndex& index) : unk_(spec.unk) {
  byte_ids_.fill(-1);
  std::vector<float> scores;
  const auto takes_part = [&](std::size_t i) { return spec.types[i] == TokenType::normal; };
  for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
    const std::string& text = spec.tokens[i];
    const auto id = static_cast<std::int32_t>(i);
    if (const int byte = byte_of_token(text); spec.types[i] == TokenType::byte && byte >= 0) {
      byte_ids_[static_cast<std::size_t>(byte)] = id;
    }
    if (!takes_part(i) || text.empty()) continue;
    if (!std::isfinite(spec.scores[i]) || text.size() > max_token_bytes) {
      throw Error("tokenizer: token " + std::to_string(i) + " has " +
                  (text.size() > max_token_bytes
                       ? std::to_string(text.size()) + " bytes, at most 512 can be"
                       : std::string("a score that is no number")) +
                  "; the tokenizer file is damaged");
    }
    scores.push_back(spec.scores[i]);
    const Utf8Char first = decode_utf8(text, 0);
    if (first.length == text.size() && first.state == Utf8Char::State::valid) {
      chars_[first.code] = id;
    }
    const std::size_t mark = text.rfind(space_mark);
    const std::size_t body = text.find_first_not_of(space_mark);
    if (mark != std::string::npos && body != std::string::npos && body < mark) {
      words_are_separate_ = false;
    }
  }
  if (!spec.merges.empty()) {
    add_listed_merges(spec, index);
    return;
  }
  std::sort(scores.begin(), scores.end(), std::greater<>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  for (const auto& [text, id] : index) {
    if (!takes_part(static_cast<std::size_t>(id))) continue;
    const auto place = std::lower_bound(
        scores.begin(), scores.end(), spec.scores[static_cast<std::size_t>(id)], std::greater<>());
    add_merges(id, text, static_cast<std::uint32_t>(place - scores.begin()), index);
  }
}

namespace {

// The token or the single character that `text` is; -1 if it is neither.
std::int32_t symbol_of(std::string_view text, const TokenIndex& index) {
  if (const auto found = index.find(text); found != index.end()) return found->second;
  if (text.empty()) return -1;
  const Utf8Char c = decode_utf8(text, 0);
  return c.length == text.size() ? char_symbol(c.code) : -1;
}

}  // namespace

// Adds every pair of symbols that spells `text`.
void SpmEncoder::add_merges(std::int32_t id, std::string_view text, std::uint32_t rank,
                            const TokenIndex& index) {
  if (!is_valid_utf8(text)) return;  // unreachable from text, which is merged by characters
  for (std::size_t at = decode_utf8(text, 0).length; at < text.size();
       at += decode_utf8(text, at).length) {
    const std::int32_t left = symbol_of(text.substr(0, at), index);
    const std::int32_t right = symbol_of(text.substr(at), index);
    if (left != -1 && right != -1) merges_.add(left, right, {rank, id});
  }
}

void SpmEncoder::add_listed_merges(const TokenizerSpec& spec, const TokenIndex& index) {
  for (std::size_t rank = 0; rank < spec.merges.size(); ++rank) {
    std::string text = spec.merges[rank];
    const std::size_t space = text.find(' ', 1);
    if (space == std::string::npos) {
      throw Error("tokenizer: merge " + std::to_string(rank) +
                  " is not two symbols separated by a space; the tokenizer file is damaged");
    }
    text.erase(space, 1);
    const std::string_view whole = text;
    const std::int32_t left = symbol_of(whole.substr(0, space), index);
    const std::int32_t right = symbol_of(whole.substr(space), index);
    const std::int32_t made = symbol_of(whole, index);
    if (left == -1 || right == -1 || made == -1) continue;  // can never apply
    merges_.add(left, right, {static_cast<std::uint32_t>(rank), made});
  }
}

void SpmEncoder::encode(std::string_view text, Prefix prefix,
                        std::vector<std::int32_t>& out) const {
  if (text.empty()) return;
  std::vector<std::int32_t> word;
  char32_t previous = 0;
  const auto push = [&](char32_t code) {
    if (words_are_separate_ && code == space_mark_code && previous != space_mark_code) {
      flush(word, out);
    }
    const auto known = chars_.find(code);
    word.push_back(known == chars_.end() ? char_symbol(code) : known->second);
    previous = code;
  };
  if (prefix == Prefix::space) push(space_mark_code);
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = decode_utf8(text, at);
    if (c.state == Utf8Char::State::valid) {
      push(c.code == ' ' ? space_mark_code : c.code);
    } else {
      for (std::size_t i = 0; i < c.length; ++i) {
        push(raw_byte + static_cast<unsigned char>(text[at + i]));
      }
    }
    at += c.length;
  }
  flush(word, out);
}

void SpmEncoder::flush(std::vector<std::int32_t>& word, std::vector<std::int32_t>& out) const {
  merges_.merge(word);
  for (const std::int32_t symbol : word) {
    if (symbol >= 0) {
      out.push_back(symbol);
    } else {
      spell(symbol, out);
    }
  }
  word.clear();
}

// A character without a token: its bytes, or the unknown token where the vocabulary has no bytes.
void SpmEncoder::spell(std::int32_t symbol, std::vector<std::int32_t>& out) const {
  const auto code = static_cast<char32_t>(-2 - symbol);
  std::string bytes;
  if (code >= raw_byte) {
    bytes += static_cast<char>(code - raw_byte);
  } else {
    append_utf8(bytes, code);
  }
  const auto id = [&](char c) { return byte_ids_[static_cast<unsigned char>(c)]; };
  if (std::all_of(bytes.begin(), bytes.end(), [&](char c) { return id(c) >= 0; })) {
    for (const char c : bytes) out.push_back(id(c));
  } else if (unk_ >= 0) {
    out.push_back(unk_);
  }
}

}  // namespace nibble
