// Finds the JSON values of a data file, JSON lines or one top-level array, without parsing them, so
// that every row knows its line and one bad row does not spoil the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

struct JsonRow {
  std::string_view text;  // into the file's contents
  std::int64_t line;      // where it starts, from 1
};

// Throws Error naming `path` for an empty file and for an array that is not closed. A byte order
// mark and blank lines are skipped.
std::vector<JsonRow> find_json_rows(std::string_view contents, const std::string& path);

// "LINE: column N" arithmetic for a parse error at byte `offset` (from 0) of `row`.
struct JsonPlace {
  std::int64_t line, column;  // from 1; columns count bytes
};
JsonPlace place_in(const JsonRow& row, std::string_view contents, std::size_t offset);

}  // namespace nibble
