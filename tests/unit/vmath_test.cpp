// exp and sin_cos of backends/cpu/vmath.h against the C library in F64. The header is compiled per
// instruction set; this test takes the portable one, whose two-step multiply-adds round most.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#define NIBBLE_ISA portable
#define NIBBLE_ISA_LEVEL 0
#include "backends/cpu/vmath.h"

namespace vec = nibble::cpu::portable;

TEST_CASE("exp is within 1.05 ulp of the true value on every 1021st float") {
  double worst = 0;
  for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 32; bits += 1021) {
    const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    const float got = vec::exp(x);
    if (std::isnan(x)) {
      CHECK(std::isnan(got));
      continue;
    }
    const double exact = std::exp(static_cast<double>(x));
    const auto nearest = static_cast<float>(exact);
    if (std::isinf(nearest) || std::isinf(got)) {
      CHECK(got == nearest);
      continue;
    }
    const float next = std::nextafter(nearest, std::numeric_limits<float>::infinity());
    const double ulp = static_cast<double>(next) - static_cast<double>(nearest);
    worst = std::max(worst, std::abs(static_cast<double>(got) - exact) / ulp);
  }
  MESSAGE("largest error of exp: ", worst, " ulp");
  CHECK(worst < 1.05);
}

TEST_CASE("exp at the ends of its range") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  CHECK(vec::exp(0.0f) == 1.0f);
  CHECK(vec::exp(-infinity) == 0.0f);
  CHECK(vec::exp(infinity) == infinity);
  CHECK(vec::exp(-1e30f) == 0.0f);
  CHECK(vec::exp(-103.0f) == std::numeric_limits<float>::denorm_min());
}

TEST_CASE("sin_cos is within 8e-8 up to angles of ten million") {
  double worst = 0;
  for (int i = -1'000'000; i < 1'000'000; ++i) {
    const double angle = i * 9.9999123;
    float sine = 0, cosine = 0;
    vec::sin_cos(angle, sine, cosine);
    worst = std::max({worst, std::abs(static_cast<double>(sine) - std::sin(angle)),
                      std::abs(static_cast<double>(cosine) - std::cos(angle))});
  }
  MESSAGE("largest error of sin_cos: ", worst);
  CHECK(worst < 8e-8);
}
