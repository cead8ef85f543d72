// The merge step that SentencePiece-BPE and byte-level BPE share: a sequence of symbols in which
// the adjacent pair of lowest rank, leftmost among equals, is replaced until no pair is known.
//
// Symbols are int32 numbers chosen by the caller. A pair is found by one probe of a flat hash
// table, so merging never touches strings. Words of up to 32 symbols are scanned for the best pair
// (quadratic, but in registers and L1); longer ones use a heap and linked neighbours, O(n log n),
// so that a megabyte without a space takes milliseconds and not hours. Both give the same result.
// Immutable after the last add(): any number of threads may merge.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace nibble {

class MergeTable {
 public:
  static constexpr std::uint32_t no_rank = std::numeric_limits<std::uint32_t>::max();
  struct Merge {
    std::uint32_t rank;  // no_rank: this pair does not merge
    std::int32_t result;
  };

  // Room for `expected` pairs without growing.
  explicit MergeTable(std::size_t expected = 0);

  // Keeps the lower rank of a pair that is added twice.
  void add(std::int32_t left, std::int32_t right, Merge merge);
  Merge find(std::int32_t left, std::int32_t right) const;

  // Merges `symbols` in place.
  void merge(std::vector<std::int32_t>& symbols) const;

 private:
  struct Slot {
    std::uint64_t key;
    Merge merge{no_rank, -1};
  };
  std::size_t slot_of(std::uint64_t key) const;
  void grow();
  void merge_short(std::vector<std::int32_t>& symbols) const;
  void merge_long(std::vector<std::int32_t>& symbols) const;

  std::vector<Slot> slots_;  // power of two, at most half full; free slots have no_rank
  std::size_t used_ = 0;
};

}  // namespace nibble
