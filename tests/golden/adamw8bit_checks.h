// The adamw8bit op against make_adamw8bit_golden.py on any backend: codes, absmax and masters of
// three steps, bit for bit, also where the array is cut into two calls.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "engine/ops.h"
#include "engine/parameters.h"
#include "engine/runtime.h"
#include "gguf-convert/safetensors.h"

namespace nibble::golden {

// One step's memory and program on `pieces` equal parts of `elements`.
class SmallMomentStep {
 public:
  SmallMomentStep(Backend& backend, std::int64_t elements, int pieces)
      : runtime_(backend), pieces_(static_cast<std::size_t>(pieces)) {
    auto graph = std::make_unique<Graph>(DType::F32);
    const std::int64_t n = elements / pieces, blocks = n / kParameterBlock;
    const TensorType flat{DType::F32, {n}, {}}, moment{DType::U8, {blocks * kMomentBlockBytes}, {}};
    const Tensor scalars = graph->input("scalars", {DType::F32, {8}, {}});
    const Tensor norm = graph->state("norm", {DType::F64, {1}, {}});
    for (int piece = 0; piece < pieces; ++piece) {
      const std::string at = std::to_string(piece);
      adamw8bit(graph->state("master" + at, flat), graph->state("m" + at, moment),
                graph->state("v" + at, moment), graph->state("grad" + at, flat),
                graph->input("table" + at, {DType::F32, {blocks, 2}, {}}), scalars, norm);
    }
    runtime_.add(std::move(graph));
    runtime_.allocate();
  }

  void run() { runtime_.run(0); }
  void write(const std::string& name, std::span<const std::byte> bytes) {
    runtime_.write(name, bytes);
  }
  // Over all pieces.
  void write_array(const std::string& name, std::span<const std::byte> bytes) {
    const std::size_t part = bytes.size() / pieces_;
    for (std::size_t i = 0; i < pieces_; ++i) {
      runtime_.write(name + std::to_string(i), bytes.subspan(i * part, part));
    }
  }
  template <class T>
  std::vector<T> read_array(const std::string& name, std::size_t count) const {
    std::vector<T> values(count);
    const auto bytes = std::as_writable_bytes(std::span(values));
    const std::size_t part = bytes.size() / pieces_;
    for (std::size_t i = 0; i < pieces_; ++i) {
      runtime_.read(name + std::to_string(i), bytes.subspan(i * part, part));
    }
    return values;
  }
  // Codes of all blocks, then the bytes of their absmax, of a moment of `elements`.
  std::vector<std::byte> read_moment(const std::string& name, std::size_t elements) const {
    const auto block_bytes = static_cast<std::ptrdiff_t>(kMomentBlockBytes);
    const std::vector<std::byte> stored = read_array<std::byte>(
        name, elements / kParameterBlock * static_cast<std::size_t>(block_bytes));
    std::vector<std::byte> codes, absmax;
    for (auto at = stored.begin(); at != stored.end(); at += block_bytes) {
      codes.insert(codes.end(), at, at + kParameterBlock);
      absmax.insert(absmax.end(), at + kParameterBlock, at + block_bytes);
    }
    codes.insert(codes.end(), absmax.begin(), absmax.end());
    return codes;
  }

 private:
  Runtime runtime_;
  std::size_t pieces_;
};

inline void check_adamw8bit(Backend& backend) {
  const SafetensorsFile golden("tests/golden/adamw8bit.safetensors");
  const auto bytes_of = [&](const char* name) {
    const auto* tensor = golden.find(name);
    REQUIRE_MESSAGE(tensor != nullptr, name);
    return tensor->bytes;
  };
  // Step `step` of `steps` in a tensor that has one row for each.
  const auto row = [&](const char* name, std::size_t step) {
    const auto all = bytes_of(name);
    return all.subspan(step * (all.size() / 3), all.size() / 3);
  };
  const std::size_t n = bytes_of("master").size() / sizeof(float);
  for (const int pieces : {1, 2}) {
    CAPTURE(pieces);
    SmallMomentStep step(backend, static_cast<std::int64_t>(n), pieces);
    step.write_array("master", bytes_of("master"));
    step.write_array("table", bytes_of("table"));
    for (std::size_t i = 0; i < 3; ++i) {
      CAPTURE(i);
      step.write("scalars", row("scalars", i));
      step.write("norm", row("norm", i));
      step.write_array("grad", row("grad", i));
      step.run();
      for (const std::string moment : {"m", "v"}) {
        CAPTURE(moment);
        const auto codes = row((moment + ".codes").c_str(), i);
        const auto absmax = row((moment + ".absmax").c_str(), i);
        std::vector<std::byte> wanted(codes.begin(), codes.end());
        wanted.insert(wanted.end(), absmax.begin(), absmax.end());
        const std::vector<std::byte> got = step.read_moment(moment, n);
        const auto first = std::mismatch(got.begin(), got.end(), wanted.begin()).first;
        CHECK_MESSAGE(got == wanted, "first at byte " << (first - got.begin()));
      }
      CHECK(step.read_array<float>("grad", n) == std::vector<float>(n));
    }
    const std::vector<float> master = step.read_array<float>("master", n);
    const auto wanted = bytes_of("master.final");
    CHECK(std::memcmp(master.data(), wanted.data(), wanted.size()) == 0);
  }
}

// A gradient whose square is no F32 is one that is not finite: its element stays, and its 256 can
// still be decoded in the step after.
inline void check_huge_gradient(Backend& backend) {
  constexpr std::size_t n = 4096;
  SmallMomentStep step(backend, n, 1);
  const std::vector<float> master(n, 1.0f), table = {1, 0};
  const std::vector<float> scalars = {0.1f, 0.9f, 0.999f, 1e-8f, 0.1f, 1e-3f, 1, 0};
  const auto raw = [](const std::vector<float>& values) {
    return std::as_bytes(std::span(values));
  };
  step.write_array("master", raw(master));
  step.write_array("table", raw(table));
  step.write("scalars", raw(scalars));
  std::vector<float> grad(n, 1.0f);
  for (const float fifth : {1e20f, 0.0f}) {
    grad[5] = fifth;
    step.write_array("grad", raw(grad));
    step.run();
  }
  // In the second step m = 1.9 times and v = 1.999 times what they were.
  const double wanted = 1 - 0.1 - 0.1 * 1.9 / std::sqrt(1.999);
  const std::vector<float> now = step.read_array<float>("master", n);
  for (std::size_t i = 0; i < n; ++i) {
    if (now[i] != doctest::Approx(i == 5 ? 1.0 : wanted).epsilon(1e-4)) {
      FAIL_CHECK(i << ": " << now[i]);
    }
  }
}

}  // namespace nibble::golden
