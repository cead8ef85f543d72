// Storage types: constants against the rules they come from, encoders against independent
// transcriptions of the foreign kernels, and the properties that every type promises.
#include "engine/quantize.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/philox.h"

using namespace nibble;

namespace {

std::vector<std::byte> encode(const TensorType& type, const std::vector<float>& values) {
  std::vector<std::byte> data(static_cast<std::size_t>(bytes(type)), std::byte{0xee});
  quantize(type, values, data);
  return data;
}

std::vector<float> decode(const TensorType& type, const std::vector<std::byte>& data) {
  std::vector<float> values(static_cast<std::size_t>(type.elements()));
  dequantize(type, data.data(), 0, values);
  return values;
}

std::vector<float> normals(std::size_t count, float scale, std::uint64_t key = 1) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = scale * philox_normal(key, 0, i);
  return values;
}

int code_at(const std::vector<std::byte>& data, std::size_t i) {
  const int pair = std::to_integer<int>(data[i / 2]);
  return i % 2 == 0 ? pair >> 4 : pair & 15;
}

float float_at(const std::vector<std::byte>& data, std::int64_t at) {
  float value;
  std::memcpy(&value, data.data() + at, sizeof value);
  return value;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size() || a.empty()) return a.size() == b.size();
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TensorType flat(DType dtype, std::size_t count, QuantParams quant = {64, false, false}) {
  return {dtype, {static_cast<std::int64_t>(count)}, quant};
}

// A block of 64 with absmax 1, the given value first.
int nf4_code(DType dtype, float value) {
  std::vector<float> block(64, 0.0f);
  block[0] = value;
  block[63] = 1.0f;
  return code_at(encode(flat(dtype, 64), block), 0);
}

// dQuantizeFP4 of bitsandbytes' kernels.cu, branch by branch.
int fp4_tree(float x) {
  const int sign = x < 0 ? 8 : 0;
  x = std::fabs(x);
  if (x > 0.29166667f) {
    if (x > 0.583333f) return (x > 0.8333333f ? 3 : 2) + sign;
    return (x > 0.4166667f ? 5 : 4) + sign;
  }
  if (x > 0.0859375f) return (x > 0.20833333f ? 7 : 6) + sign;
  return (x > 0.00260417f ? 1 : 0) + sign;
}

// dQuantize of bitsandbytes' kernels.cu: a search from the middle that ends on an even pivot, then
// a choice between the pivot and one neighbour.
int map_search(float x, const float* map = dynamic_map_signed) {
  int pivot = 127, upper_pivot = 255, lower_pivot = 0;
  float value = map[pivot], upper = 1.0f, lower = -1.0f;
  for (int step = 64; step > 0; step >>= 1) {
    if (x > value) {
      lower_pivot = pivot;
      lower = value;
      pivot += step;
    } else {
      upper_pivot = pivot;
      upper = value;
      pivot -= step;
    }
    value = map[pivot];
  }
  if (upper_pivot == 255) upper = map[255];
  if (lower_pivot == 0) lower = map[0];
  if (x > value) return x > (upper + value) * 0.5f ? upper_pivot : pivot;
  return x < (lower + value) * 0.5f ? lower_pivot : pivot;
}

}  // namespace

TEST_CASE("NF4 values rise and their thresholds are the rounded midpoints") {
  for (int i = 0; i < 15; ++i) {
    CHECK(nf4_values[i] < nf4_values[i + 1]);
    const double middle = (static_cast<double>(nf4_values[i]) + nf4_values[i + 1]) / 2;
    CHECK(nf4_thresholds[i] == static_cast<float>(middle));
  }
  CHECK(nf4_values[0] == -1.0f);
  CHECK(std::bit_cast<std::uint32_t>(nf4_values[7]) == 0);
  CHECK(nf4_values[15] == 1.0f);
}

TEST_CASE("the dynamic maps are what their algorithm gives") {
  for (const bool is_signed : {true, false}) {
    std::vector<float> map = {0.0f, 1.0f};
    for (int i = 0; i < 7; ++i) {
      const int cells = is_signed ? 1 << i : 2 << i, points = cells + 1;
      const auto start = static_cast<float>(0.1);
      const float step = (1.0f - start) / static_cast<float>(points - 1);
      const auto boundary = [&](int k) {
        return k < points / 2 ? std::fma(step, static_cast<float>(k), start)
                              : std::fma(-step, static_cast<float>(points - 1 - k), 1.0f);
      };
      for (int j = 0; j < cells; ++j) {
        const float mean = (boundary(j) + boundary(j + 1)) / 2;
        const float value = static_cast<float>(std::pow(10.0, i - 6)) * mean;
        map.push_back(value);
        if (is_signed) map.push_back(-value);
      }
    }
    std::sort(map.begin(), map.end());
    REQUIRE(map.size() == 256);
    for (std::size_t i = 0; i < 256; ++i) {
      CAPTURE(i);
      CHECK(map[i] == (is_signed ? dynamic_map_signed : dynamic_map_unsigned)[i]);
    }
  }
}

TEST_CASE("thresholds of the dynamic maps give the codes of bitsandbytes' search, ties included") {
  for (const bool is_signed : {true, false}) {
    const float* map = is_signed ? dynamic_map_signed : dynamic_map_unsigned;
    const auto& thresholds = is_signed ? dynamic_thresholds_signed : dynamic_thresholds_unsigned;
    CHECK(std::is_sorted(thresholds.begin(), thresholds.end()));
    const auto check = [&](float x) {
      const auto below =
          std::count_if(thresholds.begin(), thresholds.end(), [x](float t) { return x > t; });
      CAPTURE(x);
      CHECK(below == map_search(x, map));
    };
    for (int i = 0; i < 255; ++i) {
      const float midpoint = (map[i + 1] + map[i]) * 0.5f;
      CHECK(map_search(midpoint, map) % 2 == 0);
      for (const float x : {midpoint, std::nextafter(midpoint, -2.0f),
                            std::nextafter(midpoint, 2.0f), map[i], map[i + 1]}) {
        check(x);
      }
    }
    check(NAN);
  }
}

TEST_CASE("an NF4 threshold itself takes the lower code, the next float the upper") {
  for (int i = 0; i < 15; ++i) {
    const float t = nf4_thresholds[i];
    CHECK(nf4_code(DType::NF4, t) == i);
    CHECK(nf4_code(DType::NF4, std::nextafter(t, -2.0f)) == i);
    CHECK(nf4_code(DType::NF4, std::nextafter(t, 2.0f)) == i + 1);
  }
}

TEST_CASE("NF4 picks the nearest value up to the rounding of the reciprocal") {
  for (const int block : {32, 64, 256, 4096}) {
    const std::vector<float> x = normals(3 * 4096 + 77, 0.02f, 2);
    const TensorType type = flat(DType::NF4, x.size(), {block, false, false});
    const std::vector<std::byte> data = encode(type, x);
    const Planes p = planes(type);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t first = i / static_cast<std::size_t>(block) * block;
      float absmax = 0;
      for (std::size_t k = first; k < std::min(x.size(), first + block); ++k) {
        absmax = std::max(absmax, std::fabs(x[k]));
      }
      const auto at = p.absmax + 4 * static_cast<std::int64_t>(i / block);
      REQUIRE(float_at(data, at) == absmax);
      const double ratio = static_cast<double>(x[i]) / absmax;
      double best = 2;
      for (const float value : nf4_values) best = std::min(best, std::fabs(ratio - value));
      REQUIRE(std::fabs(ratio - nf4_values[code_at(data, i)]) <= best + 3e-7);
    }
  }
}

TEST_CASE("FP4 follows bitsandbytes' decision tree, sign of zero included") {
  std::vector<float> probes = normals(4000, 0.4f, 3);
  for (const float t :
       {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f}) {
    for (const float x : {t, std::nextafter(t, 0.0f), std::nextafter(t, 1.0f)}) {
      probes.push_back(x);
      probes.push_back(-x);
    }
  }
  probes.insert(probes.end(), {0.0f, -0.0f, 1e-30f, -1e-30f, 1.0f, -1.0f});
  for (const float x : probes) {
    if (std::fabs(x) > 1.0f) continue;
    CAPTURE(x);
    CHECK(nf4_code(DType::FP4, x) == fp4_tree(x));
  }
  CHECK(nf4_code(DType::FP4, -1e-30f) == 8);
  CHECK(nf4_code(DType::FP4, -0.0f) == 0);
  CHECK(std::signbit(fp4_values[8]));
}

TEST_CASE("a block of zeros is stored as +0") {
  const TensorType type = flat(DType::NF4, 128);
  const std::vector<std::byte> data = encode(type, std::vector<float>(128, 0.0f));
  for (int i = 0; i < 64; ++i) CHECK(data[static_cast<std::size_t>(i)] == std::byte{0x77});
  for (const float value : decode(type, data)) CHECK(std::bit_cast<std::uint32_t>(value) == 0);
  const TensorType nested = flat(DType::NF4, 128, {64, true, false});
  const std::vector<float> values(128, -0.0f);
  for (const float value : decode(nested, encode(nested, values))) CHECK(value == 0.0f);
}

TEST_CASE("odd sizes end in a zero code and all padding is zero") {
  for (const std::size_t count : {1u, 63u, 65u, 2049u}) {
    for (const DType dtype : {DType::NF4, DType::FP4}) {
      const TensorType type = flat(dtype, count, {64, true, true});
      const std::vector<std::byte> data = encode(type, normals(count, 1.0f, count));
      const Planes p = planes(type);
      CHECK(code_at(data, count) == (dtype == DType::NF4 ? 7 : 0));
      const std::int64_t ends[][2] = {{p.codes + p.codes_bytes, p.absmax},
                                      {p.absmax + p.absmax_bytes, p.scale},
                                      {p.scale + p.scale_bytes, p.offset},
                                      {p.offset + p.offset_bytes, p.map},
                                      {p.map + p.map_bytes, p.bytes}};
      for (const auto& [from, to] : ends) {
        for (std::int64_t i = from; i < to; ++i) {
          CHECK(data[static_cast<std::size_t>(i)] == std::byte{0});
        }
      }
    }
  }
  CHECK(encode(flat(DType::NF4, 0, {64, true, false}), {}).size() == 32);
}

TEST_CASE("tiny and huge blocks keep the error bound of NF4") {
  for (const float scale : {std::numeric_limits<float>::denorm_min(), 1e-44f, 1e-40f, 1e-38f,
                            2e-38f, 1e-20f, 1e20f, 3.4e38f}) {
    std::vector<float> x(64);
    for (std::size_t i = 0; i < 64; ++i) {
      x[i] = scale * (static_cast<float>(i) / 32.0f - 1.0f);
    }
    const TensorType type = flat(DType::NF4, 64);
    const std::vector<float> y = decode(type, encode(type, x));
    for (std::size_t i = 0; i < 64; ++i) {
      // Half the widest gap between values, and the rounding of subnormal products.
      const double bound = 0.1520 * scale + std::numeric_limits<float>::denorm_min();
      CHECK(std::fabs(static_cast<double>(x[i]) - y[i]) <= bound);
    }
  }
}

TEST_CASE("values that are not finite are refused with their index") {
  for (const DType dtype : {DType::NF4, DType::FP4, DType::Q8_0, DType::Q4_0, DType::Q4_1}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()}) {
      std::vector<float> x(256, 0.5f);
      x[137] = bad;
      CHECK_THROWS_WITH_AS(encode(flat(dtype, 256), x), doctest::Contains("element 137"), Error);
    }
  }
  std::vector<float> large(64, 1e9f);
  large[0] = -2e9f;
  for (const DType dtype : {DType::Q8_0, DType::Q4_0, DType::Q4_1}) {
    CHECK_THROWS_WITH_AS(encode(flat(dtype, 64), large), doctest::Contains("too large"), Error);
  }
  CHECK(can_quantize(DType::NF4));
  CHECK_FALSE(can_quantize(DType::Q4_K));
  CHECK_THROWS_AS(encode(flat(DType::Q6_K, 256), std::vector<float>(256)), Unsupported);
}

TEST_CASE("double quantization follows the search of bitsandbytes, ties to even") {
  // Blocks of one magnitude each. Magnitudes 1 + m and 1 - m for midpoints m of the map, and 0 and
  // 2: their mean is exactly 1 and the scale exactly 1, so the midpoints arrive exactly.
  std::vector<float> absmax = {0.0f, 2.0f};
  for (int i = 128; i < 255; ++i) {
    const float m = (dynamic_map_signed[i + 1] + dynamic_map_signed[i]) * 0.5f;
    const float up = 1.0f + m, down = 1.0f - m;
    if (up - 1.0f == m && 1.0f - down == m) absmax.insert(absmax.end(), {up, down});
  }
  CHECK(absmax.size() > 40);
  REQUIRE(absmax.size() <= 256);
  const QuantParams quant{32, true, false};
  std::vector<float> x;
  for (const float a : absmax) x.insert(x.end(), 32, a);
  const TensorType type = flat(DType::NF4, x.size(), quant);
  const std::vector<std::byte> data = encode(type, x);
  const Planes p = planes(type);
  REQUIRE(float_at(data, p.offset) == 1.0f);
  REQUIRE(float_at(data, p.scale) == 1.0f);
  for (std::size_t i = 0; i < absmax.size(); ++i) {
    const int code = std::to_integer<int>(data[static_cast<std::size_t>(p.absmax) + i]);
    CAPTURE(absmax[i]);
    CHECK(code == map_search(absmax[i] - 1.0f));
    if (i >= 2) CHECK(code % 2 == 0);
  }
}

TEST_CASE("double quantization of random absmax, against the same search and two roundings") {
  const std::size_t blocks = 700;
  std::vector<float> x = normals(blocks * 32 - 5, 0.03f, 9);
  const TensorType type = flat(DType::NF4, x.size(), {32, true, false});
  const TensorType single = flat(DType::NF4, x.size(), {32, false, false});
  const std::vector<std::byte> data = encode(type, x), plain = encode(single, x);
  const Planes p = planes(type), q = planes(single);
  CHECK(std::equal(data.begin(), data.begin() + p.codes_bytes, plain.begin()));
  double sum = 0;
  for (std::size_t i = 0; i < blocks; ++i) {
    sum += float_at(plain, q.absmax + 4 * static_cast<std::int64_t>(i));
  }
  const float offset = float_at(data, p.offset);
  REQUIRE(offset == static_cast<float>(sum / blocks));
  const std::vector<float> y = decode(type, data);
  for (std::size_t group = 0; group < blocks; group += 256) {
    float scale = 0;
    const std::size_t end = std::min(blocks, group + 256);
    const auto centered = [&](std::size_t i) {
      return float_at(plain, q.absmax + 4 * static_cast<std::int64_t>(i)) - offset;
    };
    for (std::size_t i = group; i < end; ++i) scale = std::max(scale, std::fabs(centered(i)));
    REQUIRE(float_at(data, p.scale + static_cast<std::int64_t>(group / 256) * 4) == scale);
    const float inverse = 1.0f / scale;
    for (std::size_t i = group; i < end; ++i) {
      const int code = std::to_integer<int>(data[static_cast<std::size_t>(p.absmax) + i]);
      REQUIRE(code == map_search(centered(i) * inverse));
      volatile float product = dynamic_map_signed[code] * scale;  // rounded on its own
      const float decoded = product + offset;
      for (std::size_t k = 32 * i; k < std::min(x.size(), 32 * (i + 1)); ++k) {
        REQUIRE(y[k] == nf4_values[code_at(data, k)] * decoded);
      }
    }
  }
}

TEST_CASE("a map in the data replaces the built-in one") {
  const TensorType type = flat(DType::NF4, 6400, {64, true, true});
  const TensorType builtin = flat(DType::NF4, 6400, {64, true, false});
  const std::vector<float> x = normals(6400, 1.0f);
  std::vector<std::byte> data = encode(type, x);
  CHECK(same_bits(decode(type, data), decode(builtin, encode(builtin, x))));
  const Planes p = planes(type);
  const std::vector<float> zeros(256, 0.0f);
  std::memcpy(data.data() + p.map, zeros.data(), 1024);
  const float offset = float_at(data, p.offset);
  const std::vector<float> y = decode(type, data);
  for (std::size_t i = 0; i < y.size(); ++i) {
    REQUIRE(y[i] == nf4_values[code_at(data, i)] * offset);
  }
}

TEST_CASE("the error of each type stays within its step") {
  const std::vector<float> x = normals(1 << 14, 0.5f, 5);
  const auto check = [&](DType dtype, auto bound) {
    const TensorType type = flat(dtype, x.size());
    const std::vector<float> y = decode(type, encode(type, x));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t first = i / 32 * 32;
      const auto [low, high] =
          std::minmax_element(x.begin() + static_cast<std::ptrdiff_t>(first),
                              x.begin() + static_cast<std::ptrdiff_t>(first) + 32);
      REQUIRE(std::fabs(x[i] - y[i]) <= bound(x[i], *low, *high));
    }
  };
  // A half keeps a scale to 2^-11 of itself; the scale multiplies up to 127, 8 or 15.
  check(DType::Q8_0, [](float, float low, float high) {
    const float d = std::max(-low, high) / 127;
    return d * (0.5f + 127.0f / 2048) + 1e-6f;
  });
  check(DType::Q4_0, [](float, float low, float high) {
    return std::max(-low, high) / 8 * (1 + 8.0f / 2048) + 1e-6f;  // the other end is cut at 7 d
  });
  check(DType::Q4_1, [](float, float low, float high) {
    return (high - low) / 15 * (0.5f + 15.0f / 2048) + std::fabs(low) / 2048 + 1e-6f;
  });
  check(DType::F16, [](float v, float, float) { return std::fabs(v) / 2048 + 1e-7f; });
  check(DType::BF16, [](float v, float, float) { return std::fabs(v) / 256; });
  check(DType::F32, [](float, float, float) { return 0.0f; });
}

TEST_CASE("any range decodes to the same bits as the whole") {
  const std::int64_t count = 5 * 256;
  for (int d = 0; d <= static_cast<int>(DType::Q6_K); ++d) {
    const auto dtype = static_cast<DType>(d);
    if (dtype == DType::INT4 || (!is_float(dtype) && !is_plane(dtype) && !is_block(dtype)))
      continue;
    for (const bool nested : {false, true}) {
      const TensorType type{dtype, {5, 256}, {32, nested, false}};
      std::vector<std::byte> data(static_cast<std::size_t>(bytes(type)));
      for (std::size_t i = 0; i < data.size(); ++i) {
        // Bytes below 0x70 keep every scale and exponent finite.
        data[i] =
            static_cast<std::byte>(philox(7, {static_cast<std::uint32_t>(i), 0, 0, 0})[0] % 0x70);
      }
      const std::vector<float> whole = decode(type, data);
      for (const std::int64_t begin : {0, 1, 31, 32, 33, 255, 256, 700, 1279, 1280}) {
        for (const std::int64_t length : {0, 1, 2, 31, 64, 257, 580}) {
          if (begin + length > count) continue;
          std::vector<float> part(static_cast<std::size_t>(length));
          dequantize(type, data.data(), begin, part);
          const auto from = whole.begin() + begin;
          CHECK(same_bits(part, std::vector<float>(from, from + length)));
        }
      }
      std::vector<float> part(2);
      CHECK_THROWS_AS(dequantize(type, data.data(), count - 1, part), ShapeError);
      CHECK_THROWS_AS(dequantize(type, data.data(), -1, part), ShapeError);
    }
  }
}
