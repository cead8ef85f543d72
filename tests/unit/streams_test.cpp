// What waits for what, against the definition: any two tasks that touch the same bytes, one of them
// writing, must be ordered by streams and waits.
#include "engine/streams.h"

#include <doctest/doctest.h>

#include <random>

using namespace nibble;

namespace {

const std::byte* at(std::int64_t offset) {
  return reinterpret_cast<const std::byte*>(static_cast<std::intptr_t>(4096 + offset));
}

bool overlap(const Access& a, const Access& b) {
  return (a.writes || b.writes) && a.begin < b.begin + b.bytes && b.begin < a.begin + a.bytes;
}

// before[i][j]: task j has ended when task i starts.
std::vector<std::vector<bool>> order(const std::vector<StreamTask>& tasks,
                                     const std::vector<std::vector<std::size_t>>& waits) {
  std::vector<std::vector<bool>> before(tasks.size(), std::vector<bool>(tasks.size()));
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    std::vector<std::size_t> direct = waits[i];
    for (std::size_t j = 0; j < i; ++j) {
      if (tasks[j].stream == tasks[i].stream) direct.push_back(j);
    }
    for (const std::size_t j : direct) {
      before[i][j] = true;
      for (std::size_t k = 0; k < j; ++k) before[i][k] = before[i][k] || before[j][k];
    }
  }
  return before;
}

}  // namespace

TEST_CASE("tasks that share bytes are ordered, and others wait for nothing") {
  std::mt19937 random(7);
  const auto draw = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 300; ++round) {
    std::vector<StreamTask> tasks;
    for (int i = 0; i < 40; ++i) {
      StreamTask task{static_cast<Stream>(draw(3)), {}};
      for (int k = draw(4); k >= 0; --k) {
        task.accesses.push_back({at(draw(60)), 1 + draw(8), draw(3) == 0});
      }
      tasks.push_back(task);
    }
    const auto waits = stream_waits(tasks);
    const auto before = order(tasks, waits);
    int unordered = 0, idle = 0;
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      const auto conflicts = [&](std::size_t j) {
        for (const Access& a : tasks[i].accesses) {
          for (const Access& b : tasks[j].accesses) {
            if (overlap(a, b)) return true;
          }
        }
        return false;
      };
      for (std::size_t j = 0; j < i; ++j) unordered += conflicts(j) && !before[i][j];
      for (const std::size_t j : waits[i]) {
        idle += tasks[j].stream == tasks[i].stream || j >= i || !conflicts(j);
      }
    }
    CHECK(unordered == 0);
    CHECK(idle == 0);
  }
}

TEST_CASE("a page that comes in beside the kernels") {
  const auto task = [](Stream stream, std::int64_t offset, bool writes) {
    return StreamTask{stream, {{at(offset), 10, writes}}};
  };
  const std::vector<StreamTask> tasks = {
      task(Stream::compute, 0, true),    // an activation
      task(Stream::copy_in, 0, true),    // takes its place
      task(Stream::compute, 20, true),   // has nothing to do with it
      task(Stream::compute, 0, true),    // works on the page
      task(Stream::copy_out, 0, false),  // the page leaves
      task(Stream::compute, 5, false),   // reads what is leaving
      task(Stream::copy_in, 5, true),    // takes its place
  };
  const auto waits = stream_waits(tasks);
  CHECK(waits[0].empty());
  CHECK(waits[1] == std::vector<std::size_t>{0});
  CHECK(waits[2].empty());
  CHECK(waits[3] == std::vector<std::size_t>{1});
  CHECK(waits[4] == std::vector<std::size_t>{3, 1});
  CHECK(waits[5].empty());
  CHECK(waits[6] == std::vector<std::size_t>{5, 4});
}
