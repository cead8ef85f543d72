#include "gguf-convert/adapter.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <tuple>

#include "engine/error.h"
#include "gguf-convert/adapter_formats.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/names.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

// Order inside a block; anything unknown goes last, and check_adapter() refuses it later.
std::tuple<std::int64_t, std::size_t, std::string> model_order(const std::string& name) {
  static constexpr std::string_view kOrder[] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                                "ffn_gate", "ffn_up", "ffn_down"};
  std::size_t member = 0;
  while (member < std::size(kOrder) &&
         name.find(std::string(".").append(kOrder[member]).append(".")) == std::string::npos) {
    ++member;
  }
  const std::int64_t block = block_of(name);
  return {block < 0 ? INT64_MAX : block, member, name};
}

}  // namespace

double AdapterFile::scale(const AdapterTensor& tensor) const {
  const auto rank = static_cast<double>(tensor.rank);
  return tensor.alpha / (use_rslora ? std::sqrt(rank) : rank);
}

const AdapterTensor* AdapterFile::find(const std::string& name) const {
  for (const AdapterTensor& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

bool is_adapter(const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error))
    return fs::exists(fs::path(path) / "adapter_config.json", error);
  if (fs::path(path).extension() != ".gguf" || !fs::exists(path, error)) return false;
  try {
    return GgufFile(path).string("general.type", "") == "adapter";
  } catch (const Error&) {
    return false;  // opening it as a model says what is wrong with it
  }
}

std::vector<AdapterTensor> join_pairs(std::map<std::string, AdapterPair>&& pairs,
                                      const std::string& path) {
  if (pairs.empty()) throw FormatError(path, 0, "the adapter has no LoRA tensors");
  std::vector<AdapterTensor> tensors;
  for (auto& [name, pair] : pairs) {
    if (pair.a.rows == 0 || pair.b.rows == 0) {
      throw FormatError(path, 0,
                        "the adapter of " + nibble::quoted(name) + " has no " +
                            (pair.a.rows == 0 ? "A" : "B") + " matrix");
    }
    if (pair.a.rows != pair.b.cols) {
      throw FormatError(path, 0,
                        "the adapter of " + nibble::quoted(name) + " has rank " +
                            std::to_string(pair.a.rows) + " in A but " +
                            std::to_string(pair.b.cols) + " in B");
    }
    AdapterTensor tensor;
    tensor.name = name;
    tensor.in = pair.a.cols;
    tensor.out = pair.b.rows;
    tensor.rank = pair.a.rows;
    tensor.a = std::move(pair.a.values);
    tensor.b = std::move(pair.b.values);
    tensors.push_back(std::move(tensor));
  }
  std::sort(tensors.begin(), tensors.end(), [](const AdapterTensor& x, const AdapterTensor& y) {
    return model_order(x.name) < model_order(y.name);
  });
  return tensors;
}

AdapterFile read_adapter(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) {
    throw Error(path + ": no such file or directory; an adapter is a PEFT directory or a .gguf");
  }
  return fs::is_directory(path, error) ? read_peft(path) : read_gguf_lora(path);
}

AdapterFile read_adapter(const std::string& path, const ModelConfig& base) {
  AdapterFile adapter = read_adapter(path);
  check_adapter(adapter, base, path);
  adapter.head_dim = base.head_dim;
  set_rope_style(adapter, base.rope_style);
  return adapter;
}

void check_adapter(const AdapterFile& adapter, const ModelConfig& base, const std::string& path) {
  std::map<std::string, Shape> shapes;
  for (const TensorSpec& spec : model_tensors(base)) shapes.emplace(spec.name, spec.shape);
  for (const AdapterTensor& tensor : adapter.tensors) {
    const auto found = shapes.find(tensor.name);
    if (found == shapes.end()) {
      throw ShapeError(path + ": the adapter changes " + nibble::quoted(tensor.name) +
                       ", which the base does not have; it was trained on " +
                       nibble::quoted(adapter.base_name));
    }
    const Shape wanted{tensor.out, tensor.in};
    if (!(found->second == wanted)) {
      throw ShapeError(path + ": the adapter of " + tensor.name + " is for a weight of shape " +
                       wanted.str() + ", the base has " + found->second.str() +
                       "; it was trained on " + nibble::quoted(adapter.base_name));
    }
  }
}

void set_rope_style(AdapterFile& adapter, RopeStyle style) {
  if (style == adapter.rope_style) return;
  for (AdapterTensor& tensor : adapter.tensors) {
    if (!has_rope_rows(tensor.name)) continue;
    if (adapter.head_dim <= 0 || adapter.head_dim % 2 != 0 || tensor.out % adapter.head_dim != 0) {
      throw Error("the rows of " + tensor.name +
                  " have to be reordered by head, and the head size of the base is " +
                  (adapter.head_dim <= 0 ? "not known" : std::to_string(adapter.head_dim)) +
                  "; name the base model");
    }
    std::vector<float> reordered(tensor.b.size());
    reorder_rope_rows(std::as_bytes(std::span<const float>(tensor.b)),
                      std::as_writable_bytes(std::span<float>(reordered)),
                      tensor.rank * static_cast<std::int64_t>(sizeof(float)), adapter.head_dim,
                      adapter.rope_style, style);
    tensor.b = std::move(reordered);
  }
  adapter.rope_style = style;
}

}  // namespace nibble
