// PEFT directories: adapter_config.json and adapter_model.safetensors.
//
// rank_pattern and alpha_pattern give single modules their own numbers. The rank is seen in the
// tensor; the alpha has to be looked up, by PEFT's rule that a key matches a module whose path ends
// with it. Keys are regular expressions there and plain module names here: an expression from a
// file can take arbitrarily long to match, and PEFT itself writes names.
// Source: peft/tuners/lora/config.py, model.py and utils/save_and_load.py.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "engine/error.h"
#include "engine/os.h"
#include "engine/quantize.h"
#include "gguf-convert/adapter_formats.h"
#include "gguf-convert/json_fields.h"
#include "gguf-convert/names.h"
#include "gguf-convert/quoted.h"
#include "gguf-convert/safetensors.h"
#include "gguf-convert/staged_directory.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kWeights = "adapter_model.safetensors";
constexpr std::string_view kPrefix = "base_model.model.";

// null, false, [], {} and "" all say that a feature is not used.
bool is_used(const nlohmann::json* value) {
  if (value == nullptr) return false;
  if (value->is_boolean()) return value->get<bool>();
  if (value->is_string()) return !value->get<std::string>().empty();
  return !value->empty();
}

void refuse_variants(const JsonFields& fields, const std::string& path) {
  const std::string type = fields.string("peft_type", "");
  if (type != "LORA") {
    throw Unsupported(path + ": adapters of type " + nibble::quoted(type) +
                      " are not supported; supported is LORA");
  }
  for (const char* key :
       {"use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save",
        "layer_replication", "target_parameters", "trainable_token_indices", "kasa_config",
        "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config"}) {
    if (is_used(fields.find(key))) {
      throw Unsupported(path + ": " + key +
                        " is not supported; supported are plain A and B matrices on linears");
    }
  }
  const std::string bias = fields.string("bias", "none");
  if (bias != "none") {
    throw Unsupported(path + ": bias " + nibble::quoted(bias) +
                      " is not supported; supported is none");
  }
  const auto* init = fields.find("init_lora_weights");
  if (init != nullptr && init->is_string()) {
    const std::string name = init->get<std::string>();
    static const std::set<std::string> kPlain{"gaussian", "eva", "orthogonal", "true", "false"};
    if (kPlain.count(name) == 0) {
      throw Unsupported(path + ": init_lora_weights " + nibble::quoted(name) +
                        " changes the base as well; let PEFT convert the adapter to plain LoRA "
                        "(save_pretrained with path_initial_model_for_weight_conversion)");
    }
  }
}

double checked_alpha(double alpha, const std::string& path) {
  if (std::isfinite(alpha)) return alpha;
  throw FormatError(path, 0, "an alpha is not a finite number");
}

// Keys of alpha_pattern with the "\." of escaped names undone.
std::map<std::string, double> read_alpha_pattern(const JsonFields& fields,
                                                 const std::string& path) {
  std::map<std::string, double> pattern;
  const auto* object = fields.object("alpha_pattern");
  if (object == nullptr) return pattern;
  for (const auto& [key, value] : object->items()) {
    std::string name;
    for (std::size_t i = 0; i < key.size(); ++i) {
      if (key[i] == '\\' && i + 1 < key.size() && key[i + 1] == '.') continue;
      name += key[i];
    }
    const bool plain = std::all_of(name.begin(), name.end(), [](unsigned char c) {
      return std::isalnum(c) != 0 || c == '_' || c == '.';
    });
    if (!plain || name.empty()) {
      throw Unsupported(path + ": alpha_pattern key " + nibble::quoted(key) +
                        " is a regular expression; supported are module names");
    }
    if (!value.is_number()) {
      throw FormatError(path, 0, "alpha_pattern " + nibble::quoted(key) + " is not a number");
    }
    pattern[name] = checked_alpha(value.get<double>(), path);
  }
  return pattern;
}

double alpha_of(const std::string& module, double common,
                const std::map<std::string, double>& pattern, const std::string& path) {
  const double* found = nullptr;
  for (const auto& [key, alpha] : pattern) {
    const bool tail = module.size() > key.size() && module[module.size() - key.size() - 1] == '.' &&
                      module.compare(module.size() - key.size(), key.size(), key) == 0;
    if (!tail && module != key) continue;
    if (found != nullptr && *found != alpha) {
      throw Unsupported(path + ": several keys of alpha_pattern match " + module +
                        "; give each module one alpha");
    }
    found = &alpha;
  }
  return found == nullptr ? common : *found;
}

struct ParsedName {
  std::string base;  // GGUF name of the weight
  bool is_a;
};

// "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"; some writers leave the adapter
// name "default" in it.
ParsedName parse_name(const SafetensorsTensor& tensor) {
  std::string_view rest = tensor.name;
  if (rest.substr(0, kPrefix.size()) == kPrefix) rest.remove_prefix(kPrefix.size());
  for (const bool is_a : {true, false}) {
    for (const std::string_view suffix : {".weight", ".default.weight"}) {
      const std::string ending = std::string(is_a ? ".lora_A" : ".lora_B").append(suffix);
      if (rest.size() <= ending.size() || rest.substr(rest.size() - ending.size()) != ending) {
        continue;
      }
      const auto base = gguf_name(rest.substr(0, rest.size() - ending.size()));
      if (base && (is_decoder_linear(*base) || *base == "output")) {
        return {*base + ".weight", is_a};
      }
    }
  }
  throw Unsupported(tensor.file + ": tensor " + nibble::quoted(tensor.name) +
                    " is not supported; an adapter holds lora_A.weight and lora_B.weight of "
                    "linears of a llama");
}

AdapterMatrix read_matrix(const SafetensorsTensor& tensor) {
  const TensorType& type = tensor.type;
  if (!is_float(type.dtype) || type.shape.rank() != 2 || type.elements() == 0) {
    throw FormatError(tensor.file, tensor.offset,
                      nibble::quoted(tensor.name) + " is " + type.str() +
                          "; wanted a matrix of F32, F16 or BF16");
  }
  AdapterMatrix matrix{type.shape[0], type.shape[1], {}};
  matrix.values.resize(static_cast<std::size_t>(type.elements()));
  dequantize(type, tensor.bytes.data(), 0, matrix.values);
  return matrix;
}

std::map<std::string, AdapterPair> read_pairs(const std::string& path) {
  const SafetensorsFile file(path);
  std::map<std::string, AdapterPair> pairs;
  for (const SafetensorsTensor& tensor : file.tensors()) {
    const ParsedName name = parse_name(tensor);
    AdapterMatrix& matrix = name.is_a ? pairs[name.base].a : pairs[name.base].b;
    if (matrix.rows != 0) {
      throw FormatError(path, tensor.offset,
                        nibble::quoted(tensor.name) + " is there under two names");
    }
    matrix = read_matrix(tensor);
  }
  return pairs;
}

// "blk.0.attn_q.weight" -> "model.layers.0.self_attn.q_proj"
std::string module_of(const std::string& tensor) {
  const std::string name = hf_name(tensor).value_or(tensor);
  return name.substr(0, name.rfind('.'));
}

std::string leaf_of(const std::string& module) { return module.substr(module.rfind('.') + 1); }

// Leaf names ("q_proj") when each of them is adapted in the same blocks, from the first on; full
// paths otherwise, so that PEFT adds nothing where the adapter has nothing.
std::set<std::string> target_modules(const AdapterFile& adapter) {
  std::map<std::string, std::set<std::int64_t>> blocks;
  std::set<std::string> leaves, paths;
  std::int64_t last = -1;
  for (const AdapterTensor& tensor : adapter.tensors) {
    const std::string module = module_of(tensor.name);
    const std::int64_t block = block_of(tensor.name);
    paths.insert(module);
    leaves.insert(leaf_of(module));
    blocks[leaf_of(module)].insert(block);
    last = std::max(last, block);
  }
  const bool everywhere = std::all_of(blocks.begin(), blocks.end(), [&](const auto& entry) {
    return static_cast<std::int64_t>(entry.second.size()) == last + 1 || *entry.second.begin() < 0;
  });
  return everywhere ? leaves : paths;
}

// What most tensors have, so that the patterns stay short.
template <class Value, class Get>
Value most_common(const AdapterFile& adapter, Get&& get) {
  std::map<Value, std::size_t> counts;
  for (const AdapterTensor& tensor : adapter.tensors) ++counts[get(tensor)];
  return std::max_element(counts.begin(), counts.end(),
                          [](const auto& x, const auto& y) { return x.second < y.second; })
      ->first;
}

// PEFT writes whole alphas as integers.
nlohmann::json number(double value) {
  const auto whole = static_cast<std::int64_t>(value);
  if (std::abs(value) < 1e15 && static_cast<double>(whole) == value) return whole;
  return value;
}

std::string config_text(const AdapterFile& adapter) {
  const auto rank = most_common<std::int64_t>(adapter, [](const auto& t) { return t.rank; });
  const auto alpha = most_common<double>(adapter, [](const auto& t) { return t.alpha; });
  nlohmann::json ranks = nlohmann::json::object(), alphas = nlohmann::json::object();
  for (const AdapterTensor& tensor : adapter.tensors) {
    if (tensor.rank != rank) ranks[module_of(tensor.name)] = tensor.rank;
    if (tensor.alpha != alpha) alphas[module_of(tensor.name)] = number(tensor.alpha);
  }
  const nlohmann::json json = {
      {"alpha_pattern", alphas},
      {"auto_mapping", nullptr},
      {"base_model_name_or_path", adapter.base_name},
      {"bias", "none"},
      {"fan_in_fan_out", false},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"layers_pattern", nullptr},
      {"layers_to_transform", nullptr},
      {"lora_alpha", number(alpha)},
      {"lora_dropout", adapter.dropout},
      {"modules_to_save", nullptr},
      {"peft_type", "LORA"},
      {"r", rank},
      {"rank_pattern", ranks},
      {"revision", nullptr},
      {"target_modules", target_modules(adapter)},
      {"task_type", "CAUSAL_LM"},
      {"use_dora", false},
      {"use_rslora", adapter.use_rslora},
  };
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace

AdapterFile read_peft(const std::string& directory) {
  const std::string path = (fs::path(directory) / kConfig).string();
  const std::string weights = (fs::path(directory) / kWeights).string();
  if (!fs::exists(path)) {
    throw Error(directory + ": there is no " + kConfig +
                "; an adapter is a PEFT directory or a GGUF LoRA");
  }
  const nlohmann::json json = parse_json_object(os::read_file(path), path);
  const JsonFields fields(json, path);
  refuse_variants(fields, path);
  if (!fs::exists(weights) && fs::exists(fs::path(directory) / "adapter_model.bin")) {
    throw Unsupported(directory + ": adapter_model.bin is not supported; supported is " + kWeights);
  }
  AdapterFile adapter;
  adapter.tensors = join_pairs(read_pairs(weights), weights);
  adapter.rope_style = RopeStyle::half;
  adapter.base_name = fields.string("base_model_name_or_path", "");
  adapter.use_rslora = fields.boolean("use_rslora", false);
  adapter.dropout = fields.real("lora_dropout", 0.0);
  const double alpha = checked_alpha(fields.real("lora_alpha", 8.0), path);
  const std::int64_t rank = fields.integer("r", 8);
  const auto pattern = read_alpha_pattern(fields, path);
  for (AdapterTensor& tensor : adapter.tensors) {
    if (tensor.rank != rank && !is_used(fields.find("rank_pattern"))) {
      throw FormatError(path, 0,
                        "r is " + std::to_string(rank) + ", but " + tensor.name + " has rank " +
                            std::to_string(tensor.rank) + " and there is no rank_pattern");
    }
    tensor.alpha = alpha_of(module_of(tensor.name), alpha, pattern, path);
  }
  return adapter;
}

void write_peft(const AdapterFile& adapter, const std::string& directory) {
  if (adapter.tensors.empty()) throw Error(directory + ": the adapter has no tensors to write");
  AdapterFile stock = adapter;
  set_rope_style(stock, RopeStyle::half);

  StagedDirectory staged(directory, kConfig);
  SafetensorsWriter writer(staged.file(kWeights));
  for (const AdapterTensor& tensor : stock.tensors) {
    const std::string module = std::string(kPrefix) + module_of(tensor.name);
    writer.add(module + ".lora_A.weight", {DType::F32, {tensor.rank, tensor.in}, {}});
    writer.add(module + ".lora_B.weight", {DType::F32, {tensor.out, tensor.rank}, {}});
  }
  writer.begin();
  for (const AdapterTensor& tensor : stock.tensors) {
    writer.write(std::as_bytes(std::span<const float>(tensor.a)));
    writer.write(std::as_bytes(std::span<const float>(tensor.b)));
  }
  writer.finish();
  os::write_file(staged.file(kConfig), config_text(stock));
  staged.commit();
}

}  // namespace nibble
