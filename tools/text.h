// Numbers as people read them, shared by the commands.
#pragma once

#include <cstdint>
#include <string>

namespace nibble {

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string size_text(std::int64_t bytes);    // "812 MiB", "1.44 GiB"
std::string time_text(double seconds);        // "03:12", "1:02:45"
std::string count_text(std::int64_t number);  // "1,234,567"
// The text on one line and at most `width` characters, control characters escaped.
std::string one_line(const std::string& text, std::size_t width);

}  // namespace nibble
