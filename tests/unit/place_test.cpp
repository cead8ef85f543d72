#include "engine/place.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>

using namespace nibble;

namespace {

constexpr std::int64_t kAlignment = 64;

// Checks a placement without knowing how it was made; returns the ratio to the lower bound.
double checked_ratio(const std::vector<Lifetime>& lives, const Placement& p) {
  REQUIRE(p.offsets.size() == lives.size());
  std::int64_t peak = 0, lower_bound = 0;
  for (std::size_t a = 0; a < lives.size(); ++a) {
    const std::int64_t end = p.offsets[a] + lives[a].bytes;
    REQUIRE(p.offsets[a] >= 0);
    REQUIRE(p.offsets[a] % kAlignment == 0);
    peak = std::max(peak, (end + kAlignment - 1) / kAlignment * kAlignment);
    std::int64_t live = 0;  // at the step where `a` begins: the maximum is reached at such a step
    for (std::size_t b = 0; b < lives.size(); ++b) {
      if (lives[b].first <= lives[a].first && lives[a].first <= lives[b].last) {
        live += (lives[b].bytes + kAlignment - 1) / kAlignment * kAlignment;
      }
      const bool together = lives[a].first <= lives[b].last && lives[b].first <= lives[a].last;
      if (a == b || !together) continue;
      const bool apart = end <= p.offsets[b] || p.offsets[b] + lives[b].bytes <= p.offsets[a];
      if (!apart) FAIL("lifetimes " << a << " and " << b << " overlap");
    }
    lower_bound = std::max(lower_bound, live);
  }
  REQUIRE(p.bytes == peak);
  REQUIRE(p.lower_bound == lower_bound);
  REQUIRE(p.bytes >= p.lower_bound);
  return lower_bound == 0 ? 1 : static_cast<double>(p.bytes) / static_cast<double>(lower_bound);
}

// Lifetimes as programs have them: a few sizes, most short, some across the whole program.
std::vector<Lifetime> random_lifetimes(std::mt19937& random) {
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  const int count = draw(1, 60), steps = draw(1, 40);
  const int shapes = draw(1, 6);
  std::vector<std::int64_t> sizes;
  for (int i = 0; i < shapes; ++i) sizes.push_back(std::int64_t{draw(1, 1 << draw(0, 14))});
  std::vector<Lifetime> lives;
  for (int i = 0; i < count; ++i) {
    const int first = draw(0, steps - 1);
    const int last =
        draw(0, 3) == 0 ? draw(first, steps - 1) : std::min(steps - 1, first + draw(0, 3));
    lives.push_back({sizes[static_cast<std::size_t>(draw(0, shapes - 1))], first, last});
  }
  return lives;
}

}  // namespace

TEST_CASE("random lifetimes never overlap and stay close to the lower bound") {
  std::mt19937 random(1);
  double sum = 0, worst = 0;
  constexpr int kSets = 4000;
  for (int i = 0; i < kSets; ++i) {
    const std::vector<Lifetime> lives = random_lifetimes(random);
    const double ratio = checked_ratio(lives, place(lives, kAlignment));
    sum += ratio;
    worst = std::max(worst, ratio);
  }
  MESSAGE("arena / lower bound over ", kSets, " random sets: mean ", sum / kSets, ", worst ",
          worst);
  CHECK(sum / kSets < 1.001);
}

TEST_CASE("the same lifetimes give the same placement") {
  std::mt19937 random(2);
  const std::vector<Lifetime> lives = random_lifetimes(random);
  CHECK(place(lives, kAlignment).offsets == place(lives, kAlignment).offsets);
}

TEST_CASE("values that never meet share an address; values that meet do not") {
  const std::vector<Lifetime> apart = {{100, 0, 1}, {100, 2, 3}, {100, 4, 4}};
  CHECK(place(apart, kAlignment).bytes == 128);
  const std::vector<Lifetime> touching = {{100, 0, 2}, {100, 2, 3}};
  CHECK(place(touching, kAlignment).bytes == 256);
  CHECK(place({}, kAlignment).bytes == 0);
  CHECK(place({}, kAlignment).lower_bound == 0);
}

TEST_CASE("sizes past 32 bits are placed exactly") {
  const std::int64_t big = std::int64_t{5} << 32;
  const std::vector<Lifetime> lives = {{big, 0, 2}, {big + 1, 1, 3}, {64, 2, 2}, {big, 3, 4}};
  const Placement p = place(lives, kAlignment);
  CHECK(checked_ratio(lives, p) == 1.0);
  CHECK(p.bytes == 2 * big + 64 + 64);
}
