// GGUF LoRA files, as llama.cpp reads and writes them: NAME.lora_a is PEFT's A, NAME.lora_b is B
// with the rows of q and k in adjacent order; one adapter.lora.alpha for all, scale = alpha / rank
// with each tensor's own rank. A missing or zero alpha means scale 1.
//
// The head size of the base is kept in nibble.rope.head_dim, which other readers ignore, so that
// the way back to PEFT does not need the base. Source: llama.cpp convert_lora_to_gguf.py and
// llama_adapter_lora_init_impl.
#include <cmath>
#include <map>

#include "engine/error.h"
#include "engine/quantize.h"
#include "gguf-convert/adapter_formats.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/names.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

constexpr const char* kAlphaKey = "adapter.lora.alpha";
constexpr const char* kHeadDimKey = "nibble.rope.head_dim";
constexpr const char* kBaseNameKey = "general.base_model.0.name";

bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() > suffix.size() &&
         text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

void check_header(const GgufFile& file) {
  const std::string& path = file.path();
  if (file.string("general.type", "") != "adapter") {
    throw FormatError(path, 0, "general.type is not \"adapter\"; this is not a LoRA file");
  }
  const std::string type = file.string("adapter.type", "");
  if (type != "lora") {
    throw Unsupported(path + ": adapters of type " + nibble::quoted(type) +
                      " are not supported; supported is lora");
  }
  const std::string architecture = file.string("general.architecture", "");
  if (architecture != "llama") {
    throw Unsupported(path + ": an adapter for architecture " + nibble::quoted(architecture) +
                      " is not supported; supported is llama");
  }
  if (file.has("adapter.alora.invocation_tokens")) {
    throw Unsupported(path + ": activated LoRA (alora) is not supported");
  }
}

AdapterMatrix read_matrix(const GgufFile& file, const GgufTensor& tensor) {
  const TensorType& type = tensor.type;
  if (type.shape.rank() != 2 || type.elements() == 0 ||
      !(is_float(type.dtype) || is_block(type.dtype))) {
    throw FormatError(
        file.path(), tensor.offset,
        nibble::quoted(tensor.name) + " is " + type.str() + "; wanted a matrix of numbers");
  }
  AdapterMatrix matrix{type.shape[0], type.shape[1], {}};
  matrix.values.resize(static_cast<std::size_t>(type.elements()));
  dequantize(type, tensor.bytes.data(), 0, matrix.values);
  return matrix;
}

// alpha' with alpha' / rank == scale for every tensor.
float common_alpha(const AdapterFile& adapter) {
  double alpha = 0;
  for (const AdapterTensor& tensor : adapter.tensors) {
    const double own = adapter.use_rslora
                           ? tensor.alpha * std::sqrt(static_cast<double>(tensor.rank))
                           : tensor.alpha;
    if (alpha != 0 && std::abs(own - alpha) > 1e-9 * std::abs(alpha)) {
      throw Unsupported("a GGUF LoRA has one alpha for all tensors, but " + tensor.name +
                        " needs " + std::to_string(own) + " and others " + std::to_string(alpha) +
                        "; write a PEFT directory instead");
    }
    alpha = own;
  }
  if (alpha == 0) {
    throw Unsupported("a GGUF LoRA cannot say alpha 0; write a PEFT directory instead");
  }
  return static_cast<float>(alpha);
}

}  // namespace

AdapterFile read_gguf_lora(const std::string& path) {
  const GgufFile file(path);
  check_header(file);
  std::map<std::string, AdapterPair> pairs;
  for (const GgufTensor& tensor : file.tensors()) {
    const bool is_a = ends_with(tensor.name, ".lora_a"), is_b = ends_with(tensor.name, ".lora_b");
    const std::string base = tensor.name.substr(0, tensor.name.size() - 7);
    if ((!is_a && !is_b) || (!is_decoder_linear(base) && base != "output.weight")) {
      throw Unsupported(path + ": tensor " + nibble::quoted(tensor.name) +
                        " is not supported; an adapter holds lora_a and lora_b of linears");
    }
    AdapterPair& pair = pairs[base];
    (is_a ? pair.a : pair.b) = read_matrix(file, tensor);
  }
  AdapterFile adapter;
  adapter.tensors = join_pairs(std::move(pairs), path);
  adapter.rope_style = RopeStyle::adjacent;
  adapter.base_name = file.string(kBaseNameKey, "");
  adapter.head_dim = file.integer(kHeadDimKey, 0);
  const double alpha = file.real(kAlphaKey, 0.0);
  if (!std::isfinite(alpha)) {
    throw FormatError(path, 0, std::string(kAlphaKey) + " is not a number");
  }
  for (AdapterTensor& tensor : adapter.tensors) {
    tensor.alpha = alpha == 0 ? static_cast<double>(tensor.rank) : alpha;
  }
  return adapter;
}

void write_gguf_lora(const AdapterFile& adapter, const std::string& path) {
  const float alpha = common_alpha(adapter);
  AdapterFile stock = adapter;
  set_rope_style(stock, RopeStyle::adjacent);

  GgufWriter writer(path);
  writer.set_string("general.architecture", "llama");
  writer.set_string("general.type", "adapter");
  if (!stock.base_name.empty()) {
    writer.set_u32("general.base_model.count", 1);
    writer.set_string(kBaseNameKey, stock.base_name);
  }
  writer.set_u32("general.file_type", 0);
  writer.set_u32("general.quantization_version", 2);
  writer.set_string("adapter.type", "lora");
  writer.set_f32(kAlphaKey, alpha);
  if (stock.head_dim > 0) {
    writer.set_u32(kHeadDimKey, static_cast<std::uint32_t>(stock.head_dim));
  }
  for (const AdapterTensor& tensor : stock.tensors) {
    writer.add(tensor.name + ".lora_a", {DType::F32, {tensor.rank, tensor.in}, {}});
    writer.add(tensor.name + ".lora_b", {DType::F32, {tensor.out, tensor.rank}, {}});
  }
  writer.begin();
  for (const AdapterTensor& tensor : stock.tensors) {
    writer.write(std::as_bytes(std::span<const float>(tensor.a)));
    writer.write(std::as_bytes(std::span<const float>(tensor.b)));
  }
  writer.finish();
}

}  // namespace nibble
