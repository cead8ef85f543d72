#include "engine/dtype.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "engine/error.h"
#include "engine/float16.h"

using namespace nibble;

TEST_CASE("NF4 with double quantization costs 4.127 bits a weight") {
  const TensorType type{DType::NF4, {4096, 4096}, {}};
  const double bits = 8.0 * static_cast<double>(bytes(type)) / (4096.0 * 4096.0);
  CHECK(bits == doctest::Approx(4.127).epsilon(0.0001));
}

TEST_CASE("planes follow each other, aligned, also for odd sizes") {
  const TensorType type{DType::NF4, {3, 67}, {32, true, true}};
  const Planes p = planes(type);
  CHECK(p.codes == 0);
  CHECK(p.codes_bytes == 101);
  CHECK(p.absmax == 128);
  CHECK(p.absmax_bytes == 7);
  CHECK(p.scale == 160);
  CHECK(p.offset == 192);
  CHECK(p.map == 224);
  CHECK(p.bytes == 224 + 1024);
}

TEST_CASE("a row of a block type must be whole blocks") {
  CHECK(bytes({DType::Q8_0, {3, 64}, {}}) == 3 * 2 * 34);
  CHECK_THROWS_AS(bytes({DType::Q8_0, {3, 65}, {}}), ShapeError);
}

TEST_CASE("every half and bf16 survives a round trip through float") {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const f16 h{static_cast<std::uint16_t>(bits)};
    if (!std::isnan(to_float(h))) CHECK(to_f16(to_float(h)).bits == h.bits);
    const bf16 b{static_cast<std::uint16_t>(bits)};
    if (!std::isnan(to_float(b))) CHECK(to_bf16(to_float(b)).bits == b.bits);
  }
  CHECK(std::isnan(to_float(to_bf16(std::nanf("")))));
  CHECK(std::isnan(to_float(to_f16(std::nanf("")))));
  CHECK(to_f16(65520.0f).bits == 0x7c00);  // halfway past the largest half goes to infinity
  CHECK(to_f16(65519.0f).bits == 0x7bff);
}
