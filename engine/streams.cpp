#include "engine/streams.h"

#include <algorithm>
#include <array>

namespace nibble {
namespace {

bool conflict(const Access& a, const Access& b) {
  return (a.writes || b.writes) && a.begin < b.begin + b.bytes && b.begin < a.begin + a.bytes;
}

bool conflict(const StreamTask& a, const StreamTask& b) {
  return std::any_of(a.accesses.begin(), a.accesses.end(), [&](const Access& x) {
    return std::any_of(b.accesses.begin(), b.accesses.end(),
                       [&](const Access& y) { return conflict(x, y); });
  });
}

}  // namespace

std::vector<std::vector<std::size_t>> stream_waits(std::span<const StreamTask> tasks) {
  std::vector<std::vector<std::size_t>> waits(tasks.size());
  std::array<std::vector<std::size_t>, kStreams> earlier;  // by stream
  // waited[a][b]: how many tasks of stream b the tasks of stream a have waited for.
  std::array<std::array<std::size_t, kStreams>, kStreams> waited{};
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    const auto mine = static_cast<std::size_t>(tasks[i].stream);
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      if (stream == mine) continue;
      const std::vector<std::size_t>& others = earlier[stream];
      for (std::size_t k = others.size(); k > waited[mine][stream]; --k) {
        if (!conflict(tasks[i], tasks[others[k - 1]])) continue;
        waits[i].push_back(others[k - 1]);
        waited[mine][stream] = k;
        break;
      }
    }
    earlier[mine].push_back(i);
  }
  return waits;
}

}  // namespace nibble
