// What a llama-family checkpoint says about its own architecture, whichever file it came from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nibble {

class GgufFile;
class GgufWriter;

// Which elements of a head RoPE rotates together. Hugging Face files pair (i, i + d/2); llama GGUF
// files hold q and k rows permuted so that (2i, 2i + 1) gives the same result.
enum class RopeStyle { half, adjacent };

struct RopeScaling {
  enum class Kind { none, linear, llama3 } kind = Kind::none;
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;  // the last two: llama3
  std::int64_t original_context = 8192;                          // llama3
};

struct ModelConfig {
  std::string architecture = "llama";  // GGUF's general.architecture
  std::string name;                    // for people
  std::int64_t vocab = 0, hidden = 0, feed_forward = 0, layers = 0;
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0, context = 0;
  double rms_eps = 1e-5, rope_theta = 10000;
  RopeScaling rope_scaling;
  // Divisors of the inverse frequencies, [head_dim / 2]; empty means all one. From GGUF's
  // rope_freqs.weight, or computed from rope_scaling; see rope_divisors().
  std::vector<float> rope_freq_divisors;
  RopeStyle rope_style = RopeStyle::half;
  bool tied_embeddings = false;
  double initializer_range = 0.02;  // used by random: models
};

// Throws FormatError unless every number is positive, within what a llama can sensibly have, and
// agrees with the others (kv_heads divides heads, head_dim is even).
void check_config(const ModelConfig& config, const std::string& path);

// Divisors that `scaling` asks for at `head_dim` and `theta`; empty for none.
std::vector<float> rope_divisors(const RopeScaling& scaling, std::int64_t head_dim, double theta);

// Reads a Hugging Face config.json. Unknown model_type, sliding windows, biases and rope types that
// are not covered are Unsupported, naming what is supported.
ModelConfig config_from_json(const std::string& text, const std::string& path);

// The Hugging Face config.json of `config`, pretty printed.
std::string config_to_json(const ModelConfig& config, const std::string& dtype);

// The keys of a llama GGUF. Throws Unsupported for another architecture, by name.
ModelConfig config_from_gguf(const GgufFile& file);

// Sets general.architecture, general.name and the llama.* keys. llama3 scaling is not a key but
// the tensor rope_freqs.weight, which the caller adds from config.rope_freq_divisors.
void write_config(const ModelConfig& config, GgufWriter& writer);

}  // namespace nibble
