#include "engine/place.h"

#include <algorithm>
#include <numeric>

#include "engine/dtype.h"

namespace nibble {
namespace {

struct Block {
  std::int64_t begin, end;
  std::int32_t first, last;
};

// Places in the given order, each at the smallest gap that fits among the blocks alive at the same
// time. `placed` stays sorted by address. Gives up (returns -1) once `limit` is passed.
std::int64_t place_in_order(std::span<const Lifetime> lifetimes, std::span<const std::int32_t> order,
                            std::int64_t alignment, std::int64_t limit,
                            std::vector<std::int64_t>& offsets) {
  std::vector<Block> placed;
  placed.reserve(lifetimes.size());
  std::int64_t peak = 0;
  for (const std::int32_t id : order) {
    const Lifetime& life = lifetimes[static_cast<std::size_t>(id)];
    const std::int64_t bytes = round_up(life.bytes, alignment);
    std::int64_t end = 0, best = -1, best_gap = 0;
    for (const Block& b : placed) {
      if (b.last < life.first || life.last < b.first) continue;
      const std::int64_t gap = b.begin - end;
      if (gap >= bytes && (best < 0 || gap < best_gap)) {
        best = end;
        best_gap = gap;
        if (gap == bytes) break;
      }
      end = std::max(end, b.end);
    }
    const std::int64_t offset = best >= 0 ? best : end;
    peak = std::max(peak, offset + bytes);
    if (peak >= limit) return -1;
    offsets[static_cast<std::size_t>(id)] = offset;
    const Block block{offset, offset + bytes, life.first, life.last};
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block,
                                   [](const Block& a, const Block& b) { return a.begin < b.begin; }),
                  block);
  }
  return peak;
}

std::int64_t maximum_live(std::span<const Lifetime> lifetimes, std::int64_t alignment) {
  std::int32_t steps = 0;
  for (const Lifetime& life : lifetimes) steps = std::max(steps, life.last + 2);
  std::vector<std::int64_t> change(static_cast<std::size_t>(steps) + 1);
  for (const Lifetime& life : lifetimes) {
    const std::int64_t bytes = round_up(life.bytes, alignment);
    change[static_cast<std::size_t>(life.first)] += bytes;
    change[static_cast<std::size_t>(life.last) + 1] -= bytes;
  }
  std::int64_t live = 0, most = 0;
  for (const std::int64_t c : change) most = std::max(most, live += c);
  return most;
}

}  // namespace

Placement place(std::span<const Lifetime> lifetimes, std::int64_t alignment) {
  Placement best;
  best.lower_bound = maximum_live(lifetimes, alignment);
  best.offsets.resize(lifetimes.size());
  std::vector<std::int32_t> order(lifetimes.size());
  const auto life = [&](std::int32_t id) { return lifetimes[static_cast<std::size_t>(id)]; };
  const auto duration = [&](std::int32_t id) { return std::int64_t{life(id).last} - life(id).first + 1; };
  const auto sort_by = [&](auto key) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return key(a) > key(b); });
  };
  bool found = false;
  const auto attempt = [&] {
    if (found && best.bytes == best.lower_bound) return;
    std::vector<std::int64_t> offsets(lifetimes.size());
    const std::int64_t limit = found ? best.bytes : INT64_MAX;
    const std::int64_t peak = place_in_order(lifetimes, order, alignment, limit, offsets);
    if (peak < 0) return;
    best.bytes = peak;
    best.offsets = std::move(offsets);
    found = true;
  };
  sort_by([&](std::int32_t id) { return life(id).bytes; });
  attempt();
  sort_by([&](std::int32_t id) { return static_cast<double>(life(id).bytes) *
                                        static_cast<double>(duration(id)); });
  attempt();
  sort_by([&](std::int32_t id) { return duration(id); });
  attempt();
  sort_by([&](std::int32_t id) { return -std::int64_t{life(id).first}; });  // program order
  attempt();
  return best;
}

}  // namespace nibble
