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
  std::vector<Line> device;        // allocated from the backend: exactly these bytes
  std::vector<Line> pinned;        // allocated by the backend in host memory: exactly these bytes
  std::vector<Line> host;          // beside it: mapped weights, files on disk
  std::int64_t context_bytes = 0;  // what the device takes for itself, where it counts
  std::int64_t budget_bytes = 0;   // of device lines and context; 0: no limit was given
  std::int64_t pinned_budget_bytes = 0;  // of the pinned lines
  std::string storage;                   // StoragePolicy::str()
  // Predicted from the device's figures; 0: they are not known.
  double step_seconds = 0, tokens_per_s = 0, hours = 0;

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
  // Bytes too many on the device; negative: room.
  std::int64_t excess_bytes() const { return total_bytes() + context_bytes - budget_bytes; }
  bool fits() const {
    return (budget_bytes == 0 || excess_bytes() <= 0) &&
           (pinned_budget_bytes == 0 || pinned_bytes() <= pinned_budget_bytes);
  }
};

}  // namespace nibble
