// The llama.* keys of a GGUF file.
//
// llama.cpp's converter drops the numbers of llama3 scaling and stores the resulting divisors as
// rope_freqs.weight, so they are recovered by search: the factor is the largest divisor, and the
// other numbers are those that every published llama3 model uses. A file whose divisors come from
// anything else keeps them and reports no scaling kind. Source: ggml docs/gguf.md.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "engine/error.h"
#include "engine/quantize.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/model_config.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

constexpr const char* kRopeFreqs = "rope_freqs.weight";

// F32 in a file is what a double was rounded to: 1e-5 is stored as 9.99999975e-06. The shortest
// decimal that rounds to the same F32 is what the author wrote.
double shortest(double value) {
  const auto rounded = static_cast<float>(value);
  if (static_cast<double>(rounded) != value) return value;
  for (int digits = 1; digits <= 9; ++digits) {
    char text[32];
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    const double candidate = std::strtod(text, nullptr);
    if (static_cast<float>(candidate) == rounded) return candidate;
  }
  return value;
}

void refuse_variants(const GgufFile& file, std::int64_t context) {
  const std::string& path = file.path();
  if (file.string("general.type", "model") == "adapter") {
    throw FormatError(path, 0, "this is a LoRA adapter, not a model; pass it as --adapter");
  }
  const std::string architecture = file.string("general.architecture", "");
  if (architecture != "llama") {
    throw Unsupported(path + ": architecture " + nibble::quoted(architecture) +
                      " is not supported; supported are llama, mistral (no sliding window), "
                      "SmolLM");
  }
  const std::int64_t window = file.integer("llama.attention.sliding_window", 0);
  if (window > 0 && window < context) {
    throw Unsupported(path + ": a sliding window of " + std::to_string(window) +
                      " tokens is not supported; supported are llama, mistral (no sliding "
                      "window), SmolLM");
  }
  if (file.integer("llama.expert_count", 0) > 0) {
    throw Unsupported(path + ": mixture-of-experts models are not supported");
  }
}

RopeScaling scaling_from_gguf(const GgufFile& file) {
  RopeScaling scaling;
  double factor = file.real("llama.rope.scaling.factor", 1.0);
  std::string type = file.string("llama.rope.scaling.type", "none");
  if (type == "none" && file.has("llama.rope.scale_linear")) {
    type = "linear";
    factor = file.real("llama.rope.scale_linear", 1.0);
  }
  if (type == "linear" && factor != 1.0) {
    scaling.kind = RopeScaling::Kind::linear;
    scaling.factor = shortest(factor);
  } else if (type != "none" && type != "linear") {
    throw Unsupported(file.path() + ": RoPE scaling " + nibble::quoted(type) +
                      " is not supported; supported are none, linear and llama3");
  }
  return scaling;
}

std::vector<float> read_divisors(const GgufFile& file, std::int64_t head_dim) {
  const GgufTensor* tensor = file.find(kRopeFreqs);
  if (tensor == nullptr) return {};
  if (!is_float(tensor->type.dtype) || !(tensor->type.shape == Shape{head_dim / 2})) {
    throw FormatError(file.path(), tensor->offset,
                      std::string(kRopeFreqs) + " is " + tensor->type.str() + "; wanted F32[" +
                          std::to_string(head_dim / 2) + "]");
  }
  std::vector<float> divisors(static_cast<std::size_t>(head_dim / 2));
  dequantize(tensor->type, tensor->bytes.data(), 0, divisors);
  for (const float divisor : divisors) {
    if (!(divisor > 0) || !std::isfinite(divisor)) {
      throw FormatError(file.path(), tensor->offset,
                        std::string(kRopeFreqs) + " holds a value that is not positive");
    }
  }
  return divisors;
}

// The llama3 scaling whose divisors these are, or kind none.
RopeScaling recover_llama3(const std::vector<float>& divisors, std::int64_t head_dim,
                           double theta) {
  RopeScaling scaling;
  scaling.kind = RopeScaling::Kind::llama3;
  scaling.factor = *std::max_element(divisors.begin(), divisors.end());
  for (const std::int64_t original : {8192, 4096, 2048, 16384, 32768}) {
    scaling.original_context = original;
    const std::vector<float> candidate = rope_divisors(scaling, head_dim, theta);
    const bool same = std::equal(candidate.begin(), candidate.end(), divisors.begin(),
                                 [](float a, float b) { return std::abs(a - b) <= 1e-4f * b; });
    if (same) return scaling;
  }
  return {};
}

void read_rope(const GgufFile& file, ModelConfig& config) {
  config.rope_scaling = scaling_from_gguf(file);
  config.rope_freq_divisors =
      rope_divisors(config.rope_scaling, config.head_dim, config.rope_theta);
  const std::vector<float> stored = read_divisors(file, config.head_dim);
  if (stored.empty()) return;
  if (config.rope_scaling.kind == RopeScaling::Kind::linear) {
    throw Unsupported(file.path() + ": linear RoPE scaling together with " + kRopeFreqs +
                      " is not supported");
  }
  config.rope_freq_divisors = stored;
  config.rope_scaling = recover_llama3(stored, config.head_dim, config.rope_theta);
}

}  // namespace

ModelConfig config_from_gguf(const GgufFile& file) {
  const std::string& path = file.path();
  ModelConfig config;
  const auto required = [&](const char* key) {
    if (!file.has(key)) throw FormatError(path, 0, "the key " + std::string(key) + " is missing");
    return file.integer(key, 0);
  };
  if (!file.has("general.architecture")) {
    throw FormatError(path, 0, "the key general.architecture is missing; this is not a model");
  }
  config.context = file.integer("llama.context_length", 2048);
  refuse_variants(file, config.context);
  config.name = file.string("general.name", "");
  config.hidden = required("llama.embedding_length");
  config.layers = required("llama.block_count");
  config.feed_forward = required("llama.feed_forward_length");
  config.heads = required("llama.attention.head_count");
  config.kv_heads = file.integer("llama.attention.head_count_kv", config.heads);
  if (config.heads < 1) throw FormatError(path, 0, "llama.attention.head_count is not positive");
  if (!file.has("llama.attention.key_length") && config.hidden % config.heads != 0) {
    throw FormatError(path, 0,
                      "llama.attention.key_length is missing and the heads do not divide the "
                      "hidden size");
  }
  config.head_dim = file.integer("llama.attention.key_length", config.hidden / config.heads);
  for (const char* key : {"llama.attention.value_length", "llama.rope.dimension_count"}) {
    if (file.integer(key, config.head_dim) != config.head_dim) {
      throw Unsupported(path + ": " + key + " is " + std::to_string(file.integer(key, 0)) +
                        ", different from the head size " + std::to_string(config.head_dim) +
                        "; this is not supported");
    }
  }
  const GgufTensor* embedding = file.find("token_embd.weight");
  config.vocab =
      file.integer("llama.vocab_size", embedding == nullptr ? 0 : embedding->type.shape.rows());
  config.rms_eps = shortest(file.real("llama.attention.layer_norm_rms_epsilon", 1e-5));
  config.rope_theta = shortest(file.real("llama.rope.freq_base", 10000.0));
  const std::string style = file.string("nibble.rope.style", "adjacent");
  if (style != "half" && style != "adjacent") {
    throw FormatError(
        path, 0, "nibble.rope.style is " + nibble::quoted(style) + "; wanted half or adjacent");
  }
  config.rope_style = style == "half" ? RopeStyle::half : RopeStyle::adjacent;
  config.tied_embeddings =
      file.find("output.weight") == nullptr && file.find("output.weight.codes") == nullptr;
  check_config(config, path);
  read_rope(file, config);
  return config;
}

void write_config(const ModelConfig& config, GgufWriter& writer) {
  const auto u32 = [&](const char* key, std::int64_t value) {
    writer.set_u32(key, static_cast<std::uint32_t>(value));
  };
  writer.set_string("general.architecture", config.architecture);
  writer.set_string("general.type", "model");
  if (!config.name.empty()) writer.set_string("general.name", config.name);
  u32("llama.block_count", config.layers);
  u32("llama.context_length", config.context);
  u32("llama.embedding_length", config.hidden);
  u32("llama.feed_forward_length", config.feed_forward);
  u32("llama.attention.head_count", config.heads);
  u32("llama.attention.head_count_kv", config.kv_heads);
  if (config.heads * config.head_dim != config.hidden) {
    u32("llama.attention.key_length", config.head_dim);
    u32("llama.attention.value_length", config.head_dim);
  }
  u32("llama.rope.dimension_count", config.head_dim);
  u32("llama.vocab_size", config.vocab);
  writer.set_f32("llama.attention.layer_norm_rms_epsilon", static_cast<float>(config.rms_eps));
  writer.set_f32("llama.rope.freq_base", static_cast<float>(config.rope_theta));
  if (config.rope_scaling.kind == RopeScaling::Kind::linear) {
    writer.set_string("llama.rope.scaling.type", "linear");
    writer.set_f32("llama.rope.scaling.factor", static_cast<float>(config.rope_scaling.factor));
  }
  if (config.rope_style == RopeStyle::half) writer.set_string("nibble.rope.style", "half");
}

}  // namespace nibble
