// Which rows make up which optimizer step, and how a step's rows become microbatches.
//
// The order is a pure function of the seed and the number of rows, so a resumed run needs nothing
// but the step it stopped at. A unit is one row, or with packing as many rows, in order, as fit
// into `sequence` tokens; a step takes `batch` units. Documents never attend to each other, packed
// or not: packing changes only how many rows a step averages over.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/trainer.h"
#include "models/dataset.h"

namespace nibble {

struct ScheduleOptions {
  std::int64_t batch = 16;    // units per step
  std::int64_t sequence = 0;  // tokens of a pack; only with pack
  bool pack = false;
  bool shuffle = true;
  bool group_by_length = false;
  double epochs = 1;  // ignored when steps > 0
  std::int64_t steps = 0;
  std::uint64_t seed = 0;
};

class Schedule {
 public:
  // lengths: tokens of each row. Throws Error when there are none, and when the run would take more
  // than 2^28 rows. The least run is one row.
  Schedule(std::vector<std::int64_t> lengths, const ScheduleOptions& options);
  std::int64_t steps() const { return static_cast<std::int64_t>(step_begin_.size()) - 1; }
  // Row numbers of step `step`, in order.
  std::span<const std::int32_t> rows(std::int64_t step) const;
  double epochs() const;  // over the whole run

 private:
  void append_epoch(std::int64_t epoch, std::int64_t row_limit, std::int64_t step_limit);
  std::vector<std::int32_t> epoch_order(std::int64_t epoch) const;
  std::vector<std::int64_t> lengths_;
  ScheduleOptions options_;
  std::vector<std::int32_t> order_;      // rows of all steps, one after the other
  std::vector<std::size_t> step_begin_;  // into order_, one more than there are steps
};

// Rows that a training program sees for a row: its last token predicts nothing and is left out.
inline std::int64_t program_rows(const Row& row) {
  return static_cast<std::int64_t>(row.ids.size()) - 1;
}

// Distributes rows of the given sizes over as few bins of at most `capacity` as first-fit
// decreasing needs. Returns the numbers of the members of each bin, ascending.
std::vector<std::vector<std::int32_t>> fill_bins(std::span<const std::int64_t> sizes,
                                                 std::int64_t capacity);

// At most `count` bucket sizes, multiples of 256, that the microbatches of the given sizes are
// padded to; the largest covers `capacity`.
std::vector<std::int64_t> choose_buckets(std::vector<std::int64_t> sizes, std::int64_t capacity,
                                         int count = 6);

// The microbatch of `members` (indices into `rows`), padded to `bucket` rows. `ordinals` is the
// number within the optimizer step of the first token of each row of `rows`.
Microbatch make_microbatch(std::span<const Row* const> rows, std::span<const std::int32_t> members,
                           std::span<const std::int64_t> ordinals, std::int64_t bucket);

struct PackedBatch {
  Microbatch batch;
  std::vector<std::int32_t> members;  // indices into the rows, in the order they lie in the batch
};

// All microbatches of the given rows: bins of the largest bucket, each padded to the smallest that
// holds it.
std::vector<PackedBatch> make_microbatches(std::span<const Row* const> rows,
                                           std::span<const std::int64_t> buckets);

}  // namespace nibble
