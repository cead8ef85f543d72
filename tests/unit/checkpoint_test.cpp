#include "gguf-convert/checkpoint.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/philox.h"
#include "engine/quantize.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/names.h"
#include "gguf-convert/safetensors.h"
#include "tests/unit/scratch.h"
#include "tests/unit/shared_data.h"
#include "tests/unit/tiny_checkpoint.h"

using namespace nibble;
using test::kTinyConfig;
using test::Scratch;
using test::values_of;

namespace {

// A GGUF file of the tiny config with every tensor F32 zeros, changed by `edit` first.
template <class Edit>
std::string write_model(const Scratch& scratch, Edit&& edit) {
  ModelConfig config = config_from_json(kTinyConfig, "tiny");
  config.rope_style = RopeStyle::adjacent;
  std::vector<TensorSpec> specs = model_tensors(config);
  edit(specs);
  const std::string path = scratch / "model.gguf";
  GgufWriter writer(path);
  write_config(config, writer);
  for (const TensorSpec& spec : specs) writer.add(spec.name, {DType::F32, spec.shape, {}});
  writer.begin();
  for (const TensorSpec& spec : specs) {
    const std::vector<std::byte> zeros(static_cast<std::size_t>(4 * spec.shape.elements()));
    writer.write(zeros);
  }
  writer.finish();
  return path;
}

std::string message_of(const std::string& source) {
  try {
    open_checkpoint(source);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("names translate both ways and know their kind") {
  const ModelConfig config = config_from_json(kTinyConfig, "tiny");
  for (const TensorSpec& spec : model_tensors(config)) {
    const auto hf = hf_name(spec.name);
    REQUIRE(hf.has_value());
    CHECK(gguf_name(*hf) == spec.name);
  }
  CHECK(hf_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight");
  CHECK(gguf_name("lm_head.weight") == "output.weight");
  CHECK(gguf_name("model.layers.3.mlp.down_proj") == "blk.3.ffn_down");
  for (const char* bad : {"blk.01.attn_q.weight", "blk..attn_q.weight", "blk.1.attn_z.weight",
                          "blk.9999999.attn_q.weight", "blk.-1.attn_q.weight", "", ".weight"}) {
    CHECK_FALSE(hf_name(bad).has_value());
  }
  CHECK(is_decoder_linear("blk.0.ffn_up.weight"));
  CHECK_FALSE(is_decoder_linear("blk.0.ffn_norm.weight"));
  CHECK_FALSE(is_decoder_linear("output.weight"));
  CHECK(has_rope_rows("blk.7.attn_k.weight"));
  CHECK_FALSE(has_rope_rows("blk.7.attn_v.weight"));
}

TEST_CASE("RoPE row orders are llama.cpp's and inverse to each other") {
  const std::int64_t adjacent[] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
  for (std::int64_t row = 0; row < 16; ++row) {
    const std::int64_t from = rope_source_row(row, 8, RopeStyle::half, RopeStyle::adjacent);
    CHECK(from == adjacent[row]);
    CHECK(rope_source_row(from, 8, RopeStyle::adjacent, RopeStyle::half) == row);
    CHECK(rope_source_row(row, 8, RopeStyle::half, RopeStyle::half) == row);
  }
}

TEST_CASE("a model is the same from a Hugging Face directory and from GGUF") {
  const std::string directory = test::shared("models/stories260K/");
  SKIP_WITHOUT(directory);
  const auto hf = open_checkpoint(directory + "hf");
  const auto gguf = open_checkpoint(directory + "stories260K-f32.gguf");
  REQUIRE(hf->tensors().size() == gguf->tensors().size());
  for (const Checkpoint::Tensor& tensor : hf->tensors()) {
    const Checkpoint::Tensor* other = gguf->find(tensor.name);
    REQUIRE(other != nullptr);
    std::vector<float> a = values_of(*hf, tensor), b = values_of(*gguf, *other);
    if (has_rope_rows(tensor.name)) {
      std::vector<float> reordered(a.size());
      reorder_rope_rows(std::as_bytes(std::span<const float>(a)),
                        std::as_writable_bytes(std::span(reordered)), 4 * tensor.type.shape.cols(),
                        hf->config().head_dim, RopeStyle::half, RopeStyle::adjacent);
      CHECK_FALSE(a == b);
      a = reordered;
    }
    CHECK(a == b);
    REQUIRE(gguf->mapped(*other).size() == b.size() * 4);
    CHECK(std::memcmp(gguf->mapped(*other).data(), b.data(), b.size() * 4) == 0);
  }
  CHECK(gguf->has_tokenizer());
  CHECK(gguf->tokenizer().tokens.size() == 512);
  CHECK_FALSE(hf->has_tokenizer());
  CHECK_THROWS_AS(hf->tokenizer(), Unsupported);
}

TEST_CASE("GGUF: missing, misshapen and foreign tensors are refused by name") {
  Scratch scratch;
  CHECK(message_of(write_model(scratch, [](auto&) {})).empty());
  const std::string missing =
      message_of(write_model(scratch, [](auto& specs) { specs.erase(specs.begin() + 3); }));
  CHECK(missing.find("blk.0.attn_k.weight is missing") != std::string::npos);
  const std::string shape = message_of(write_model(scratch, [](auto& specs) {
    specs[3].shape = {16, 16};
  }));
  CHECK(shape.find("blk.0.attn_k.weight has shape [16, 16]") != std::string::npos);
  CHECK(shape.find("[8, 16]") != std::string::npos);
  const std::string foreign = message_of(write_model(scratch, [](auto& specs) {
    specs.push_back({"blk.0.attn_q.bias", {16}});
  }));
  CHECK(foreign.find("blk.0.attn_q.bias") != std::string::npos);
  CHECK_THROWS_AS(open_checkpoint(write_model(scratch,
                                              [](auto& specs) {
                                                specs.push_back({"blk.9.attn_q.weight", {16, 16}});
                                              })),
                  Unsupported);
  CHECK(message_of(scratch / "nothing").find("no such file") != std::string::npos);
}

TEST_CASE("GGUF: output.weight means an untied head") {
  Scratch scratch;
  CHECK(open_checkpoint(write_model(scratch, [](auto&) {}))->config().tied_embeddings == false);
  const std::string tied = write_model(scratch, [](auto& specs) { specs.pop_back(); });
  CHECK(open_checkpoint(tied)->config().tied_embeddings);
}

TEST_CASE("random: any range of any tensor is the published stream") {
  Scratch scratch;
  test::put(scratch / "tiny.json", kTinyConfig);
  const auto model = open_checkpoint("random:" + (scratch / "tiny.json"), 7);
  const Checkpoint::Tensor& q = *model->find("blk.1.attn_q.weight");
  CHECK(q.type == TensorType{DType::BF16, {16, 16}, {}});
  const std::vector<float> all = values_of(*model, q);
  const auto range = static_cast<float>(model->config().initializer_range);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const float normal = philox_normal(7, hash_name(q.name), i);
    CHECK(all[i] == to_float(to_bf16(range * normal)));
  }
  for (std::int64_t begin : {0, 1, 2, 101}) {
    std::vector<float> part(53);
    model->read_f32(q, begin, part);
    CHECK(std::equal(part.begin(), part.end(), all.begin() + begin));
  }
  std::vector<std::byte> stored(static_cast<std::size_t>(bytes(q.type)));
  model->read(q, stored);
  std::vector<float> decoded(all.size());
  dequantize(q.type, stored.data(), 0, decoded);
  CHECK(decoded == all);
  for (const float one : values_of(*model, *model->find("output_norm.weight"))) CHECK(one == 1.0f);
  const auto other = open_checkpoint("random:" + (scratch / "tiny.json"), 8);
  CHECK_FALSE(values_of(*other, *other->find(q.name)) == all);
  std::vector<float> outside(2);
  CHECK_THROWS_AS(model->read_f32(q, 255, outside), ShapeError);
}

TEST_CASE("Hugging Face: what a directory may lack, and what it may not be") {
  Scratch scratch;
  const auto write = [&](const std::string& config, bool with_head) {
    ModelConfig shape = config_from_json(kTinyConfig, "tiny");
    shape.tied_embeddings = !with_head;
    test::put(scratch / "config.json", config);
    SafetensorsWriter writer(scratch / "model.safetensors");
    const auto specs = model_tensors(shape);
    for (const TensorSpec& s : specs) writer.add(*hf_name(s.name), {DType::F16, s.shape, {}});
    writer.begin();
    for (const TensorSpec& s : specs) {
      writer.write(std::vector<std::byte>(static_cast<std::size_t>(2 * s.shape.elements())));
    }
    writer.finish();
  };
  const std::string tiny = kTinyConfig;
  const auto with = [&](const std::string& member) {
    return tiny.substr(0, tiny.size() - 1) + "," + member + "}";
  };
  write(tiny, true);
  CHECK_FALSE(open_checkpoint(scratch.path())->config().tied_embeddings);
  write(tiny, false);
  CHECK(open_checkpoint(scratch.path())->config().tied_embeddings);
  write(with("\"tie_word_embeddings\":true"), true);
  CHECK(open_checkpoint(scratch.path())->config().tied_embeddings);
  CHECK(open_checkpoint(scratch.path())->find("output.weight") == nullptr);
  write(with("\"tie_word_embeddings\":false"), false);
  CHECK(message_of(scratch.path()).find("lm_head.weight is missing") != std::string::npos);
  write(with("\"quantization_config\":{\"quant_method\":\"bitsandbytes\"}"), true);
  CHECK_THROWS_AS(open_checkpoint(scratch.path()), Unsupported);
  CHECK(message_of(scratch.path()).find("bitsandbytes") != std::string::npos);
  test::put(scratch / "config.json", "{\"model_type\":");
  CHECK_THROWS_AS(open_checkpoint(scratch.path()), FormatError);
  Scratch empty;
  CHECK(message_of(empty.path()).find("no config.json") != std::string::npos);
}
