#include "engine/place.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "engine/dtype.h"

namespace nibble {
namespace {

struct Block {
  std::int64_t begin, end;
  std::int32_t first, last;
};

// Blocks that have been placed. Most lifetimes are short, and only blocks of about the same time
// matter to them: the program is halved again and again, every part knows the blocks that touch it,
// and a lifetime looks at the smallest part that holds all of it.
class Placed {
 public:
  explicit Placed(std::int32_t steps) : steps_(steps) {
    for (std::size_t level = 0; level < kLevels; ++level) parts_[level].resize(1u << level);
  }

  // Those that may be alive together with a block of these steps, by address.
  const std::vector<Block>& near(std::int32_t first, std::int32_t last) {
    std::size_t level = kLevels - 1;
    while (number(level, first) != number(level, last)) --level;
    return parts_[level][number(level, first)].in_order();
  }
  void insert(const Block& block) {
    for (std::size_t level = 0; level < kLevels; ++level) {
      for (std::size_t i = number(level, block.first); i <= number(level, block.last); ++i) {
        parts_[level][i].blocks.push_back(block);
      }
    }
  }

 private:
  // Blocks that came since the last look are put in order by the next one.
  struct Part {
    std::vector<Block> blocks;
    std::ptrdiff_t ordered = 0;
    const std::vector<Block>& in_order() {
      const auto by_address = [](const Block& a, const Block& b) { return a.begin < b.begin; };
      const auto middle = blocks.begin() + ordered;
      std::sort(middle, blocks.end(), by_address);
      std::inplace_merge(blocks.begin(), middle, blocks.end(), by_address);
      ordered = std::ssize(blocks);
      return blocks;
    }
  };
  static constexpr std::size_t kLevels = 9;  // the smallest part is a 256th of the program
  std::size_t number(std::size_t level, std::int32_t step) const {
    return (static_cast<std::size_t>(step) << level) / static_cast<std::size_t>(steps_);
  }
  std::int32_t steps_;
  std::array<std::vector<Part>, kLevels> parts_;
};

// Places in the given order, each at the smallest gap that fits among the blocks alive at the same
// time. Returns the bytes of the whole arena.
std::int64_t place_in_order(std::span<const Lifetime> lifetimes,
                            std::span<const std::int32_t> order, std::int64_t alignment,
                            std::vector<std::int64_t>& offsets) {
  std::int32_t steps = 1;
  for (const Lifetime& life : lifetimes) steps = std::max(steps, life.last + 1);
  Placed placed(steps);
  std::int64_t peak = 0;
  for (const std::int32_t id : order) {
    const Lifetime& life = lifetimes[static_cast<std::size_t>(id)];
    const std::int64_t bytes = round_up(life.bytes, alignment);
    std::int64_t end = 0, best = -1, best_gap = 0;
    for (const Block& b : placed.near(life.first, life.last)) {
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
    offsets[static_cast<std::size_t>(id)] = offset;
    placed.insert({offset, offset + bytes, life.first, life.last});
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

// The searches start from these orders: most first.
enum class Key { bytes, bytes_times_duration, duration, program_order };

std::vector<std::int32_t> order_by(Key key, std::span<const Lifetime> lifetimes) {
  const auto value = [&](std::int32_t id) {
    const Lifetime& life = lifetimes[static_cast<std::size_t>(id)];
    const auto bytes = static_cast<double>(life.bytes);
    const double duration = static_cast<double>(life.last) - life.first + 1;
    switch (key) {
      case Key::bytes:
        return bytes;
      case Key::bytes_times_duration:
        return bytes * duration;
      case Key::duration:
        return duration;
      case Key::program_order:
        break;
    }
    return -static_cast<double>(life.first);
  };
  std::vector<std::int32_t> order(lifetimes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return value(a) > value(b); });
  return order;
}

// Rounds of the searches, which take turns. Training graphs meet the bound in at most 8 of the
// order that suits them; 4000 random sets come within 0.03 % of it on average with 10 and 0.02 %
// with 50.
constexpr int kRounds = 16;
// In so many rounds only those take part that suit most training graphs, or the one that is known.
constexpr int kAlone = 2;
constexpr std::size_t kLikely = 2;
// Less than this share of the bound above the goal, the best search goes on alone, for so many
// rounds.
constexpr std::int64_t kCloseEnough = 1024;
constexpr int kLastRounds = 3;

}  // namespace

Placement bound_placement(std::span<const Lifetime> lifetimes, std::int64_t alignment) {
  const std::int64_t bound = maximum_live(lifetimes, alignment);
  return {std::vector<std::int64_t>(lifetimes.size()), bound, bound};
}

Placement place(std::span<const Lifetime> lifetimes, std::int64_t alignment,
                const PlaceHint& hint) {
  Placement best;
  best.lower_bound = maximum_live(lifetimes, alignment);
  const std::int64_t goal = std::max(best.lower_bound, hint.enough);
  best.offsets.resize(lifetimes.size());
  best.bytes = lifetimes.empty() ? 0 : INT64_MAX;
  std::vector<std::vector<std::int32_t>> orders;
  for (const Key key : {Key::bytes, Key::bytes_times_duration, Key::duration, Key::program_order}) {
    orders.push_back(order_by(key, lifetimes));
  }
  const auto likely = [&](std::size_t i) {
    return hint.enough > 0 ? i == hint.search : i < kLikely;
  };
  std::vector<std::int64_t> offsets(lifetimes.size());
  for (int round = 0, end = kRounds; round < end; ++round) {
    for (std::size_t i = 0; i < orders.size(); ++i) {
      if (best.bytes <= goal) return best;
      const bool close = best.bytes - goal < best.lower_bound / kCloseEnough;
      if (close) end = std::min(end, round + kLastRounds);
      if (close ? i != best.search : round < kAlone && !likely(i)) continue;
      const std::int64_t peak = place_in_order(lifetimes, orders[i], alignment, offsets);
      if (peak < best.bytes) {
        best.bytes = peak;
        best.offsets = offsets;
        best.search = i;
      }
      // What ended above the goal chooses first in the next round.
      std::stable_partition(orders[i].begin(), orders[i].end(), [&](std::int32_t id) {
        const std::int64_t bytes = lifetimes[static_cast<std::size_t>(id)].bytes;
        const std::int64_t top = offsets[static_cast<std::size_t>(id)] + bytes;
        return round_up(top, alignment) > goal;
      });
    }
  }
  return best;
}

}  // namespace nibble
