// GGUF and safetensors readers against truncated and damaged files. The files are built here with
// the project's writers; real ones are used too where ../shared has them. Run under the address
// and undefined behaviour sanitizers, this covers the headers, the bounds of every tensor and the
// decoders on arbitrary bytes.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "engine/error.h"
#include "engine/quantize.h"
#include "gguf-convert/ggml_types.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/safetensors.h"
#include "tests/fuzz/mutate.h"
#include "tests/unit/scratch.h"

using namespace nibble;
using test::get;
using test::Outcomes;
using test::put;
using test::Scratch;

namespace {

std::vector<std::byte> pattern(std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 37 + i / 256);
  return bytes;
}

// Decodes everything and reads every byte, in pieces so that no buffer grows with the tensor.
void use(const TensorType& type, std::span<const std::byte> data) {
  REQUIRE(static_cast<std::int64_t>(data.size()) == bytes(type));
  unsigned sum = 0;
  for (const std::byte byte : data) sum += std::to_integer<unsigned>(byte);
  volatile unsigned kept = sum;
  (void)kept;
  if (!is_float(type.dtype) && !is_block(type.dtype)) return;
  std::vector<float> piece(1000);
  for (std::int64_t at = 0; at < type.elements(); at += 1000) {
    const auto count = static_cast<std::size_t>(std::min<std::int64_t>(1000, type.elements() - at));
    dequantize(type, data.data(), at, std::span(piece).first(count));
  }
}

void read_gguf(const std::string& path) {
  const GgufFile file(path);
  const std::uint64_t size = std::filesystem::file_size(path);
  for (const GgufTensor& tensor : file.tensors()) {
    REQUIRE(tensor.offset <= size);
    REQUIRE(tensor.bytes.size() <= size - tensor.offset);
    use(tensor.type, tensor.bytes);
  }
  file.string("general.architecture", "");
  file.integer("llama.block_count", 0);
  file.real("llama.rope.freq_base", 0);
  file.strings("tokenizer.ggml.tokens");
  file.reals("tokenizer.ggml.scores");
  file.integers("tokenizer.ggml.token_type");
}

void read_safetensors(const std::string& path) {
  const SafetensorsFile file(path);
  const std::uint64_t size = std::filesystem::file_size(path);
  for (const SafetensorsTensor& tensor : file.tensors()) {
    REQUIRE(tensor.offset <= size);
    REQUIRE(tensor.bytes.size() <= size - tensor.offset);
    use(tensor.type, tensor.bytes);
  }
}

std::string small_gguf(const Scratch& scratch) {
  const std::vector<std::string> tokens = {"<unk>", "<s>", "</s>", "a", "b", "ab"};
  const std::vector<float> scores = {0, 0, 0, -1, -2, -3};
  const std::vector<std::int32_t> types = {2, 3, 3, 1, 1, 1};
  GgufWriter writer(scratch / "seed.gguf");
  writer.set_string("general.architecture", "llama");
  writer.set_u32("general.alignment", 32);
  writer.set_u64("llama.block_count", 2);
  writer.set_f32("llama.rope.freq_base", 10000);
  writer.set_f64("nibble.f64", 0.5);
  writer.set_i32("nibble.i32", -1);
  writer.set_bool("tokenizer.ggml.add_bos_token", true);
  writer.set_strings("tokenizer.ggml.tokens", tokens);
  writer.set_f32s("tokenizer.ggml.scores", scores);
  writer.set_i32s("tokenizer.ggml.token_type", types);
  std::vector<TensorType> all;
  for (int d = 0; d <= static_cast<int>(DType::Q6_K); ++d) {
    const auto dtype = static_cast<DType>(d);
    if (!ggml_from_dtype(dtype)) continue;
    all.push_back({dtype, {2, info(dtype).block}, {}});
    writer.add("blk.0." + std::string(name(dtype)), all.back());
  }
  writer.begin();
  for (const TensorType& type : all) writer.write(pattern(static_cast<std::size_t>(bytes(type))));
  writer.finish();
  return get(scratch / "seed.gguf");
}

std::string small_safetensors(const Scratch& scratch, const std::string& prefix) {
  SafetensorsWriter writer(scratch / "seed.safetensors");
  std::vector<TensorType> all;
  for (const DType dtype : {DType::F64, DType::I64, DType::F32, DType::I32, DType::F16, DType::BF16,
                            DType::I8, DType::U8}) {
    all.push_back({dtype, {3, 4}, {}});
    writer.add(prefix + std::string(name(dtype)) + ".weight", all.back());
  }
  writer.begin();
  for (const TensorType& type : all) writer.write(pattern(static_cast<std::size_t>(bytes(type))));
  writer.finish();
  return get(scratch / "seed.safetensors");
}

std::size_t safetensors_header(const std::string& bytes) {
  std::uint64_t size = 0;
  std::copy_n(bytes.data(), sizeof size, reinterpret_cast<char*>(&size));
  return sizeof size + static_cast<std::size_t>(size);
}

std::size_t gguf_header(const Scratch& scratch, const std::string& bytes) {
  put(scratch / "header.gguf", bytes);
  return static_cast<std::size_t>(GgufFile(scratch / "header.gguf").tensors().front().offset);
}

void expect_some_of_each(const Outcomes& outcomes) {
  MESSAGE(outcomes.read << " read, " << outcomes.refused << " refused");
  CHECK(outcomes.read > 0);
  CHECK(outcomes.refused > 0);
}

}  // namespace

TEST_CASE("GGUF: every prefix of a small file is refused") {
  const Scratch scratch;
  const std::string bytes = small_gguf(scratch);
  const std::string path = scratch / "f.gguf";
  // The padding after the last tensor carries nothing and may be missing.
  const GgufFile file(scratch / "seed.gguf");
  const GgufTensor& last = file.tensors().back();
  const auto needed = static_cast<std::size_t>(last.offset) + last.bytes.size();
  const Outcomes outcomes =
      test::read_prefixes(path, bytes.substr(0, needed), needed, 0, 1, read_gguf);
  CHECK(outcomes.read == 0);
  CHECK(outcomes.refused == static_cast<int>(needed));
}

TEST_CASE("GGUF: 2000 mutations") {
  const Scratch scratch;
  const std::string bytes = small_gguf(scratch);
  expect_some_of_each(test::read_mutations(scratch / "f.gguf", bytes, gguf_header(scratch, bytes),
                                           2000, 2, read_gguf));
}

TEST_CASE("safetensors: every prefix of a small file is refused") {
  const Scratch scratch;
  const std::string bytes = small_safetensors(scratch, "model.");
  const Outcomes outcomes =
      test::read_prefixes(scratch / "f", bytes, bytes.size(), 0, 3, read_safetensors);
  CHECK(outcomes.read == 0);
  CHECK(outcomes.refused == static_cast<int>(bytes.size()));
}

TEST_CASE("safetensors: 2000 mutations") {
  const Scratch scratch;
  const std::string bytes = small_safetensors(scratch, "model.");
  expect_some_of_each(test::read_mutations(scratch / "f", bytes, safetensors_header(bytes), 2000, 4,
                                           read_safetensors));
}

TEST_CASE("safetensors: prefixes and 2000 mutations of an index") {
  const Scratch scratch;
  put(scratch / "a.safetensors", small_safetensors(scratch, "a."));
  put(scratch / "b.safetensors", small_safetensors(scratch, "b."));
  const std::string index =
      R"({"metadata": {"total_size": 1234}, "weight_map": {"a.F32.weight": "a.safetensors", )"
      R"("a.F16.weight": "a.safetensors", "b.F32.weight": "b.safetensors"}})";
  const auto reader = [&](const std::string&) {
    const SafetensorsDirectory directory(scratch.path());
    for (const SafetensorsTensor* tensor : directory.tensors()) use(tensor->type, tensor->bytes);
  };
  const std::string path = scratch / "model.safetensors.index.json";
  CHECK(test::read_prefixes(path, index, index.size(), 0, 5, reader).read == 0);
  expect_some_of_each(test::read_mutations(path, index, index.size(), 2000, 6, reader));
}

TEST_CASE("real files: every header prefix, 1000 longer ones, 2000 mutations") {
  const std::string folder = "../shared/models/stories260K/";
  if (!std::filesystem::exists(folder)) {
    MESSAGE("skipped: ../shared/models/stories260K is absent");
    return;
  }
  const Scratch scratch;
  const std::string gguf = get(folder + "stories260K-q4_0.gguf");
  const std::size_t gguf_bytes = gguf_header(scratch, gguf);
  CHECK(test::read_prefixes(scratch / "f.gguf", gguf, gguf_bytes, 1000, 7, read_gguf).read <= 1);
  expect_some_of_each(
      test::read_mutations(scratch / "f.gguf", gguf, gguf_bytes, 2000, 8, read_gguf));
  const std::string tensors = get(folder + "hf/model.safetensors");
  const std::size_t header = safetensors_header(tensors);
  const std::string path = scratch / "f.safetensors";
  CHECK(test::read_prefixes(path, tensors, header, 1000, 9, read_safetensors).read == 0);
  expect_some_of_each(test::read_mutations(path, tensors, header, 2000, 10, read_safetensors));
}
