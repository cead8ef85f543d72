#include "gguf-convert/model_config.h"

#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "gguf-convert/gguf.h"
#include "tests/unit/scratch.h"
#include "tests/unit/shared_data.h"

using namespace nibble;

namespace {

nlohmann::json small_json() {
  return {{"model_type", "llama"},       {"hidden_size", 64},
          {"intermediate_size", 172},    {"num_hidden_layers", 5},
          {"num_attention_heads", 8},    {"num_key_value_heads", 4},
          {"vocab_size", 512},           {"rms_norm_eps", 1e-5},
          {"tie_word_embeddings", true}, {"max_position_embeddings", 512}};
}

ModelConfig parse(const nlohmann::json& json) { return config_from_json(json.dump(), "c.json"); }

nlohmann::json with(const char* key, nlohmann::json value) {
  nlohmann::json json = small_json();
  json[key] = std::move(value);
  return json;
}

std::string message_of(const nlohmann::json& json) {
  try {
    parse(json);
  } catch (const Unsupported& e) {
    return e.what();
  }
  return "";
}

bool says(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

ModelConfig through_gguf(const ModelConfig& config, const std::string& path) {
  GgufWriter writer(path);
  write_config(config, writer);
  const auto pairs = static_cast<std::int64_t>(config.rope_freq_divisors.size());
  const bool stored = pairs > 0 && config.rope_scaling.kind != RopeScaling::Kind::linear;
  writer.add("token_embd.weight", {DType::F32, {1}, {}});
  if (stored) writer.add("rope_freqs.weight", {DType::F32, {pairs}, {}});
  writer.begin();
  const float zero = 0;
  writer.write(std::as_bytes(std::span(&zero, 1)));
  if (stored) writer.write(std::as_bytes(std::span(config.rope_freq_divisors)));
  writer.finish();
  return config_from_gguf(GgufFile(path));
}

void check_same(const ModelConfig& a, const ModelConfig& b) {
  CHECK(a.vocab == b.vocab);
  CHECK(a.hidden == b.hidden);
  CHECK(a.feed_forward == b.feed_forward);
  CHECK(a.layers == b.layers);
  CHECK(a.heads == b.heads);
  CHECK(a.kv_heads == b.kv_heads);
  CHECK(a.head_dim == b.head_dim);
  CHECK(a.context == b.context);
  CHECK(a.rms_eps == b.rms_eps);
  CHECK(a.rope_theta == b.rope_theta);
  CHECK(a.rope_scaling.kind == b.rope_scaling.kind);
  CHECK(a.rope_scaling.factor == b.rope_scaling.factor);
  CHECK(a.rope_scaling.original_context == b.rope_scaling.original_context);
  CHECK(a.rope_freq_divisors == b.rope_freq_divisors);
}

}  // namespace

TEST_CASE("llama3 divisors are those of published models") {
  // Values of rope_freqs.weight in llama.cpp's conversions of Llama 3.1 8B and 3.2 1B.
  RopeScaling scaling{RopeScaling::Kind::llama3, 8, 1, 4, 8192};
  const std::vector<float> large = rope_divisors(scaling, 128, 5e5);
  REQUIRE(large.size() == 64);
  const double expected[] = {1.20748, 1.55341, 2.02631, 2.69453, 3.68425, 5.25733};
  for (std::size_t i = 0; i < 64; ++i) {
    const double wanted = i <= 28 ? 1.0 : i <= 34 ? expected[i - 29] : 8.0;
    CHECK(static_cast<double>(large[i]) == doctest::Approx(wanted).epsilon(1e-5));
  }
  scaling.factor = 32;
  const std::vector<float> small = rope_divisors(scaling, 64, 5e5);
  CHECK(small[14] == 1.0f);
  CHECK(static_cast<double>(small[15]) == doctest::Approx(1.65133).epsilon(1e-5));
  CHECK(static_cast<double>(small[16]) == doctest::Approx(3.29226).epsilon(1e-5));
  CHECK(static_cast<double>(small[17]) == doctest::Approx(9.66673).epsilon(1e-5));
  CHECK(small[18] == 32.0f);
  CHECK(rope_divisors({}, 64, 1e4).empty());
}

TEST_CASE("config.json: defaults of transformers, and both places of RoPE") {
  const ModelConfig config = parse(small_json());
  CHECK(config.head_dim == 8);
  CHECK(config.rope_theta == 10000.0);
  CHECK(config.rope_style == RopeStyle::half);
  CHECK(config.tied_embeddings);
  nlohmann::json bare = small_json();
  for (const char* key : {"num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"}) {
    bare.erase(key);
  }
  CHECK(parse(bare).kv_heads == 8);
  CHECK(parse(bare).rms_eps == 1e-6);
  CHECK_FALSE(parse(bare).tied_embeddings);

  const nlohmann::json llama3 = {{"rope_type", "llama3"},
                                 {"factor", 8.0},
                                 {"low_freq_factor", 1.0},
                                 {"high_freq_factor", 4.0},
                                 {"original_max_position_embeddings", 128}};
  nlohmann::json old_place = with("rope_scaling", llama3);
  old_place["rope_theta"] = 5e5;
  nlohmann::json parameters = llama3;
  parameters["rope_theta"] = 5e5;
  const ModelConfig a = parse(old_place), b = parse(with("rope_parameters", parameters));
  CHECK(a.rope_theta == 5e5);
  CHECK(a.rope_freq_divisors.size() == 4);
  CHECK(a.rope_freq_divisors.back() == 8.0f);
  check_same(a, b);
  CHECK(
      parse(with("rope_parameters", {{"rope_theta", 1e6}, {"rope_type", "default"}})).rope_theta ==
      1e6);
}

TEST_CASE("config.json: what is not supported is named, with what is") {
  CHECK(says(message_of(with("model_type", "qwen2")), "\"qwen2\""));
  CHECK(says(message_of(with("model_type", "qwen2")), "llama, mistral (no sliding window)"));
  CHECK(says(message_of(with("attention_bias", true)), "attention_bias"));
  CHECK(says(message_of(with("mlp_bias", true)), "mlp_bias"));
  CHECK(says(message_of(with("sliding_window", 256)), "sliding_window 256"));
  CHECK(says(message_of(with("hidden_act", "gelu")), "gelu"));
  CHECK(says(message_of(with("partial_rotary_factor", 0.5)), "partial_rotary_factor"));
  CHECK(says(message_of(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4}})), "yarn"));
  nlohmann::json mistral = with("model_type", "mistral");
  mistral["sliding_window"] = nullptr;
  CHECK(parse(mistral).layers == 5);
}

TEST_CASE("config.json: bad values and every truncation are FormatErrors") {
  const std::string text = small_json().dump(1);
  for (std::size_t length = 0; length < text.size(); ++length) {
    CHECK_THROWS_AS(config_from_json(text.substr(0, length), "c.json"), FormatError);
  }
  const std::pair<const char*, nlohmann::json> bad[] = {
      {"num_hidden_layers", -1},
      {"num_hidden_layers", 1e9},
      {"num_attention_heads", 0},
      {"num_key_value_heads", 3},
      {"head_dim", 7},
      {"vocab_size", "512"},
      {"vocab_size", 512.5},
      {"hidden_size", 18446744073709551615u},
      {"hidden_size", 1ll << 40},
      {"rms_norm_eps", 0},
      {"rope_theta", -1},
      {"rope_scaling", 3},
      {"intermediate_size", nullptr},
      {"max_position_embeddings", 0},
      {"initializer_range", -1},
      {"model_type", 5},
      {"rope_scaling", {{"rope_type", "linear"}, {"factor", 0}}},
      {"rope_scaling", {{"rope_type", "linear"}}}};
  for (const auto& entry : bad) {
    CAPTURE(entry.first);
    CAPTURE(entry.second.dump());
    CHECK_THROWS_AS(parse(with(entry.first, entry.second)), FormatError);
  }
  CHECK_THROWS_AS(config_from_json("[1]", "c.json"), FormatError);
  CHECK_THROWS_AS(config_from_json("\xff{", "c.json"), FormatError);
}

TEST_CASE("a config survives config.json and GGUF") {
  test::Scratch scratch;
  ModelConfig plain = parse(small_json());
  ModelConfig wide = parse(with("head_dim", 16));
  ModelConfig linear = parse(with("rope_scaling", {{"type", "linear"}, {"factor", 4.0}}));
  nlohmann::json json = with("rope_scaling", {{"rope_type", "llama3"},
                                              {"factor", 32.0},
                                              {"low_freq_factor", 1.0},
                                              {"high_freq_factor", 4.0},
                                              {"original_max_position_embeddings", 8192}});
  json["head_dim"] = 64;
  json["rope_theta"] = 5e5;
  ModelConfig llama3 = parse(json);
  for (ModelConfig* config : {&plain, &wide, &linear, &llama3}) {
    check_same(*config, config_from_json(config_to_json(*config, "float32"), "c.json"));
    for (const RopeStyle style : {RopeStyle::half, RopeStyle::adjacent}) {
      config->rope_style = style;
      const ModelConfig read = through_gguf(*config, scratch / "c.gguf");
      check_same(*config, read);
      CHECK(read.rope_style == style);
    }
  }
  CHECK(through_gguf(llama3, scratch / "c.gguf").rope_scaling.kind == RopeScaling::Kind::llama3);

  ModelConfig odd = plain;
  odd.rope_freq_divisors = {1, 2, 1, 3};
  const ModelConfig read = through_gguf(odd, scratch / "c.gguf");
  CHECK(read.rope_freq_divisors == odd.rope_freq_divisors);
  CHECK(read.rope_scaling.kind == RopeScaling::Kind::none);
  CHECK_THROWS_AS(config_to_json(read, "float32"), Unsupported);
}

TEST_CASE("the configs of a published model agree across formats") {
  const std::string directory = test::shared("models/stories260K/");
  SKIP_WITHOUT(directory);
  const ModelConfig hf =
      config_from_json(test::get(directory + "hf/config.json"), "hf/config.json");
  const ModelConfig gguf = config_from_gguf(GgufFile(directory + "stories260K-f32.gguf"));
  check_same(hf, gguf);
  CHECK(gguf.rope_style == RopeStyle::adjacent);
  CHECK(gguf.tied_embeddings);
}
