// Pre-tokenizers of byte-level BPE: hand-written scanners for the patterns that the models were
// trained with. A word never spans two of them, so they decide which merges are possible.
//
//   gpt-2      's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   smollm     each \p{N} alone, then gpt-2 on what lies between
//   llama-bpe  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
//              | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   qwen2      llama-bpe with \p{N} instead of \p{N}{1,3}
//
// Every scanner is linear in the text. A malformed byte counts as a character that is neither
// letter, number nor space, and stays what it is. Source: llama.cpp's llama-vocab.cpp
// and the pre_tokenizer entries of the models' tokenizer.json.
#include <algorithm>
#include <array>

#include "models/text_encoders.h"
#include "models/unicode.h"

namespace nibble {
namespace {

struct Char {
  CharClass kind;
  char32_t code;
  std::size_t end;  // where the next character starts
};

class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}
  bool done(std::size_t at) const { return at >= text_.size(); }

  Char at(std::size_t i) const {
    const auto lead = static_cast<unsigned char>(text_[i]);
    if (lead < 0x80) return {char_class(lead), lead, i + 1};
    const Utf8Char c = decode_utf8(text_, i);
    return {char_class(c.code), c.code, i + c.length};
  }

  // End of the run of `kind` that starts at i, of at most `limit` characters.
  std::size_t run(std::size_t i, CharClass kind, std::size_t limit = ~std::size_t{0}) const {
    for (; limit > 0 && !done(i); --limit) {
      const Char c = at(i);
      if (c.kind != kind) break;
      i = c.end;
    }
    return i;
  }

  // Length of 's 't 're 've 'm 'll 'd at i, 0 if there is none.
  enum class Case { exact, ignored };
  std::size_t contraction(std::size_t i, Case letters) const {
    if (text_[i] != '\'') return 0;
    std::array<char, 2> c{};
    for (std::size_t k = 0; k < 2 && i + 1 + k < text_.size(); ++k) {
      c[k] = text_[i + 1 + k];
      if (letters == Case::ignored && c[k] >= 'A' && c[k] <= 'Z') c[k] += 'a' - 'A';
    }
    if (c[0] == 's' || c[0] == 't' || c[0] == 'm' || c[0] == 'd') return 2;
    const bool two = (c[0] == 'r' && c[1] == 'e') || (c[0] == 'v' && c[1] == 'e') ||
                     (c[0] == 'l' && c[1] == 'l');
    return two ? 3 : 0;
  }

  // \s+(?!\S)|\s+ : the last space of a run is left to the word that follows it.
  std::size_t spaces(std::size_t i) const {
    std::size_t last = i, end = i;
    while (!done(end)) {
      const Char c = at(end);
      if (c.kind != CharClass::space) break;
      last = end;
      end = c.end;
    }
    return done(end) || last == i ? end : last;
  }

  // \s*[\r\n]+ : up to the last line break of the run of spaces at i; i if it has none.
  std::size_t line_breaks(std::size_t i) const {
    std::size_t end = i;
    while (!done(i)) {
      const Char c = at(i);
      if (c.kind != CharClass::space) break;
      i = c.end;
      if (c.code == '\r' || c.code == '\n') end = i;
    }
    return end;
  }

 private:
  std::string_view text_;
};

std::size_t gpt2_word(const Scanner& text, std::size_t at) {
  if (const auto n = text.contraction(at, Scanner::Case::exact)) return at + n;
  const Char first = text.at(at);
  std::size_t start = at;
  CharClass kind = first.kind;
  if (first.code == ' ' && !text.done(first.end)) {
    start = first.end;
    kind = text.at(start).kind;
  }
  return kind == CharClass::space ? text.spaces(at) : text.run(start, kind);
}

std::size_t llama3_word(const Scanner& text, std::size_t at, std::size_t digits) {
  if (const auto n = text.contraction(at, Scanner::Case::ignored)) return at + n;
  const Char first = text.at(at);
  const bool line_break = first.code == '\r' || first.code == '\n';
  if (first.kind == CharClass::letter) return text.run(at, CharClass::letter);
  if (first.kind == CharClass::number) return text.run(at, CharClass::number, digits);
  const bool more = !text.done(first.end);
  if (!line_break && more && text.at(first.end).kind == CharClass::letter) {
    return text.run(first.end, CharClass::letter);
  }
  const std::size_t start = first.code == ' ' ? first.end : at;
  std::size_t end = text.run(start, CharClass::other);
  if (end > start) {
    for (; !text.done(end); ++end) {
      const char32_t c = text.at(end).code;
      if (c != '\r' && c != '\n') break;
    }
    return end;
  }
  end = text.line_breaks(at);
  return end > at ? end : text.spaces(at);
}

template <typename NextWord>
void split(std::string_view text, std::vector<std::string_view>& words, NextWord next_word) {
  const Scanner scanner(text);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = next_word(scanner, at);
    words.push_back(text.substr(at, end - at));
    at = end;
  }
}

void split_smollm(std::string_view text, std::vector<std::string_view>& words) {
  const Scanner scanner(text);
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Char c = scanner.at(at);
    if (c.kind == CharClass::number) {
      split(text.substr(begin, at - begin), words, gpt2_word);
      words.push_back(text.substr(at, c.end - at));
      begin = c.end;
    }
    at = c.end;
  }
  split(text.substr(begin), words, gpt2_word);
}

constexpr std::array<std::string_view, 4> known = {"gpt-2", "smollm", "llama-bpe", "qwen2"};

}  // namespace

bool is_pre_tokenizer(std::string_view pre) {
  return std::find(known.begin(), known.end(), pre) != known.end();
}

std::string supported_pre_tokenizers() {
  std::string list;
  for (const auto name : known) list += (list.empty() ? "" : ", ") + std::string(name);
  return list;
}

std::vector<std::string_view> split_words(std::string_view pre, std::string_view text) {
  std::vector<std::string_view> words;
  words.reserve(text.size() / 4);
  const auto llama3 = [](const Scanner& s, std::size_t at) { return llama3_word(s, at, 3); };
  const auto qwen2 = [](const Scanner& s, std::size_t at) { return llama3_word(s, at, 1); };
  if (pre == "smollm") split_smollm(text, words);
  if (pre == "gpt-2") split(text, words, gpt2_word);
  if (pre == "llama-bpe") split(text, words, llama3);
  if (pre == "qwen2") split(text, words, qwen2);
  return words;
}

}  // namespace nibble
