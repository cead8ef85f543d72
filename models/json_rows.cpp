#include "models/json_rows.h"

#include <algorithm>

#include "engine/error.h"

namespace nibble {
namespace {

constexpr std::string_view blank = " \t\r\n";

std::int64_t count_lines(std::string_view text) {
  return std::count(text.begin(), text.end(), '\n');
}

std::string_view trim(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(blank);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(blank) - begin + 1);
}

std::vector<JsonRow> find_lines(std::string_view contents) {
  std::vector<JsonRow> rows;
  std::int64_t line = 1;
  for (std::size_t at = 0; at < contents.size(); ++line) {
    const std::size_t end = std::min(contents.find('\n', at), contents.size());
    const std::string_view text = trim(contents.substr(at, end - at));
    if (!text.empty()) rows.push_back({text, line});
    at = end + 1;
  }
  return rows;
}

// Cuts an array at the commas of its own level; brackets inside strings do not count.
std::vector<JsonRow> find_elements(std::string_view contents, std::size_t at,
                                   const std::string& path) {
  std::vector<JsonRow> rows;
  std::size_t begin = at + 1, counted = 0;
  std::int64_t line = 1;
  const auto add = [&](std::size_t end) {
    const std::string_view text = trim(contents.substr(begin, end - begin));
    begin = end + 1;
    if (text.empty()) return;
    const auto start = static_cast<std::size_t>(text.data() - contents.data());
    line += count_lines(contents.substr(counted, start - counted));
    counted = start;
    rows.push_back({text, line});
  };
  int depth = 0;
  for (bool in_string = false; at < contents.size(); ++at) {
    const char c = contents[at];
    if (in_string) {
      if (c == '\\') ++at;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '[' || c == '{') ++depth;
    if (c == ',' && depth == 1) add(at);
    if ((c == ']' || c == '}') && --depth == 0) {
      add(at);
      if (trim(contents.substr(at + 1)).empty()) return rows;
      throw Error(path + ":" + std::to_string(1 + count_lines(contents.substr(0, at))) +
                  ": there is more text after the end of the array; a file is one JSON array or "
                  "one JSON object per line");
    }
  }
  throw Error(path + ":" + std::to_string(1 + count_lines(contents)) +
              ": the file ends inside its JSON array; is it complete?");
}

}  // namespace

std::vector<JsonRow> find_json_rows(std::string_view contents, const std::string& path) {
  constexpr std::string_view byte_order_mark = "\xEF\xBB\xBF";
  if (contents.substr(0, 3) == byte_order_mark) contents.remove_prefix(3);
  const std::size_t first = contents.find_first_not_of(blank);
  if (first == std::string_view::npos) {
    throw Error(path + ": the file is empty; wanted JSON lines or a JSON array of rows");
  }
  auto rows = contents[first] == '[' ? find_elements(contents, first, path) : find_lines(contents);
  if (rows.empty()) throw Error(path + ": the JSON array is empty; wanted at least one row");
  return rows;
}

JsonPlace place_in(const JsonRow& row, std::string_view contents, std::size_t offset) {
  const auto start = static_cast<std::size_t>(row.text.data() - contents.data());
  const std::size_t at = start + std::min(offset, row.text.size());
  const std::size_t previous = at == 0 ? std::string_view::npos : contents.rfind('\n', at - 1);
  const std::size_t line_start = previous == std::string_view::npos ? 0 : previous + 1;
  return {row.line + count_lines(contents.substr(start, at - start)),
          static_cast<std::int64_t>(at - line_start) + 1};
}

}  // namespace nibble
