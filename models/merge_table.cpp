#include "models/merge_table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <numeric>

namespace nibble {
namespace {

// Up to here the scan beats the heap; measured on English, where it hardly matters.
constexpr std::size_t short_symbols = 32;

std::uint64_t key_of(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
         static_cast<std::uint32_t>(right);
}

}  // namespace

MergeTable::MergeTable(std::size_t expected) : slots_(std::bit_ceil(2 * expected + 2)) {}

// The slot that holds `key`, or the free one where it belongs. Multiplicative (Fibonacci) hash.
std::size_t MergeTable::slot_of(std::uint64_t key) const {
  const std::size_t mask = slots_.size() - 1;
  std::uint64_t hash = (key ^ key >> 29) * 0x9E3779B97F4A7C15ull;
  hash ^= hash >> 32;
  std::size_t i = static_cast<std::size_t>(hash) & mask;
  while (slots_[i].merge.rank != no_rank && slots_[i].key != key) i = (i + 1) & mask;
  return i;
}

void MergeTable::add(std::int32_t left, std::int32_t right, Merge merge) {
  if (2 * (used_ + 1) > slots_.size()) grow();
  const std::uint64_t key = key_of(left, right);
  Slot& slot = slots_[slot_of(key)];
  if (slot.merge.rank == no_rank) ++used_;
  if (merge.rank < slot.merge.rank) slot = {key, merge};
}

void MergeTable::grow() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.merge.rank != no_rank) slots_[slot_of(slot.key)] = slot;
  }
}

MergeTable::Merge MergeTable::find(std::int32_t left, std::int32_t right) const {
  return slots_[slot_of(key_of(left, right))].merge;
}

void MergeTable::merge(std::vector<std::int32_t>& symbols) const {
  if (symbols.size() < 2) return;
  symbols.size() <= short_symbols ? merge_short(symbols) : merge_long(symbols);
}

void MergeTable::merge_short(std::vector<std::int32_t>& symbols) const {
  const auto at = [](std::size_t i) { return static_cast<std::ptrdiff_t>(i); };
  std::array<Merge, short_symbols> pairs{};  // pairs[i]: symbols i and i + 1
  std::size_t n = symbols.size();
  for (std::size_t i = 0; i + 1 < n; ++i) pairs[i] = find(symbols[i], symbols[i + 1]);
  while (n > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < n; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == no_rank) break;
    symbols[best] = pairs[best].result;
    std::copy(symbols.begin() + at(best + 2), symbols.begin() + at(n),
              symbols.begin() + at(best + 1));
    if (best + 2 < n) {
      std::copy(pairs.begin() + at(best + 2), pairs.begin() + at(n - 1),
                pairs.begin() + at(best + 1));
    }
    --n;
    if (best > 0) pairs[best - 1] = find(symbols[best - 1], symbols[best]);
    if (best + 1 < n) pairs[best] = find(symbols[best], symbols[best + 1]);
  }
  symbols.resize(n);
}

void MergeTable::merge_long(std::vector<std::int32_t>& symbols) const {
  const auto n = static_cast<std::uint32_t>(symbols.size());
  std::vector<std::uint32_t> next(n), previous(n);
  std::iota(next.begin(), next.end(), 1u);
  std::iota(previous.begin(), previous.end(), ~0u);  // the first wraps to ~0, then 0, 1, ...
  std::vector<Merge> pairs(n, Merge{no_rank, -1});   // pairs[i]: symbol i and its successor

  // Heap entries are rank << 32 | left position: the smallest is the lowest rank, then leftmost.
  // An entry is stale when its pair has changed since; then the pair's rank differs, or it is the
  // same pair of symbols again and the entry is as good as a new one.
  std::vector<std::uint64_t> heap;
  heap.reserve(n);
  const auto entry = [&](std::uint32_t i) { return std::uint64_t{pairs[i].rank} << 32 | i; };
  for (std::uint32_t i = 0; i + 1 < n; ++i) {
    pairs[i] = find(symbols[i], symbols[i + 1]);
    if (pairs[i].rank != no_rank) heap.push_back(entry(i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto refresh = [&](std::uint32_t i) {
    pairs[i] = next[i] < n ? find(symbols[i], symbols[next[i]]) : Merge{no_rank, -1};
    if (pairs[i].rank == no_rank) return;
    heap.push_back(entry(i));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const std::uint64_t top = heap.back();
    heap.pop_back();
    const auto left = static_cast<std::uint32_t>(top);
    if (pairs[left].rank != top >> 32) continue;
    const std::uint32_t right = next[left];
    symbols[left] = pairs[left].result;
    pairs[right].rank = no_rank;  // consumed: entries that start there are stale
    next[left] = next[right];
    if (next[left] < n) previous[next[left]] = left;
    refresh(left);
    if (previous[left] != ~0u) refresh(previous[left]);
  }
  std::size_t kept = 0;
  for (std::uint32_t i = 0; i < n; i = next[i]) symbols[kept++] = symbols[i];
  symbols.resize(kept);
}

}  // namespace nibble
