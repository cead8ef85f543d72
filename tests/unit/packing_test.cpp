#include "models/packing.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <set>

#include "engine/error.h"

using namespace nibble;

namespace {

std::vector<std::int64_t> lengths(std::size_t count) {
  std::vector<std::int64_t> result;
  for (std::size_t i = 0; i < count; ++i)
    result.push_back(3 + static_cast<std::int64_t>(i * 37 % 50));
  return result;
}

Row make_row(std::int32_t first, std::size_t size, std::size_t prompt) {
  Row row;
  for (std::size_t i = 0; i < size; ++i) {
    row.ids.push_back(first + static_cast<std::int32_t>(i));
    row.trained.push_back(i >= prompt ? 1 : 0);
  }
  return row;
}

}  // namespace

TEST_CASE("an epoch visits every row once, in another order each time") {
  ScheduleOptions options;
  options.batch = 7;
  options.epochs = 2;
  const Schedule schedule(lengths(100), options);
  CHECK(schedule.steps() == 30);  // 15 steps an epoch, the last of them short
  std::vector<std::int32_t> first, second;
  for (std::int64_t step = 0; step < 30; ++step) {
    for (const std::int32_t row : schedule.rows(step)) (step < 15 ? first : second).push_back(row);
  }
  CHECK(std::set<std::int32_t>(first.begin(), first.end()).size() == 100);
  CHECK(std::set<std::int32_t>(second.begin(), second.end()).size() == 100);
  CHECK(first != second);
}

TEST_CASE("the order depends on the seed alone") {
  ScheduleOptions options;
  options.steps = 12;
  const Schedule a(lengths(50), options), b(lengths(50), options);
  options.steps = 20;
  const Schedule longer(lengths(50), options);
  options.seed = 1;
  const Schedule other(lengths(50), options);
  bool differs = false;
  for (std::int64_t step = 0; step < 12; ++step) {
    CHECK(std::equal(a.rows(step).begin(), a.rows(step).end(), b.rows(step).begin()));
    CHECK(std::equal(a.rows(step).begin(), a.rows(step).end(), longer.rows(step).begin()));
    differs =
        differs || !std::equal(a.rows(step).begin(), a.rows(step).end(), other.rows(step).begin());
  }
  CHECK(a.steps() == 12);
  CHECK(longer.steps() == 20);
  CHECK(differs);
}

TEST_CASE("a run too long to plan is refused before anything is allocated") {
  ScheduleOptions options;
  options.steps = std::int64_t{1} << 40;
  CHECK_THROWS_AS(Schedule(lengths(50), options), Error);
  options.steps = 0;
  for (const double epochs : {1e9, 1e300, std::numeric_limits<double>::infinity()}) {
    options.epochs = epochs;
    CHECK_THROWS_AS(Schedule(lengths(50), options), Error);
  }
  options.epochs = 1e-12;
  CHECK(Schedule(lengths(50), options).steps() == 1);
}

TEST_CASE("rows with ids beyond the vocabulary are refused, equal rows have equal fingerprints") {
  std::vector<Row> rows = {make_row(0, 5, 2), make_row(3, 4, 1)};
  CHECK_NOTHROW(check_ids(rows, 7));
  CHECK_THROWS_AS(check_ids(rows, 6), Error);
  std::vector<Row> other = rows;
  CHECK(fingerprint(rows) == fingerprint(other));
  std::swap(other[0], other[1]);
  CHECK(fingerprint(rows) != fingerprint(other));
  other = rows;
  other[1].trained[0] = 1;
  CHECK(fingerprint(rows) != fingerprint(other));
}

TEST_CASE("packs hold as many rows as fit and no more") {
  ScheduleOptions options;
  options.batch = 2;
  options.pack = true;
  options.sequence = 60;
  const std::vector<std::int64_t> all = lengths(100);
  const Schedule schedule(all, options);
  for (std::int64_t step = 0; step < schedule.steps(); ++step) {
    std::int64_t packs = 1, filled = 0;
    for (const std::int32_t row : schedule.rows(step)) {
      const std::int64_t length = all[static_cast<std::size_t>(row)];
      if (filled + length > 60) ++packs, filled = 0;
      filled += length;
    }
    CHECK(packs <= 2);
  }
}

TEST_CASE("bins hold every row once and never overflow") {
  const std::vector<std::int64_t> sizes = lengths(200);
  std::int64_t total = 0;
  for (const std::int64_t s : sizes) total += s;
  std::set<std::int32_t> seen;
  const auto bins = fill_bins(sizes, 128);
  for (const auto& bin : bins) {
    std::int64_t filled = 0;
    for (const std::int32_t member : bin) {
      filled += sizes[static_cast<std::size_t>(member)];
      CHECK(seen.insert(member).second);
    }
    CHECK(filled <= 128);
    CHECK(std::is_sorted(bin.begin(), bin.end()));
  }
  CHECK(seen.size() == sizes.size());
  CHECK(static_cast<std::int64_t>(bins.size()) <= total / 128 + 4);
  CHECK_THROWS(fill_bins(sizes, 10));
}

TEST_CASE("buckets are multiples of 256, at most six, and cover the capacity") {
  std::vector<std::int64_t> sizes;
  for (std::int64_t i = 1; i <= 1000; ++i) sizes.push_back(i * 4);
  const auto buckets = choose_buckets(sizes, 4000);
  CHECK(buckets.size() <= 6);
  CHECK(buckets.back() == 4096);
  for (const std::int64_t b : buckets) CHECK(b % 256 == 0);
}

TEST_CASE("labels are the next trained token; padding predicts nothing and sees only itself") {
  const Row a = make_row(10, 4, 2), b = make_row(50, 3, 1);
  const std::vector<const Row*> rows = {&a, &b};
  const auto packed = make_microbatches(rows, std::vector<std::int64_t>{256});
  REQUIRE(packed.size() == 1);
  const Microbatch& m = packed[0].batch;
  CHECK(std::vector<std::int32_t>(m.tokens.begin(), m.tokens.begin() + 5) ==
        std::vector<std::int32_t>{10, 11, 12, 50, 51});
  CHECK(std::vector<std::int32_t>(m.labels.begin(), m.labels.begin() + 6) ==
        std::vector<std::int32_t>{-1, 12, 13, 51, 52, -1});
  CHECK(std::vector<std::int32_t>(m.positions.begin(), m.positions.begin() + 5) ==
        std::vector<std::int32_t>{0, 1, 2, 0, 1});
  CHECK(std::vector<std::int32_t>(m.span_begin.begin(), m.span_begin.begin() + 7) ==
        std::vector<std::int32_t>{0, 0, 0, 3, 3, 5, 6});
  CHECK(std::vector<std::int32_t>(m.ordinal.begin(), m.ordinal.begin() + 5) ==
        std::vector<std::int32_t>{0, 1, 2, 3, 4});
  CHECK(m.tokens.size() == 256);
  CHECK(m.label_count() == 4);
}

TEST_CASE("a token's ordinal does not depend on how the step is split") {
  const Row a = make_row(10, 200, 2), b = make_row(50, 130, 1), c = make_row(90, 90, 1);
  const std::vector<const Row*> rows = {&a, &b, &c};
  std::vector<std::pair<std::int32_t, std::int32_t>> together, apart;
  const auto collect = [&](std::int64_t bucket, auto& into) {
    for (const PackedBatch& p : make_microbatches(rows, std::vector<std::int64_t>{bucket})) {
      for (std::size_t i = 0; i < p.batch.tokens.size(); ++i) {
        if (p.batch.tokens[i] > 0) into.push_back({p.batch.tokens[i], p.batch.ordinal[i]});
      }
    }
    std::sort(into.begin(), into.end());
  };
  collect(512, together);
  collect(256, apart);
  CHECK(together == apart);
}
