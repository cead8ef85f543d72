// The little of Unicode that tokenizers need: UTF-8 in and out, and whether a code point is a
// letter, a number or white space (the classes \p{L}, \p{N} and \s of pre-tokenizer patterns).
//
// Text is untrusted bytes. Malformed UTF-8 is never an error here: each byte that is not part of a
// character is reported as such, so that a byte-level tokenizer can still encode it losslessly.
// Well-formedness follows the Unicode Standard, table 3-7 (no surrogates, no overlong forms).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace nibble {

enum class CharClass : std::uint8_t { other, letter, number, space };

struct CharRange {
  char32_t first, last;  // inclusive
  CharClass kind;
};

std::span<const CharRange> char_ranges();  // ascending; what is not listed is `other`
CharClass char_class(char32_t code);

// The character that starts at text[at]. `invalid`: the bytes [at, at + length) cannot begin or
// continue to a character. `incomplete`: they are a proper prefix of one and the text ends.
struct Utf8Char {
  enum class State : std::uint8_t { valid, invalid, incomplete } state;
  char32_t code;       // U+FFFD unless valid
  std::size_t length;  // at least 1; U+FFFD replaces this many bytes when not valid
};
Utf8Char decode_utf8(std::string_view text, std::size_t at);

void append_utf8(std::string& out, char32_t code);

// Appends `text` to `out` with every malformed sequence replaced by U+FFFD. Unless `last`, an
// incomplete character at the end is left out. Returns the number of bytes of `text` consumed.
enum class TextEnd { more_follows, last };
std::size_t append_valid_utf8(std::string& out, std::string_view text, TextEnd end);

bool is_valid_utf8(std::string_view text);

}  // namespace nibble
