// safetensors: writing and reading back, shards, and the rules of the header.
#include "gguf-convert/safetensors.h"

#include <doctest/doctest.h>

#include <cstring>
#include <functional>

#include "engine/error.h"
#include "gguf-convert/gguf.h"
#include "tests/unit/scratch.h"

using namespace nibble;
using test::get;
using test::put;
using test::Scratch;

namespace {

std::string with_header(const std::string& header, const std::string& data) {
  const std::uint64_t size = header.size();
  std::string bytes(sizeof size, '\0');
  std::memcpy(bytes.data(), &size, sizeof size);
  return bytes + header + data;
}

std::string refusal(const std::string& bytes) {
  const Scratch scratch;
  put(scratch / "f.safetensors", bytes);
  try {
    const SafetensorsFile file(scratch / "f.safetensors");
  } catch (const FormatError& error) {
    CHECK(error.file == scratch / "f.safetensors");
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

void write_shard(const std::string& path, const std::vector<std::string>& names) {
  SafetensorsWriter writer(path);
  for (const std::string& name : names) writer.add(name, {DType::F32, {2, 3}, {}});
  writer.begin();
  for (std::size_t i = 0; i < names.size(); ++i) {
    writer.write(pattern(24, static_cast<unsigned>(names[i].size())));
  }
  writer.finish();
}

}  // namespace

TEST_CASE("every dtype survives writing and reading") {
  const Scratch scratch;
  const std::string path = scratch / "m.safetensors";
  std::vector<std::pair<std::string, TensorType>> wanted;
  for (const DType dtype : {DType::F64, DType::I64, DType::F32, DType::I32, DType::F16, DType::BF16,
                            DType::I8, DType::U8}) {
    const std::string stem(name(dtype));
    wanted.push_back({stem + ".matrix", {dtype, {3, 5}, {}}});
    wanted.push_back({stem + ".empty", {dtype, {4, 0}, {}}});
    wanted.push_back({stem + ".scalar \"quoted\" \n ü", {dtype, {}, {}}});
  }
  SafetensorsWriter writer(path, {{"format", "pt"}, {"note", "a \"quote\""}});
  for (const auto& [tensor, type] : wanted) writer.add(tensor, type);
  const std::uint64_t promised = writer.file_bytes();
  writer.begin();
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const auto data =
        pattern(static_cast<std::size_t>(bytes(wanted[i].second)), static_cast<unsigned>(i));
    writer.write(std::span(data).first(data.size() / 2));
    writer.write(std::span(data).subspan(data.size() / 2));
  }
  writer.finish();
  CHECK(std::filesystem::file_size(path) == promised);
  CHECK(scratch.entries() == 1);

  const SafetensorsFile file(path);
  CHECK(file.metadata().at("format") == "pt");
  CHECK(file.metadata().at("note") == "a \"quote\"");
  REQUIRE(file.tensors().size() == wanted.size());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const SafetensorsTensor* tensor = file.find(wanted[i].first);
    REQUIRE(tensor != nullptr);
    CHECK(tensor->type == wanted[i].second);
    CHECK(tensor->file == path);
    const auto data = pattern(tensor->bytes.size(), static_cast<unsigned>(i));
    CHECK(std::equal(data.begin(), data.end(), tensor->bytes.begin(), tensor->bytes.end()));
    CHECK(reinterpret_cast<std::uintptr_t>(tensor->bytes.data()) %
              static_cast<std::uintptr_t>(info(tensor->type.dtype).block_bytes) ==
          0);
  }
  CHECK(file.find("absent") == nullptr);
}

TEST_CASE("rules of the header") {
  const std::string entry = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const std::string eight(8, '\1');
  CHECK(refusal(with_header(R"({"x":)" + entry + "}", eight)).empty());
  CHECK(refusal(with_header("{}", "")).empty());
  CHECK(refusal(with_header(R"({"x":)" + entry + "}    ", eight)).empty());
  check_refused("1234567", "at least 8");
  check_refused(std::string(8, '\xff'), "announced");
  check_refused(with_header("", ""), "not JSON");
  check_refused(with_header("[]", ""), "not an object");
  check_refused(with_header("{\"x\"", ""), "not JSON");
  check_refused(with_header("{\"x\":1}", ""), "is not an object");
  check_refused(with_header("{\"\xff\":1}", ""), "not JSON");
  check_refused(with_header(R"({"x":1e999})", ""), "not JSON");
  check_refused(with_header(R"({"x":)" + std::string(100000, '[') + "}", ""), "nested deeper");
  check_refused(with_header(R"({"x":)" + entry + R"(,"x":)" + entry + "}", eight), "twice");
  check_refused(with_header(R"({"x":{"dtype":"F32","dtype":"F32"}})", ""), "twice");
  check_refused(with_header(R"({"__metadata__":{"a":1}})", ""), "not a string");
  check_refused(with_header(R"({"__metadata__":[]})", ""), "not an object");
  check_refused(with_header(R"({"x":)" + entry + "}", eight.substr(1)), "truncated");
  check_refused(with_header(R"({"x":)" + entry + "}", eight + "\1"), "the tensors end here");
  const auto tensor = [&](const std::string& dtype, const std::string& shape,
                          const std::string& offsets) {
    return with_header(R"({"x":{"dtype":")" + dtype + R"(","shape":)" + shape +
                           R"(,"data_offsets":)" + offsets + "}}",
                       eight);
  };
  check_refused(tensor("F32", "[3]", "[0,8]"), "does not fill");
  check_refused(tensor("F32", "[4611686018427387904]", "[0,8]"), "does not fill");
  check_refused(tensor("F32", "[9223372036854775808]", "[0,8]"), "extent");
  check_refused(tensor("F32", "[4294967296,4294967296]", "[0,8]"), "2^62");
  check_refused(tensor("F32", "[2]", "[8,0]"), "data_offsets");
  check_refused(tensor("F32", "[2]", "[0]"), "data_offsets");
  check_refused(tensor("F32", "[2]", "[-8,0]"), "whole numbers");
  check_refused(tensor("F32", "[2.0]", "[0,8]"), "whole numbers");
  check_refused(tensor("F32", "\"2\"", "[0,8]"), "array");
  check_refused(tensor("F32", "[2]", "[0,18446744073709551615]"), "truncated");
  check_refused(tensor("F32", "[1]", "[4,8]"), "wanted byte");
  check_refused(with_header(R"({"x":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
                            R"("y":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                            eight),
                "holes or overlap");
}

TEST_CASE("a dtype that cannot be read is named") {
  const Scratch scratch;
  put(scratch / "f",
      with_header(R"({"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}})", "\1"));
  CHECK_THROWS_WITH_AS(SafetensorsFile(scratch / "f"), doctest::Contains("F8_E4M3"), Unsupported);
  put(scratch / "f",
      with_header(R"({"x":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[0,1]}})", "\1"));
  CHECK_THROWS_WITH_AS(SafetensorsFile(scratch / "f"), doctest::Contains("dimensions"),
                       Unsupported);
}

TEST_CASE("a directory finds every tensor in whatever shard it lies") {
  const Scratch scratch;
  CHECK_FALSE(has_safetensors(scratch.path()));
  CHECK_THROWS_WITH_AS(SafetensorsDirectory(scratch.path()), doctest::Contains("neither"), Error);
  write_shard(scratch / "a.safetensors", {"one.weight", "two.weight.absmax"});
  write_shard(scratch / "b.safetensors", {"two.weight", "one.weight.absmax"});
  const auto index = [&](const std::string& map) {
    put(scratch / "model.safetensors.index.json",
        R"({"metadata":{"total_size":96},"weight_map":)" + map + "}");
  };
  const auto fails = [&](const std::string& map, const char* part) {
    index(map);
    CHECK_THROWS_WITH_AS(SafetensorsDirectory(scratch.path()), doctest::Contains(part),
                         FormatError);
  };
  index(R"({"one.weight":"a.safetensors","two.weight":"b.safetensors"})");
  CHECK(has_safetensors(scratch.path()));
  SafetensorsDirectory first(scratch.path());
  const SafetensorsDirectory directory(std::move(first));
  CHECK(directory.tensors().size() == 4);
  REQUIRE(directory.find("two.weight.absmax") != nullptr);
  CHECK(directory.find("two.weight.absmax")->file == scratch / "a.safetensors");
  CHECK(directory.find("two.weight")->file == scratch / "b.safetensors");
  const auto data = pattern(24, 10);
  CHECK(std::equal(data.begin(), data.end(), directory.find("two.weight")->bytes.begin()));
  CHECK(directory.find("three") == nullptr);

  fails(R"({"one.weight":"b.safetensors"})", "should be in");
  fails(R"({"none":"a.safetensors"})", "should be in");
  fails(R"({"one.weight":"../a.safetensors"})", "no file name");
  fails(R"({"one.weight":7})", "no file name");
  fails("[]", "weight_map");
  index(R"({"one.weight":"c.safetensors"})");
  CHECK_THROWS_AS(SafetensorsDirectory(scratch.path()), DeviceError);
  write_shard(scratch / "b.safetensors", {"one.weight"});
  fails(R"({"one.weight":"a.safetensors","x":"b.safetensors"})", "is also in");
  write_shard(scratch / "model.safetensors", {"alone"});
  CHECK(SafetensorsDirectory(scratch.path()).tensors().size() == 1);
}

TEST_CASE("the writer refuses what would not be a good file, and leaves none") {
  const Scratch scratch;
  const std::vector<std::byte> four(4), eight(8);
  const auto attempt = [&](const std::function<void(SafetensorsWriter&)>& body) {
    SafetensorsWriter writer(scratch / "w.safetensors");
    body(writer);
  };
  CHECK_THROWS_AS(attempt([](auto& w) { w.add("x", {DType::NF4, {64}, {}}); }), Unsupported);
  CHECK_THROWS_AS(attempt([](auto& w) { w.add("x", {DType::Q8_0, {64}, {}}); }), Unsupported);
  CHECK_THROWS_AS(attempt([](auto& w) { w.add("__metadata__", {DType::F32, {1}, {}}); }), Error);
  CHECK_THROWS_AS(attempt([](auto& w) {
                    w.add("\xff", {DType::F32, {1}, {}});
                    w.begin();
                  }),
                  Error);
  CHECK_THROWS_AS(attempt([](auto& w) {
                    w.add("x", {DType::F32, {1}, {}});
                    w.add("x", {DType::F32, {1}, {}});
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
  CHECK(scratch.entries() == 0);
}

TEST_CASE("stories260K in both layouts holds the same norms and embeddings") {
  const std::string folder = "../shared/models/stories260K/";
  if (!std::filesystem::exists(folder)) {
    MESSAGE("skipped: ../shared/models/stories260K is absent");
    return;
  }
  const SafetensorsDirectory directory(folder + "hf");
  const GgufFile gguf(folder + "stories260K-f32.gguf");
  const auto same = [&](const char* hf, const char* name) {
    const SafetensorsTensor* a = directory.find(hf);
    const GgufTensor* b = gguf.find(name);
    REQUIRE(a != nullptr);
    REQUIRE(b != nullptr);
    CHECK(a->type == b->type);
    CHECK(std::equal(a->bytes.begin(), a->bytes.end(), b->bytes.begin(), b->bytes.end()));
  };
  same("model.embed_tokens.weight", "token_embd.weight");
  same("model.norm.weight", "output_norm.weight");
  same("model.layers.4.mlp.down_proj.weight", "blk.4.ffn_down.weight");
}
