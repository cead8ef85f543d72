// UTF-8 by the table of well-formed byte sequences; classes by binary search in generated ranges,
// with the ASCII part, nearly all of the text in practice, in a table of its own.
#include "models/unicode.h"

#include <algorithm>
#include <array>

namespace nibble {
namespace {

CharClass class_by_search(char32_t code) {
  const auto ranges = char_ranges();
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), code,
                                      [](char32_t c, const CharRange& r) { return c < r.first; });
  if (after == ranges.begin()) return CharClass::other;
  const CharRange& range = *(after - 1);
  return code <= range.last ? range.kind : CharClass::other;
}

}  // namespace

CharClass char_class(char32_t code) {
  static const auto ascii = [] {
    std::array<CharClass, 128> table{};
    for (char32_t c = 0; c < 128; ++c) table[c] = class_by_search(c);
    return table;
  }();
  return code < 128 ? ascii[code] : class_by_search(code);
}

Utf8Char decode_utf8(std::string_view text, std::size_t at) {
  using State = Utf8Char::State;
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(at);
  if (lead < 0x80) return {State::valid, lead, 1};
  if (lead < 0xC2 || lead > 0xF4) return {State::invalid, 0xFFFD, 1};
  const std::size_t wanted = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t code = lead & (0x7Fu >> wanted);
  for (std::size_t i = 1; i < wanted; ++i) {
    if (at + i == text.size()) return {State::incomplete, 0xFFFD, i};
    const unsigned b = byte(at + i);
    // The second byte of four leads is narrower: no overlong forms, surrogates or > U+10FFFF.
    const unsigned low = i > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned high = i > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (b < low || b > high) return {State::invalid, 0xFFFD, i};
    code = code << 6 | (b & 0x3F);
  }
  return {State::valid, code, wanted};
}

void append_utf8(std::string& out, char32_t code) {
  const auto put = [&](char32_t b) { out += static_cast<char>(b); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6), put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  }
}

std::size_t append_valid_utf8(std::string& out, std::string_view text, TextEnd end) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Utf8Char c = decode_utf8(text, at);
    if (c.state == Utf8Char::State::incomplete && end == TextEnd::more_follows) break;
    if (c.state == Utf8Char::State::valid) {
      out.append(text, at, c.length);
    } else {
      append_utf8(out, 0xFFFD);
    }
    at += c.length;
  }
  return at;
}

bool is_valid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Char c = decode_utf8(text, at);
    if (c.state != Utf8Char::State::valid) return false;
    at += c.length;
  }
  return true;
}

}  // namespace nibble
