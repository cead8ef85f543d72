// Files that tests read from ../shared, next to the project. A test that needs one starts with
// SKIP_WITHOUT(path) and reports itself skipped where the file is absent.
#pragma once

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

namespace nibble::test {

inline std::string shared(const std::string& path) { return "../shared/" + path; }

}  // namespace nibble::test

#define SKIP_WITHOUT(path)                               \
  if (!std::filesystem::exists(path)) {                  \
    MESSAGE("skipped: " << (path) << " is not there");   \
    return;                                              \
  }
