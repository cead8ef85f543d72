// config.json of Hugging Face llama models, and the arithmetic of RoPE scaling.
//
// A key that would change the numbers and that Nibble does not implement is Unsupported; keys that
// only matter to other programs (torch_dtype, use_cache, ...) are ignored. transformers 5 moved
// rope_theta and rope_scaling into "rope_parameters"; both places are read.
//
// llama3 scaling, with wavelength w = 2 pi theta^(2i/d), L0 the original context:
//   w < L0/high: 1;  w > L0/low: factor;  between: 1 / ((1 - s)/factor + s),
//   s = (L0/w - low) / (high - low).
// These are divisors of the inverse frequency, the form that GGUF's rope_freqs.weight has.
// Source: transformers modeling_rope_utils.py, llama.cpp convert_hf_to_gguf.py.
#include "gguf-convert/model_config.h"

#include <cmath>

#include "gguf-convert/json_fields.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

constexpr const char* kArchitectures = "llama, mistral (no sliding window), SmolLM";

struct Range {
  const char* name;
  std::int64_t value, largest;
};

RopeScaling scaling_from_json(const nlohmann::json& object, const std::string& path,
                              std::int64_t context) {
  const JsonFields fields(object, path);
  const std::string type = fields.string("rope_type", fields.string("type", "default"));
  RopeScaling scaling;
  if (type == "default") return scaling;
  if (type == "linear") {
    scaling.kind = RopeScaling::Kind::linear;
    scaling.factor = fields.real("factor");
  } else if (type == "llama3") {
    scaling.kind = RopeScaling::Kind::llama3;
    scaling.factor = fields.real("factor");
    scaling.low_freq_factor = fields.real("low_freq_factor");
    scaling.high_freq_factor = fields.real("high_freq_factor");
    scaling.original_context = fields.integer("original_max_position_embeddings", context);
  } else {
    throw Unsupported(path + ": RoPE scaling " + nibble::quoted(type) +
                      " is not supported; supported are default, linear and llama3");
  }
  if (fields.real("partial_rotary_factor", 1.0) != 1.0) {
    throw Unsupported(path + ": partial_rotary_factor other than 1 is not supported");
  }
  return scaling;
}

// Everything that would need another graph than the one models/llama builds.
void refuse_variants(const JsonFields& fields, const std::string& path, std::int64_t context) {
  const std::string type = fields.string("model_type");
  if (type != "llama" && type != "mistral") {
    throw Unsupported(path + ": model_type " + nibble::quoted(type) +
                      " is not supported; supported are " + kArchitectures);
  }
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (fields.boolean(key, false)) {
      throw Unsupported(path + ": " + key + " is true; linears with a bias are not supported");
    }
  }
  if (fields.integer("sliding_window", context) < context) {
    throw Unsupported(path + ": sliding_window " +
                      std::to_string(fields.integer("sliding_window")) +
                      " is shorter than the context; supported are " + kArchitectures);
  }
  const std::string act = fields.string("hidden_act", "silu");
  if (act != "silu" && act != "swish") {
    throw Unsupported(path + ": hidden_act " + nibble::quoted(act) +
                      " is not supported; supported is silu");
  }
  if (fields.real("partial_rotary_factor", 1.0) != 1.0) {
    throw Unsupported(path + ": partial_rotary_factor other than 1 is not supported");
  }
}

nlohmann::json scaling_to_json(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  switch (scaling.kind) {
    case RopeScaling::Kind::none:
      return nullptr;
    case RopeScaling::Kind::linear:
      return {{"rope_type", "linear"}, {"type", "linear"}, {"factor", scaling.factor}};
    case RopeScaling::Kind::llama3:
      break;
  }
  return {{"rope_type", "llama3"},
          {"factor", scaling.factor},
          {"low_freq_factor", scaling.low_freq_factor},
          {"high_freq_factor", scaling.high_freq_factor},
          {"original_max_position_embeddings", scaling.original_context}};
}

}  // namespace

void check_config(const ModelConfig& config, const std::string& path) {
  const Range ranges[] = {{"vocabulary size", config.vocab, 1 << 24},
                          {"hidden size", config.hidden, 1 << 18},
                          {"feed-forward size", config.feed_forward, 1 << 20},
                          {"number of layers", config.layers, 4096},
                          {"number of heads", config.heads, 1 << 14},
                          {"number of key/value heads", config.kv_heads, 1 << 14},
                          {"head size", config.head_dim, 1 << 14},
                          {"context length", config.context, std::int64_t{1} << 31}};
  for (const Range& range : ranges) {
    if (range.value < 1 || range.value > range.largest) {
      throw FormatError(path, 0,
                        "the " + std::string(range.name) + " is " + std::to_string(range.value) +
                            "; it must be from 1 to " + std::to_string(range.largest));
    }
  }
  if (config.heads % config.kv_heads != 0) {
    throw FormatError(path, 0,
                      std::to_string(config.kv_heads) + " key/value heads do not divide " +
                          std::to_string(config.heads) + " heads");
  }
  if (config.head_dim % 2 != 0) {
    throw FormatError(path, 0,
                      "the head size " + std::to_string(config.head_dim) +
                          " is odd; rotary embedding needs pairs");
  }
  if (config.heads * config.head_dim > 1 << 20) {
    throw FormatError(path, 0, "heads times head size is larger than 2^20");
  }
  if (!(config.rms_eps > 0 && config.rms_eps < 1)) {
    throw FormatError(path, 0, "the epsilon of RMSNorm is not between 0 and 1");
  }
  if (!(config.rope_theta > 0 && config.rope_theta <= 1e30)) {
    throw FormatError(path, 0, "the RoPE base is not a positive number");
  }
  const RopeScaling& scaling = config.rope_scaling;
  const bool bad_llama3 =
      scaling.kind == RopeScaling::Kind::llama3 &&
      !(scaling.low_freq_factor > 0 && scaling.high_freq_factor > scaling.low_freq_factor &&
        std::isfinite(scaling.high_freq_factor) && scaling.original_context > 0);
  if (!(scaling.factor > 0 && std::isfinite(scaling.factor)) || bad_llama3) {
    throw FormatError(path, 0,
                      "RoPE scaling needs factor > 0, 0 < low_freq_factor < high_freq_factor and "
                      "a positive original context");
  }
}

std::vector<float> rope_divisors(const RopeScaling& scaling, std::int64_t head_dim, double theta) {
  const auto pairs = static_cast<std::size_t>(head_dim / 2);
  if (scaling.kind == RopeScaling::Kind::none) return {};
  std::vector<float> divisors(pairs, static_cast<float>(scaling.factor));
  if (scaling.kind == RopeScaling::Kind::linear) return divisors;

  const auto original = static_cast<double>(scaling.original_context);
  for (std::size_t i = 0; i < pairs; ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(head_dim);
    const double wavelength = 2.0 * 3.14159265358979323846 * std::pow(theta, exponent);
    if (wavelength < original / scaling.high_freq_factor) {
      divisors[i] = 1.0f;
    } else if (wavelength <= original / scaling.low_freq_factor) {
      const double s = (original / wavelength - scaling.low_freq_factor) /
                       (scaling.high_freq_factor - scaling.low_freq_factor);
      divisors[i] = static_cast<float>(1.0 / ((1.0 - s) / scaling.factor + s));
    }
  }
  return divisors;
}

ModelConfig config_from_json(const std::string& text, const std::string& path) {
  const nlohmann::json json = parse_json_object(text, path);
  const JsonFields fields(json, path);
  const bool mistral = fields.string("model_type") == "mistral";
  ModelConfig config;
  config.context = fields.integer("max_position_embeddings", mistral ? 131072 : 2048);
  refuse_variants(fields, path, config.context);

  config.name = fields.string("_name_or_path", "");
  config.vocab = fields.integer("vocab_size");
  config.hidden = fields.integer("hidden_size");
  config.feed_forward = fields.integer("intermediate_size");
  config.layers = fields.integer("num_hidden_layers");
  config.heads = fields.integer("num_attention_heads");
  config.kv_heads = fields.integer("num_key_value_heads", config.heads);
  if (config.heads < 1) throw FormatError(path, 0, "\"num_attention_heads\" must be positive");
  if (!fields.has("head_dim") && config.hidden % config.heads != 0) {
    throw FormatError(path, 0,
                      "\"head_dim\" is missing and the heads do not divide the hidden size");
  }
  config.head_dim = fields.integer("head_dim", config.hidden / config.heads);
  config.rms_eps = fields.real("rms_norm_eps", 1e-6);
  config.tied_embeddings = fields.boolean("tie_word_embeddings", false);
  config.initializer_range = fields.real("initializer_range", 0.02);
  if (!(config.initializer_range >= 0 && config.initializer_range <= 1e6)) {
    throw FormatError(path, 0, "\"initializer_range\" is not a number from 0 to 1000000");
  }

  config.rope_theta = fields.real("rope_theta", 10000.0);
  if (const auto* scaling = fields.object("rope_scaling")) {
    config.rope_scaling = scaling_from_json(*scaling, path, config.context);
  }
  if (const auto* parameters = fields.object("rope_parameters")) {
    config.rope_theta = JsonFields(*parameters, path).real("rope_theta", config.rope_theta);
    config.rope_scaling = scaling_from_json(*parameters, path, config.context);
  }
  check_config(config, path);
  config.rope_freq_divisors =
      rope_divisors(config.rope_scaling, config.head_dim, config.rope_theta);
  return config;
}

std::string config_to_json(const ModelConfig& config, const std::string& dtype) {
  if (config.rope_scaling.kind == RopeScaling::Kind::none && !config.rope_freq_divisors.empty()) {
    throw Unsupported(
        "the model's RoPE frequency divisors are not those of a llama3 scaling that config.json "
        "can describe; convert to .gguf instead");
  }
  const nlohmann::ordered_json json = {
      {"architectures", {"LlamaForCausalLM"}},
      {"model_type", "llama"},
      {"hidden_size", config.hidden},
      {"intermediate_size", config.feed_forward},
      {"num_hidden_layers", config.layers},
      {"num_attention_heads", config.heads},
      {"num_key_value_heads", config.kv_heads},
      {"head_dim", config.head_dim},
      {"vocab_size", config.vocab},
      {"max_position_embeddings", config.context},
      {"rms_norm_eps", config.rms_eps},
      {"rope_theta", config.rope_theta},
      {"rope_scaling", nlohmann::ordered_json(scaling_to_json(config))},
      {"hidden_act", "silu"},
      {"attention_bias", false},
      {"mlp_bias", false},
      {"tie_word_embeddings", config.tied_embeddings},
      {"initializer_range", config.initializer_range},
      {"torch_dtype", dtype},
  };
  return json.dump(2) + "\n";
}

}  // namespace nibble
