// What a run will use, line by line, computed before anything is allocated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nibble {

struct FitReport {
  struct Line {
    std::string name;
    std::int64_t bytes;
  };
  std::vector<Line> device;       // allocated from the backend: exactly these bytes
  std::vector<Line> pinned;       // allocated by the backend in host memory: exactly these bytes
  std::vector<Line> host;         // beside it: mapped weights, files on disk
  std::int64_t budget_bytes = 0;  // of the device lines; 0: no limit was given
  std::string storage;            // StoragePolicy::str()

  std::int64_t total_bytes() const {
    std::int64_t sum = 0;
    for (const Line& line : device) sum += line.bytes;
    return sum;
  }
  std::int64_t pinned_bytes() const {
    std::int64_t sum = 0;
    for (const Line& line : pinned) sum += line.bytes;
    return sum;
  }
  bool fits() const { return budget_bytes == 0 || total_bytes() <= budget_bytes; }
};

}  // namespace nibble
