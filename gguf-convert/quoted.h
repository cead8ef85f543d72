// Text from a file, made fit for a one-line message: quoted, bytes that do not print as \xNN, and
// cut after 80 bytes. Call it as nibble::quoted where std::quoted can be found by its argument.
#pragma once

#include <string>
#include <string_view>

namespace nibble {

inline std::string quoted(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f && c != '"' && c != '\\') {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kLongest ? "...\"" : "\"");
}

}  // namespace nibble
