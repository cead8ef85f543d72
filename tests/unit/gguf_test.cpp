// GGUF: what the writer writes the reader reads, foreign files read, and every rule of the layout
// is enforced with a message that names the place.
#include "gguf-convert/gguf.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numbers>

#include "engine/error.h"
#include "gguf-convert/ggml_types.h"
#include "tests/unit/scratch.h"

using namespace nibble;
using test::get;
using test::put;
using test::Scratch;

namespace {

template <typename T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

std::string text(const std::string& value) { return raw<std::uint64_t>(value.size()) + value; }

std::string head(std::uint64_t tensors, std::uint64_t values, std::uint32_t version = 3) {
  return "GGUF" + raw(version) + raw(tensors) + raw(values);
}

std::string tensor_info(const std::string& name, const std::vector<std::uint64_t>& ne,
                        std::uint32_t type, std::uint64_t offset) {
  std::string bytes = text(name) + raw(static_cast<std::uint32_t>(ne.size()));
  for (const std::uint64_t extent : ne) bytes += raw(extent);
  return bytes + raw(type) + raw(offset);
}

std::string padded(std::string bytes, std::size_t alignment = 32) {
  bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
  return bytes;
}

// The message of the FormatError that reading `bytes` throws, or "" when it reads.
std::string refusal(const std::string& bytes) {
  const Scratch scratch;
  put(scratch / "f.gguf", bytes);
  try {
    const GgufFile file(scratch / "f.gguf");
  } catch (const FormatError& error) {
    CHECK(error.file == scratch / "f.gguf");
    CHECK(error.offset <= bytes.size());
    return error.what();
  }
  return "";
}

void check_refused(const std::string& bytes, const std::string& part) {
  const std::string message = refusal(bytes);
  CAPTURE(message);
  CHECK(message.find(part) != std::string::npos);
}

std::vector<std::byte> pattern(std::size_t size, unsigned seed) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 31 + seed);
  return bytes;
}

}  // namespace

TEST_CASE("metadata of every kind survives writing and reading") {
  const Scratch scratch;
  const std::string path = scratch / "m.gguf";
  const std::vector<std::string> words = {"", "a", std::string("nul\0inside", 10), "ü▁"};
  const std::vector<float> reals = {0.0f, -1.5f, std::numeric_limits<float>::infinity()};
  const std::vector<std::int32_t> small = {-1, 0, 2147483647};
  const std::vector<std::int64_t> large = {std::numeric_limits<std::int64_t>::min(), 7};
  GgufWriter writer(path);
  writer.set_u32("u32", 4294967295u);
  writer.set_u64("u64", 1ull << 62);
  writer.set_i32("i32", -5);
  writer.set_f32("f32", 0.1f);
  writer.set_f64("f64", std::numbers::pi);
  writer.set_bool("yes", true);
  writer.set_bool("no", false);
  writer.set_string("s", "text");
  writer.set_strings("words", words);
  writer.set_f32s("reals", reals);
  writer.set_i32s("small", small);
  writer.set_i64s("large", large);
  writer.set_strings("none", {});
  writer.begin();
  writer.finish();
  CHECK(std::filesystem::file_size(path) == writer.file_bytes());

  const GgufFile file(path);
  CHECK(file.tensors().empty());
  CHECK(file.metadata().size() == 13);
  CHECK(file.metadata()[1].first == "u64");
  CHECK(file.integer("u32", 0) == 4294967295);
  CHECK(file.integer("u64", 0) == std::int64_t{1} << 62);
  CHECK(file.integer("i32", 0) == -5);
  CHECK(file.real("f32", 0) == static_cast<double>(0.1f));
  CHECK(file.real("f64", 0) == std::numbers::pi);
  CHECK(file.boolean("yes", false));
  CHECK_FALSE(file.boolean("no", true));
  CHECK(file.string("s", "") == "text");
  CHECK(*file.strings("words") == words);
  CHECK(*file.reals("reals") == std::vector<double>(reals.begin(), reals.end()));
  CHECK(*file.integers("small") == std::vector<std::int64_t>(small.begin(), small.end()));
  CHECK(*file.integers("large") == large);
  CHECK(file.strings("none")->empty());
  CHECK(file.has("none"));
  CHECK_FALSE(file.has("other"));
  CHECK(file.integer("other", 42) == 42);
  CHECK(file.string("other", "fallback") == "fallback");
  CHECK(file.strings("other") == nullptr);
  CHECK_THROWS_WITH_AS(file.string("u32", ""), doctest::Contains("is an integer, wanted a string"),
                       FormatError);
  CHECK_THROWS_WITH_AS(file.reals("words"), doctest::Contains("array of strings"), FormatError);
  CHECK_THROWS_AS(file.integer("f32", 0), FormatError);
}

TEST_CASE("tensors of every type and rank survive, whatever the pieces and the alignment") {
  for (const std::uint32_t alignment : {8u, 32u, 4096u}) {
    const Scratch scratch;
    const std::string path = scratch / "t.gguf";
    std::vector<std::pair<std::string, TensorType>> wanted;
    for (int d = 0; d <= static_cast<int>(DType::Q6_K); ++d) {
      const auto dtype = static_cast<DType>(d);
      if (!ggml_from_dtype(dtype)) continue;
      const int block = info(dtype).block;
      const std::string stem(name(dtype));
      wanted.push_back({stem + ".row", {dtype, {3 * block}, {}}});
      wanted.push_back({stem + ".matrix", {dtype, {5, block}, {}}});
      wanted.push_back({stem + ".empty", {dtype, {0, block}, {}}});
      wanted.push_back({stem + ".four", {dtype, {2, 1, 3, 2 * block}, {}}});
    }
    wanted.push_back({"scalar", {DType::F32, {}, {}}});
    GgufWriter writer(path, alignment);
    writer.set_string("general.architecture", "llama");
    for (const auto& [tensor, type] : wanted) writer.add(tensor, type);
    const std::uint64_t promised = writer.file_bytes();
    writer.begin();
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const auto data =
          pattern(static_cast<std::size_t>(bytes(wanted[i].second)), static_cast<unsigned>(i));
      const std::size_t cut = data.size() / 3;
      writer.write(std::span(data).first(cut));
      writer.write({});
      writer.write(std::span(data).subspan(cut));
    }
    writer.finish();
    CHECK(std::filesystem::file_size(path) == promised);

    const GgufFile file(path);
    REQUIRE(file.tensors().size() == wanted.size());
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const GgufTensor& tensor = file.tensors()[i];
      CHECK(tensor.name == wanted[i].first);
      CHECK(tensor.type == wanted[i].second);
      CHECK(tensor.offset % alignment == 0);
      const auto data = pattern(tensor.bytes.size(), static_cast<unsigned>(i));
      CHECK(tensor.bytes.size() == static_cast<std::size_t>(bytes(wanted[i].second)));
      CHECK(std::equal(data.begin(), data.end(), tensor.bytes.begin()));
      CHECK(file.find(tensor.name) == &tensor);
    }
    CHECK(file.find("absent") == nullptr);
  }
}

TEST_CASE("the writer refuses what would not be a good file, and leaves none") {
  const Scratch scratch;
  const std::string path = scratch / "w.gguf";
  const std::vector<std::byte> four(4), eight(8);
  const auto attempt = [&](const std::function<void(GgufWriter&)>& body) {
    GgufWriter writer(path);
    body(writer);
  };
  CHECK_THROWS_AS(attempt([](auto& w) { w.add("x", {DType::NF4, {64}, {}}); }), Unsupported);
  CHECK_THROWS_AS(attempt([](auto& w) { w.add("x", {DType::U8, {64}, {}}); }), Unsupported);
  CHECK_THROWS_AS(attempt([](auto& w) { w.add("x", {DType::Q8_0, {33}, {}}); }), ShapeError);
  CHECK_THROWS_AS(attempt([](auto& w) {
                    w.add(std::string(64, 'n'), {DType::F32, {1}, {}});
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([](auto& w) { w.set_u32("", 1); }), Error);
  CHECK_THROWS_AS(attempt([](auto& w) {
                    w.set_u32("k", 1);
                    w.set_bool("k", true);
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([](auto& w) {
                    w.add("x", {DType::F32, {1}, {}});
                    w.add("x", {DType::F32, {1}, {}});
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([&](auto& w) {
                    w.add("x", {DType::F32, {1}, {}});
                    w.write(four);
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([&](auto& w) {
                    w.add("x", {DType::F32, {1}, {}});
                    w.begin();
                    w.write(eight);
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([&](auto& w) {
                    w.add("x", {DType::F32, {2}, {}});
                    w.begin();
                    w.write(four);
                    w.finish();
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([](auto& w) { w.finish(); }), Error);
  CHECK_THROWS_AS(GgufWriter(path, 24), Error);
  CHECK(scratch.entries() == 0);
}

TEST_CASE("rules of the preamble and of metadata") {
  check_refused("", "truncated");
  check_refused("GGML" + std::string(20, '\0'), "not a GGUF file");
  check_refused("GGUF" + std::string("\0\0\0\3", 4) + std::string(16, '\0'), "big-endian");
  check_refused(head(0, 0, 1), "version 1");
  check_refused(head(0, 0, 4), "version 4");
  CHECK(refusal(head(0, 0, 2)).empty());
  CHECK(refusal(head(0, 0)).empty());
  check_refused(head(1ull << 60, 0), "do not fit");
  check_refused(head(0, ~0ull), "do not fit");
  const auto value = [](const std::string& key, std::uint32_t type, const std::string& bytes) {
    return text(key) + raw(type) + bytes;
  };
  const std::string pad(64, '\0');
  check_refused(head(0, 1) + value("", 4, raw(1)) + pad, "key is empty");
  check_refused(head(0, 1) + value("k", 13, raw(1)) + pad, "unknown type 13");
  check_refused(head(0, 1) + value("k", 7, "\2") + pad, "wanted 0 or 1");
  check_refused(head(0, 1) + value("k", 10, raw(1ull << 63)), "past 2^63");
  check_refused(head(0, 2) + value("k", 4, raw(1)) + value("k", 4, raw(1)), "appears twice");
  check_refused(head(0, 1) + value("k", 8, raw(1ull << 40)), "truncated");
  check_refused(head(0, 1) + value("k", 9, raw(9u) + raw(0ull)), "nested arrays");
  check_refused(head(0, 1) + value("k", 9, raw(99u) + raw(0ull)), "element type 99");
  check_refused(head(0, 1) + value("k", 9, raw(0u) + raw(~0ull)), "array of");
  check_refused(head(0, 1) + value("k", 9, raw(12u) + raw(1ull << 61)), "array of");
  for (const std::uint32_t alignment : {0u, 3u, 4u, 48u, 1u << 31}) {
    check_refused(head(0, 1) + value("general.alignment", 4, raw(alignment)), "power of two");
  }
  check_refused(head(0, 1) + value("general.alignment", 8, text("32")), "wanted an integer");
}

TEST_CASE("rules of tensors") {
  const std::string data(64, '\1');
  const auto one = [&](const std::string& info, const std::string& bytes) {
    return padded(head(1, 0) + info) + bytes;
  };
  CHECK(refusal(one(tensor_info("x", {4}, 0, 0), data)).empty());
  CHECK(refusal(one(tensor_info("x", {4}, 0, 0), data.substr(0, 16))).empty());
  check_refused(one(tensor_info("x", {4}, 0, 0), data.substr(0, 15)), "truncated");
  check_refused(one(tensor_info("x", {4}, 0, 32), data), "has offset 32, wanted 0");
  check_refused(one(tensor_info("x", {1, 1, 1, 1, 1}, 0, 0), data), "5 dimensions");
  check_refused(one(tensor_info("x", {1ull << 63}, 0, 0), data), "extent");
  check_refused(one(tensor_info("x", {1ull << 62}, 0, 0), data), "larger than the file");
  check_refused(one(tensor_info("x", {1ull << 62}, 28, 0), data), "larger than the file");
  check_refused(one(tensor_info("x", {1ull << 40, 1ull << 40}, 0, 0), data), "2^62");
  check_refused(one(tensor_info("x", {33}, 8, 0), data), "wanted a multiple of 32");
  check_refused(one(tensor_info("", {4}, 0, 0), data), "wanted 1 to 63");
  check_refused(one(tensor_info(std::string(64, 'n'), {4}, 0, 0), data), "wanted 1 to 63");
  CHECK(refusal(one(tensor_info(std::string(63, 'n'), {4}, 0, 0), data)).empty());
  check_refused(
      padded(head(2, 0) + tensor_info("x", {4}, 0, 0) + tensor_info("x", {4}, 0, 32)) + data,
      "appears twice");
  check_refused(
      padded(head(2, 0) + tensor_info("x", {4}, 0, 0) + tensor_info("y", {4}, 0, 16)) + data,
      "wanted 32");
}

TEST_CASE("a tensor type that cannot be read is named with those that can") {
  const Scratch scratch;
  for (const auto& [id, shown] : {std::pair(20u, "IQ4_NL (type 20)"), std::pair(99u, "type 99")}) {
    put(scratch / "f.gguf",
        padded(head(1, 0) + tensor_info("blk.0.x", {32}, id, 0)) + std::string(64, '\0'));
    CHECK_THROWS_WITH_AS(GgufFile(scratch / "f.gguf"), doctest::Contains(shown), Unsupported);
    CHECK_THROWS_WITH_AS(GgufFile(scratch / "f.gguf"), doctest::Contains("blk.0.x"), Unsupported);
    CHECK_THROWS_WITH_AS(GgufFile(scratch / "f.gguf"), doctest::Contains("Q6_K"), Unsupported);
  }
}

TEST_CASE("stories260K reads, and rewriting it gives the same tensors") {
  const std::string folder = "../shared/models/stories260K/";
  if (!std::filesystem::exists(folder)) {
    MESSAGE("skipped: ../shared/models/stories260K is absent");
    return;
  }
  for (const char* kind : {"f32", "f16", "q8_0", "q4_0"}) {
    const GgufFile file(folder + "stories260K-" + kind + ".gguf");
    CHECK(file.string("general.architecture", "") == "llama");
    CHECK(file.integer("llama.block_count", 0) == 5);
    CHECK(file.strings("tokenizer.ggml.tokens")->size() == 512);
    REQUIRE(file.find("token_embd.weight") != nullptr);
    CHECK(file.find("token_embd.weight")->type.shape == Shape{512, 64});
    const Scratch scratch;
    GgufWriter writer(scratch / "copy.gguf");
    for (const GgufTensor& tensor : file.tensors()) writer.add(tensor.name, tensor.type);
    writer.begin();
    for (const GgufTensor& tensor : file.tensors()) writer.write(tensor.bytes);
    writer.finish();
    const GgufFile copy(scratch / "copy.gguf");
    REQUIRE(copy.tensors().size() == file.tensors().size());
    for (std::size_t i = 0; i < file.tensors().size(); ++i) {
      const GgufTensor &a = file.tensors()[i], &b = copy.tensors()[i];
      CHECK(a.name == b.name);
      CHECK(a.type == b.type);
      CHECK(std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end()));
    }
  }
  const GgufFile vocabulary("../shared/vectors/vocab/ggml-vocab-gpt-2.gguf");
  CHECK(vocabulary.tensors().empty());
  CHECK(vocabulary.strings("tokenizer.ggml.merges")->size() == 50000);
}
