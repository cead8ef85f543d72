#include "models/packing.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "engine/philox.h"

namespace nibble {
namespace {

constexpr std::int64_t kBucketStep = 256;
constexpr std::int64_t kMaxRows = std::int64_t{1} << 28;  // of a schedule: 1 GiB of row numbers
constexpr std::uint64_t kShuffleStream = hash_name("row order");

// An integer in [0, n) from 64 random bits; the bias is below n / 2^64.
std::uint64_t below(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch, std::uint64_t i) {
  const PhiloxBlock r =
      philox(seed ^ kShuffleStream,
             {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32),
              static_cast<std::uint32_t>(epoch), static_cast<std::uint32_t>(epoch >> 32)});
  return ((static_cast<std::uint64_t>(r[0]) << 32) | r[1]) % n;
}

// Doubles, so that no product overflows; false for NaN.
void check_rows(double rows) {
  if (rows <= static_cast<double>(kMaxRows)) return;
  throw Error("the run would take more than " + std::to_string(kMaxRows) +
              " rows over all its epochs; give fewer --steps or --epochs, or a smaller --batch");
}

}  // namespace

Schedule::Schedule(std::vector<std::int64_t> lengths, const ScheduleOptions& options)
    : lengths_(std::move(lengths)), options_(options) {
  if (lengths_.empty()) throw Error("there is no row to train on");
  step_begin_.push_back(0);
  const auto rows = static_cast<double>(lengths_.size());
  if (options_.steps > 0) {
    // An epoch has at most this many steps, fewer with packing, and all but the last are whole.
    const double most = std::ceil(rows / static_cast<double>(options_.batch));
    check_rows((static_cast<double>(options_.steps) / most - 1) * rows);
    check_rows(static_cast<double>(options_.steps));
    for (std::int64_t epoch = 0; steps() < options_.steps; ++epoch) {
      check_rows(static_cast<double>(order_.size()));
      append_epoch(epoch, static_cast<std::int64_t>(lengths_.size()), options_.steps);
    }
    return;
  }
  check_rows(rows * options_.epochs);
  auto left = std::max<std::int64_t>(
      1, static_cast<std::int64_t>(std::ceil(rows * options_.epochs - 1e-9)));
  for (std::int64_t epoch = 0; left > 0; ++epoch) {
    const auto take = std::min(left, static_cast<std::int64_t>(lengths_.size()));
    append_epoch(epoch, take, INT64_MAX);
    left -= take;
  }
}

std::vector<std::int32_t> Schedule::epoch_order(std::int64_t epoch) const {
  std::vector<std::int32_t> order(lengths_.size());
  std::iota(order.begin(), order.end(), 0);
  if (options_.shuffle) {
    for (std::size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[below(i, options_.seed, static_cast<std::uint64_t>(epoch), i)]);
    }
  }
  if (options_.group_by_length) {
    // Rows of similar length meet in a step; groups of 50 steps keep the order random at large.
    const auto group = static_cast<std::size_t>(50 * options_.batch);
    for (std::size_t begin = 0; begin < order.size(); begin += group) {
      const std::size_t end = std::min(order.size(), begin + group);
      std::stable_sort(
          order.begin() + static_cast<std::ptrdiff_t>(begin),
          order.begin() + static_cast<std::ptrdiff_t>(end), [&](std::int32_t a, std::int32_t b) {
            return lengths_[static_cast<std::size_t>(a)] > lengths_[static_cast<std::size_t>(b)];
          });
    }
  }
  return order;
}

void Schedule::append_epoch(std::int64_t epoch, std::int64_t row_limit, std::int64_t step_limit) {
  const std::vector<std::int32_t> order = epoch_order(epoch);
  std::int64_t units = 0, filled = 0;
  for (std::int64_t i = 0; i < row_limit; ++i) {
    const std::int32_t row = order[static_cast<std::size_t>(i)];
    const std::int64_t length = lengths_[static_cast<std::size_t>(row)];
    const bool joins = options_.pack && units > 0 && filled + length <= options_.sequence;
    if (!joins) {
      if (units == options_.batch) {
        step_begin_.push_back(order_.size());
        if (steps() == step_limit) return;
        units = 0;
      }
      ++units;
      filled = 0;
    }
    filled += length;
    order_.push_back(row);
  }
  if (units > 0) step_begin_.push_back(order_.size());
}

std::span<const std::int32_t> Schedule::rows(std::int64_t step) const {
  const std::size_t begin = step_begin_[static_cast<std::size_t>(step)];
  const std::size_t end = step_begin_[static_cast<std::size_t>(step) + 1];
  return std::span<const std::int32_t>(order_).subspan(begin, end - begin);
}

double Schedule::epochs() const {
  return static_cast<double>(order_.size()) / static_cast<double>(lengths_.size());
}

std::vector<std::vector<std::int32_t>> fill_bins(std::span<const std::int64_t> sizes,
                                                 std::int64_t capacity) {
  std::vector<std::int32_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return sizes[static_cast<std::size_t>(a)] > sizes[static_cast<std::size_t>(b)];
  });
  std::vector<std::vector<std::int32_t>> bins;
  std::vector<std::int64_t> room;
  for (const std::int32_t member : order) {
    const std::int64_t size = sizes[static_cast<std::size_t>(member)];
    if (size > capacity) {
      throw Error("a row of " + std::to_string(size) + " tokens does not fit a microbatch of " +
                  std::to_string(capacity));
    }
    std::size_t bin = 0;
    while (bin < bins.size() && room[bin] < size) ++bin;
    if (bin == bins.size()) {
      bins.emplace_back();
      room.push_back(capacity);
    }
    bins[bin].push_back(member);
    room[bin] -= size;
  }
  for (std::vector<std::int32_t>& bin : bins) std::sort(bin.begin(), bin.end());
  return bins;
}

std::vector<std::int64_t> choose_buckets(std::vector<std::int64_t> sizes, std::int64_t capacity,
                                         int count) {
  std::sort(sizes.begin(), sizes.end());
  std::vector<std::int64_t> buckets = {round_up(capacity, kBucketStep)};
  for (int i = 1; i < count && !sizes.empty(); ++i) {
    const std::size_t quantile =
        sizes.size() * static_cast<std::size_t>(i) / static_cast<std::size_t>(count);
    buckets.push_back(round_up(sizes[quantile], kBucketStep));
  }
  std::sort(buckets.begin(), buckets.end());
  buckets.erase(std::unique(buckets.begin(), buckets.end()), buckets.end());
  return buckets;
}

Microbatch make_microbatch(std::span<const Row* const> rows, std::span<const std::int32_t> members,
                           std::span<const std::int64_t> ordinals, std::int64_t bucket) {
  Microbatch batch;
  for (const std::int32_t member : members) {
    const Row& row = *rows[static_cast<std::size_t>(member)];
    const auto begin = static_cast<std::int32_t>(batch.tokens.size());
    for (std::int64_t i = 0; i < program_rows(row); ++i) {
      const auto at = static_cast<std::size_t>(i);
      batch.tokens.push_back(row.ids[at]);
      batch.positions.push_back(static_cast<std::int32_t>(i));
      batch.labels.push_back(row.trained[at + 1] != 0 ? row.ids[at + 1] : -1);
      batch.span_begin.push_back(begin);
      batch.ordinal.push_back(
          static_cast<std::int32_t>(ordinals[static_cast<std::size_t>(member)] + i));
    }
  }
  while (static_cast<std::int64_t>(batch.tokens.size()) < bucket) {
    batch.span_begin.push_back(static_cast<std::int32_t>(batch.tokens.size()));
    batch.tokens.push_back(0);
    batch.positions.push_back(0);
    batch.labels.push_back(-1);
    batch.ordinal.push_back(0);
  }
  return batch;
}

std::vector<PackedBatch> make_microbatches(std::span<const Row* const> rows,
                                           std::span<const std::int64_t> buckets) {
  std::vector<std::int64_t> sizes, ordinals;
  std::int64_t ordinal = 0;
  for (const Row* row : rows) {
    sizes.push_back(program_rows(*row));
    ordinals.push_back(ordinal);
    ordinal += sizes.back();
  }
  std::vector<PackedBatch> batches;
  for (const std::vector<std::int32_t>& bin : fill_bins(sizes, buckets.back())) {
    std::int64_t total = 0;
    for (const std::int32_t member : bin) total += sizes[static_cast<std::size_t>(member)];
    const auto bucket =
        std::find_if(buckets.begin(), buckets.end(), [&](std::int64_t b) { return b >= total; });
    batches.push_back({make_microbatch(rows, bin, ordinals, *bucket), bin});
  }
  return batches;
}

}  // namespace nibble
