#include "gguf-convert/adapter.h"

#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/philox.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/safetensors.h"
#include "tests/unit/scratch.h"
#include "tests/unit/shared_data.h"
#include "tests/unit/tiny_checkpoint.h"

using namespace nibble;
using test::Scratch;

namespace {

AdapterTensor make_tensor(const std::string& name, std::int64_t out, std::int64_t in,
                          std::int64_t rank, double alpha) {
  AdapterTensor tensor{name, in, out, rank, alpha, {}, {}};
  for (std::int64_t i = 0; i < rank * in; ++i) {
    tensor.a.push_back(philox_normal(1, hash_name(name), static_cast<std::uint64_t>(i)));
  }
  for (std::int64_t i = 0; i < out * rank; ++i) {
    tensor.b.push_back(philox_normal(2, hash_name(name), static_cast<std::uint64_t>(i)));
  }
  return tensor;
}

// On the tiny config: heads of 8.
AdapterFile make_adapter() {
  AdapterFile adapter;
  for (const char* block : {"blk.0.", "blk.1."}) {
    const std::string at = block;
    adapter.tensors.push_back(make_tensor(at + "attn_q.weight", 16, 16, 4, 8));
    adapter.tensors.push_back(make_tensor(at + "attn_k.weight", 8, 16, 4, 8));
    adapter.tensors.push_back(make_tensor(at + "ffn_down.weight", 16, 33, 4, 8));
  }
  adapter.dropout = 0.05;
  adapter.base_name = "somewhere/tiny";
  adapter.head_dim = 8;
  return adapter;
}

void check_same(const AdapterFile& a, const AdapterFile& b) {
  REQUIRE(a.tensors.size() == b.tensors.size());
  for (std::size_t i = 0; i < a.tensors.size(); ++i) {
    CHECK(a.tensors[i].name == b.tensors[i].name);
    CHECK(a.tensors[i].rank == b.tensors[i].rank);
    CHECK(a.scale(a.tensors[i]) == doctest::Approx(b.scale(b.tensors[i])).epsilon(1e-7));
    CHECK(a.tensors[i].a == b.tensors[i].a);
    CHECK(a.tensors[i].b == b.tensors[i].b);
  }
}

nlohmann::json config_of(const std::string& directory) {
  return nlohmann::json::parse(test::get(directory + "/adapter_config.json"));
}

void set_config(const std::string& directory, const nlohmann::json& json) {
  test::put(directory + "/adapter_config.json", json.dump());
}

}  // namespace

TEST_CASE("PEFT to GGUF to PEFT keeps every bit, with q and k in each format's order") {
  Scratch scratch;
  const AdapterFile original = make_adapter();
  write_peft(original, scratch / "peft");
  const AdapterFile peft = read_adapter(scratch / "peft");
  check_same(original, peft);
  CHECK(peft.dropout == 0.05);
  CHECK(peft.base_name == "somewhere/tiny");
  CHECK(config_of(scratch / "peft")["target_modules"] ==
        nlohmann::json({"down_proj", "k_proj", "q_proj"}));

  AdapterFile known = peft;
  known.head_dim = 8;
  write_gguf_lora(known, scratch / "lora.gguf");
  const AdapterFile gguf = read_adapter(scratch / "lora.gguf");
  CHECK(gguf.rope_style == RopeStyle::adjacent);
  // Row p of a head of 8 is row 0, 4, 1, 5, ... of PEFT's; other linears keep their rows.
  const std::int64_t order[] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (std::size_t row = 0; row < 16; ++row) {
    const std::size_t source = row / 8 * 8 + static_cast<std::size_t>(order[row % 8]);
    CHECK(std::equal(gguf.tensors[0].b.begin() + static_cast<std::ptrdiff_t>(row * 4),
                     gguf.tensors[0].b.begin() + static_cast<std::ptrdiff_t>(row * 4 + 4),
                     peft.tensors[0].b.begin() + static_cast<std::ptrdiff_t>(source * 4)));
  }
  CHECK(gguf.tensors[2].b == peft.tensors[2].b);

  write_peft(gguf, scratch / "again");
  check_same(original, read_adapter(scratch / "again"));
  CHECK(test::get(scratch / "peft/adapter_model.safetensors") ==
        test::get(scratch / "again/adapter_model.safetensors"));
  CHECK(scratch.entries() == 3);
}

TEST_CASE("adapters follow the row order of the base in memory") {
  Scratch scratch;
  ModelConfig base = config_from_json(test::kTinyConfig, "tiny");
  const AdapterFile original = make_adapter();
  write_peft(original, scratch / "peft");
  check_same(original, read_adapter(scratch / "peft", base));
  base.rope_style = RopeStyle::adjacent;
  AdapterFile adjacent = read_adapter(scratch / "peft", base);
  CHECK(adjacent.rope_style == RopeStyle::adjacent);
  CHECK_FALSE(adjacent.tensors[0].b == original.tensors[0].b);
  write_gguf_lora(adjacent, scratch / "lora.gguf");
  base.rope_style = RopeStyle::half;
  check_same(original, read_adapter(scratch / "lora.gguf", base));

  AdapterFile unknown = original;
  unknown.head_dim = 0;
  CHECK_THROWS_WITH_AS(write_gguf_lora(unknown, scratch / "x.gguf"), doctest::Contains("head size"),
                       Error);
  CHECK_FALSE(std::filesystem::exists(scratch / "x.gguf"));
}

TEST_CASE("rsLoRA, ranks and alphas of single modules") {
  Scratch scratch;
  AdapterFile adapter = make_adapter();
  adapter.use_rslora = true;
  CHECK(adapter.scale(adapter.tensors[0]) == 4.0);  // 8 / sqrt(4)
  write_gguf_lora(adapter, scratch / "rs.gguf");
  CHECK(GgufFile(scratch / "rs.gguf").real("adapter.lora.alpha", 0) == 16.0);
  check_same(adapter, read_adapter(scratch / "rs.gguf", config_from_json(test::kTinyConfig, "t")));
  write_peft(adapter, scratch / "rs");
  CHECK(config_of(scratch / "rs")["use_rslora"] == true);
  check_same(adapter, read_adapter(scratch / "rs"));

  AdapterFile mixed = make_adapter();
  mixed.tensors[1] = make_tensor("blk.0.attn_k.weight", 8, 16, 2, 8);
  write_gguf_lora(mixed, scratch / "ranks.gguf");  // every tensor has its own rank there
  CHECK(read_adapter(scratch / "ranks.gguf").scale(mixed.tensors[1]) == 4.0);
  mixed.tensors[4].alpha = 32;
  CHECK_THROWS_AS(write_gguf_lora(mixed, scratch / "alphas.gguf"), Unsupported);
  write_peft(mixed, scratch / "mixed");
  const nlohmann::json config = config_of(scratch / "mixed");
  CHECK(config["r"] == 4);
  CHECK(config["lora_alpha"] == 8);
  CHECK(config["rank_pattern"] == nlohmann::json{{"model.layers.0.self_attn.k_proj", 2}});
  CHECK(config["alpha_pattern"] == nlohmann::json{{"model.layers.1.self_attn.k_proj", 32}});
  check_same(mixed, read_adapter(scratch / "mixed"));

  nlohmann::json changed = config;
  changed["alpha_pattern"] = {{"q_proj", 2}, {"layers\\.1\\.mlp\\.down_proj", 5}};
  set_config(scratch / "mixed", changed);
  const AdapterFile read = read_adapter(scratch / "mixed");
  CHECK(read.find("blk.0.attn_q.weight")->alpha == 2);
  CHECK(read.find("blk.1.attn_q.weight")->alpha == 2);
  CHECK(read.find("blk.0.ffn_down.weight")->alpha == 8);
  CHECK(read.find("blk.1.ffn_down.weight")->alpha == 5);
  changed["alpha_pattern"] = {{"(a+)+$", 2}};
  set_config(scratch / "mixed", changed);
  CHECK_THROWS_AS(read_adapter(scratch / "mixed"), Unsupported);
  changed["alpha_pattern"] = nlohmann::json::object();
  changed["rank_pattern"] = nlohmann::json::object();
  set_config(scratch / "mixed", changed);
  CHECK_THROWS_AS(read_adapter(scratch / "mixed"), FormatError);
}

TEST_CASE("an adapter on some blocks names full paths, so that PEFT adds nothing elsewhere") {
  Scratch scratch;
  AdapterFile adapter = make_adapter();
  adapter.tensors.erase(adapter.tensors.begin());
  write_peft(adapter, scratch / "peft");
  const nlohmann::json targets = config_of(scratch / "peft")["target_modules"];
  CHECK(targets.size() == 5);
  CHECK(targets[0] == "model.layers.0.mlp.down_proj");
}

TEST_CASE("what plain LoRA cannot say is refused by name") {
  Scratch scratch;
  write_peft(make_adapter(), scratch / "peft");
  const nlohmann::json good = config_of(scratch / "peft");
  const std::pair<const char*, nlohmann::json> variants[] = {
      {"use_dora", true},   {"modules_to_save", nlohmann::json::array({"lm_head"})},
      {"bias", "all"},      {"fan_in_fan_out", true},
      {"lora_bias", true},  {"init_lora_weights", "pissa_niter_4"},
      {"peft_type", "IA3"}, {"trainable_token_indices", nlohmann::json::array({1})},
      {"use_qalora", true}, {"alora_invocation_tokens", nlohmann::json::array({5})}};
  for (const auto& variant : variants) {
    nlohmann::json changed = good;
    changed[variant.first] = variant.second;
    set_config(scratch / "peft", changed);
    CAPTURE(variant.first);
    CHECK_THROWS_AS(read_adapter(scratch / "peft"), Unsupported);
  }
  nlohmann::json gaussian = good;
  gaussian["init_lora_weights"] = "gaussian";
  set_config(scratch / "peft", gaussian);
  CHECK(read_adapter(scratch / "peft").tensors.size() == 6);
  set_config(scratch / "peft", "text");
  CHECK_THROWS_AS(read_adapter(scratch / "peft"), FormatError);
}

TEST_CASE("PEFT tensors: 16-bit values, and names that are no pair of a linear") {
  Scratch scratch;
  write_peft(make_adapter(), scratch / "peft");
  const std::string q = "base_model.model.model.layers.0.self_attn.q_proj.";
  const auto write = [&](const std::string& a, const std::string& b, Shape b_shape) {
    SafetensorsWriter writer(scratch / "peft/adapter_model.safetensors");
    const TensorType type_a{DType::BF16, {4, 16}, {}}, type_b{DType::BF16, b_shape, {}};
    writer.add(a, type_a);
    writer.add(b, type_b);
    writer.begin();
    for (const TensorType& type : {type_a, type_b}) {
      const std::vector<bf16> values(static_cast<std::size_t>(type.elements()), to_bf16(0.75f));
      writer.write(std::as_bytes(std::span(values)));
    }
    writer.finish();
    return read_adapter(scratch / "peft");
  };
  const AdapterFile good = write(q + "lora_A.weight", q + "lora_B.weight", {16, 4});
  REQUIRE(good.tensors.size() == 1);
  CHECK(good.tensors[0].a == std::vector<float>(64, 0.75f));
  CHECK(write(q + "lora_A.default.weight", q + "lora_B.default.weight", {16, 4}).tensors.size() ==
        1);
  CHECK_THROWS_AS(write(q + "lora_A.weight", q + "lora_B.weight", {16, 5}), FormatError);
  CHECK_THROWS_AS(write(q + "lora_A.weight", q + "lora_magnitude_vector", {16, 4}), Unsupported);
  CHECK_THROWS_AS(write(q + "lora_A.weight", "base_model.model.lm_head.weight", {16, 4}),
                  Unsupported);
  const std::string k = "base_model.model.model.layers.0.self_attn.k_proj.";
  CHECK_THROWS_AS(write(q + "lora_A.weight", k + "lora_B.weight", {16, 4}), FormatError);
  CHECK_THROWS_AS(write(q + "lora_A.weight", q + "lora_A.default.weight", {4, 16}), FormatError);
}

TEST_CASE("an adapter that does not fit the base is refused") {
  ModelConfig base = config_from_json(test::kTinyConfig, "tiny");
  const AdapterFile adapter = make_adapter();
  CHECK_NOTHROW(check_adapter(adapter, base, "a"));
  base.layers = 1;
  CHECK_THROWS_WITH_AS(check_adapter(adapter, base, "a"), doctest::Contains("blk.1.attn_q.weight"),
                       ShapeError);
  base.layers = 2;
  base.feed_forward = 34;
  CHECK_THROWS_WITH_AS(check_adapter(adapter, base, "a"), doctest::Contains("[16, 34]"),
                       ShapeError);
}

TEST_CASE("GGUF LoRA files of llama.cpp's making") {
  const std::string directory = test::shared("models/stories260K/");
  SKIP_WITHOUT(directory);
  const AdapterFile zero = read_adapter(directory + "lora-zeroB.gguf");
  const AdapterFile random = read_adapter(directory + "lora-randB.gguf");
  REQUIRE(random.tensors.size() == 15);
  CHECK(random.tensors[0].name == "blk.0.attn_q.weight");
  CHECK(random.tensors[2].name == "blk.0.ffn_down.weight");
  CHECK(random.scale(random.tensors[0]) == 2.0);
  CHECK(zero.tensors[0].b == std::vector<float>(zero.tensors[0].b.size(), 0.0f));
  CHECK(zero.tensors[0].rank == 4);
  CHECK(is_adapter(directory + "lora-randB.gguf"));
  CHECK_FALSE(is_adapter(directory + "stories260K-f32.gguf"));

  const GgufFile file(directory + "lora-randB.gguf");
  const auto holds = [&](const char* name, const std::vector<float>& values) {
    const auto stored = file.find(name)->bytes;
    const auto read = std::as_bytes(std::span(values));
    return std::equal(stored.begin(), stored.end(), read.begin(), read.end());
  };
  CHECK(holds("blk.0.attn_q.weight.lora_a", random.tensors[0].a));
  CHECK(holds("blk.0.attn_q.weight.lora_b", random.tensors[0].b));
  Scratch scratch;
  const auto base = open_checkpoint(directory + "hf");
  const AdapterFile half = read_adapter(directory + "lora-randB.gguf", base->config());
  CHECK_FALSE(half.tensors[0].b == random.tensors[0].b);
  write_peft(half, scratch / "peft");
  write_gguf_lora(read_adapter(scratch / "peft", base->config()), scratch / "again.gguf");
  check_same(random, read_adapter(scratch / "again.gguf"));
  CHECK_THROWS_AS(open_checkpoint(directory + "lora-randB.gguf"), FormatError);
}

TEST_CASE("GGUF LoRA: no alpha means scale 1; other content is refused") {
  Scratch scratch;
  const auto write = [&](const std::string& type, const std::string& name, bool alpha) {
    const std::string path = scratch / "lora.gguf";
    GgufWriter writer(path);
    writer.set_string("general.architecture", "llama");
    writer.set_string("general.type", "adapter");
    writer.set_string("adapter.type", type);
    if (alpha) writer.set_f32("adapter.lora.alpha", 0.0f);
    writer.add(name + ".lora_a", {DType::F32, {3, 16}, {}});
    writer.add(name + ".lora_b", {DType::F32, {8, 3}, {}});
    writer.begin();
    writer.write(std::vector<std::byte>(3 * 16 * 4));
    writer.write(std::vector<std::byte>(8 * 3 * 4));
    writer.finish();
    return read_adapter(path);
  };
  for (const bool alpha : {false, true}) {
    const AdapterFile adapter = write("lora", "blk.0.attn_k.weight", alpha);
    CHECK(adapter.scale(adapter.tensors[0]) == 1.0);
  }
  CHECK_THROWS_AS(write("control_vector", "blk.0.attn_k.weight", true), Unsupported);
  CHECK_THROWS_AS(write("lora", "token_embd.weight", true), Unsupported);
  CHECK_THROWS_AS(write("lora", "blk.0.attn_norm.weight", true), Unsupported);
}
