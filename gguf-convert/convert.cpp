// What each tensor becomes, and its bytes.
#include "gguf-convert/convert.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "engine/quantize.h"
#include "gguf-convert/names.h"

namespace nibble {
namespace {

constexpr const char* kTypes = "nf4, f32, f16, bf16, q8_0";

bool is_head(const Checkpoint& source, const std::string& name) {
  return name == (source.config().tied_embeddings ? "token_embd.weight" : "output.weight");
}

bool is_excluded(const ConvertOptions& options, const std::string& name) {
  if (!options.no_quant) return false;
  return std::regex_search(name, *options.no_quant) ||
         std::regex_search(hf_name(name).value_or(name), *options.no_quant);
}

// The type of a matrix that the conversion leaves alone. F64 is for debugging and no model is
// published in it; planes exist in NF4 files only.
TensorType kept(const TensorType& type, const ConvertOptions& options) {
  TensorType result = type;
  if (type.dtype == DType::F64) result.dtype = DType::F32;
  const bool narrow = options.type == DType::NF4 && result.dtype == DType::F32;
  const bool planes = is_plane(type.dtype) && options.type != DType::NF4;
  if (narrow || planes) result.dtype = DType::BF16;
  if (options.container == Container::huggingface) result.dtype = options.type;
  return result;
}

TensorType matrix_of(DType dtype, const TensorType& type, const ConvertOptions& options) {
  if (dtype == DType::NF4 && type.dtype == DType::NF4 && type.quant.block == options.quant.block &&
      type.quant.double_quant == options.quant.double_quant) {
    return type;  // with its own absmax map, if it has one
  }
  TensorType result{dtype, type.shape, {}};
  if (dtype == DType::NF4) result.quant = options.quant;
  if (is_block(dtype) && type.shape.cols() % info(dtype).block != 0) result.dtype = DType::F16;
  return result;
}

// out += scale * B A, rows [begin, ...) of B.
void merge(const AdapterTensor& adapter, double scale, std::int64_t begin, std::span<float> out) {
  const auto cols = static_cast<std::size_t>(adapter.in);
  const auto rank = static_cast<std::size_t>(adapter.rank);
  const auto factor = static_cast<float>(scale);
  std::vector<float> delta(cols);
  for (std::size_t row = 0; row * cols < out.size(); ++row) {
    std::fill(delta.begin(), delta.end(), 0.0f);
    const float* b = adapter.b.data() + (static_cast<std::size_t>(begin) + row) * rank;
    for (std::size_t k = 0; k < rank; ++k) {
      const float* a = adapter.a.data() + k * cols;
      for (std::size_t i = 0; i < cols; ++i) delta[i] += b[k] * a[i];
    }
    float* w = out.data() + row * cols;
    for (std::size_t i = 0; i < cols; ++i) w[i] += factor * delta[i];
  }
}

// Copies stored rows as they are, reordered when the style asks for it.
void copy_rows(const Checkpoint& source, const Checkpoint::Tensor& tensor, RopeStyle style,
               std::int64_t begin, std::int64_t end, std::span<std::byte> out) {
  const RopeStyle from = source.config().rope_style;
  const bool reorder = from != style && has_rope_rows(tensor.name);
  std::span<const std::byte> stored = source.mapped(tensor);
  std::vector<std::byte> copy;
  if (stored.empty()) {
    copy.resize(static_cast<std::size_t>(bytes(tensor.type)));
    source.read(tensor, copy);
    stored = copy;
  }
  const auto row_bytes = static_cast<std::int64_t>(stored.size()) / tensor.type.shape.rows();
  if (!reorder) {
    const auto part = stored.subspan(static_cast<std::size_t>(begin * row_bytes), out.size());
    std::copy(part.begin(), part.end(), out.begin());
    return;
  }
  const std::int64_t head_dim = source.config().head_dim;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t at = rope_source_row(row, head_dim, from, style);
    std::memcpy(out.data() + (row - begin) * row_bytes, stored.data() + at * row_bytes,
                static_cast<std::size_t>(row_bytes));
  }
}

void check_options(const Checkpoint& source, const ConvertOptions& options) {
  const bool plain = is_float(options.type) && options.type != DType::F64;
  if (options.container == Container::huggingface && !plain) {
    throw UsageError("a Hugging Face directory holds f32, f16 or bf16, not " +
                     std::string(name(options.type)) +
                     "; name a destination that ends in .gguf, or another --type");
  }
  if (options.container == Container::huggingface && options.head) {
    throw UsageError("--head has no meaning for a Hugging Face directory: one type for all");
  }
  if (options.head == DType::NF4 && options.type != DType::NF4) {
    throw UsageError("--head nf4 needs --type nf4");
  }
  if (options.type == DType::NF4) {
    planes({DType::NF4, {source.config().hidden}, options.quant});  // checks the block
  }
}

std::string count_of(std::size_t count, const char* what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

// What the user should know before trusting the result; every kind of remark once.
std::vector<std::string> remarks(const Checkpoint& source, const ConvertPlan& plan,
                                 const ConvertOptions& options) {
  std::size_t again = 0, merged = 0, not_whole = 0;
  const PlannedTensor* odd = nullptr;
  for (const PlannedTensor& planned : plan.tensors) {
    const TensorType &from = planned.source->type, &to = planned.target;
    const bool quantized = !is_float(to.dtype);
    const bool copied = is_copied(source, *planned.source, to, plan.style);
    if (quantized && !is_float(from.dtype) && !copied) ++again;
    if (quantized && planned.adapter != nullptr) ++merged;
    const bool wanted_blocks = options.type == DType::Q8_0 || options.head == DType::Q8_0;
    if (wanted_blocks && to.dtype == DType::F16 && from.dtype != DType::F16 &&
        to.shape.cols() % info(DType::Q8_0).block != 0) {
      if (not_whole++ == 0) odd = &planned;
    }
  }
  std::vector<std::string> lines;
  if (again > 0) {
    lines.push_back("warning: " + count_of(again, "tensor") +
                    " of the source are quantized already; this is a second quantization and "
                    "loses more than one from 16-bit weights");
  }
  if (merged > 0) {
    lines.push_back("warning: the adapter is merged into " + count_of(merged, "tensor") +
                    " that are then quantized, which loses part of what was trained; f16 or bf16 "
                    "keeps it");
  }
  if (not_whole > 0) {
    lines.push_back("note: " + count_of(not_whole, "tensor") + " become F16: rows of " +
                    std::to_string(odd->target.shape.cols()) + " elements (" + odd->source->name +
                    ") are not whole Q8_0 blocks of " + std::to_string(info(DType::Q8_0).block));
  }
  return lines;
}

}  // namespace

DType output_type(const std::string& name) {
  const auto dtype = dtype_from_name(name);
  static constexpr std::array kWritten = {DType::NF4, DType::F32, DType::F16, DType::BF16,
                                          DType::Q8_0};
  if (dtype && std::find(kWritten.begin(), kWritten.end(), *dtype) != kWritten.end()) {
    return *dtype;
  }
  const std::string lower = name;
  const bool known =
      dtype || lower == "q4_k_m" || lower == "q5_k_m" || lower == "q4_k_s" || lower == "q5_k_s";
  const std::string message =
      "type " + name + (known ? " cannot be written" : " does not exist") + "; types are " + kTypes;
  if (known) throw Unsupported(message);
  throw UsageError(message);
}

std::regex name_pattern(const std::string& text) {
  try {
    return std::regex(text, std::regex::ECMAScript | std::regex::optimize);
  } catch (const std::regex_error& e) {
    throw UsageError("\"" + text + "\" is not a regular expression: " + e.what());
  }
}

RopeStyle converted_rope_style(const ConvertOptions& options) {
  const bool half = options.type == DType::NF4 || options.container == Container::huggingface;
  return half ? RopeStyle::half : RopeStyle::adjacent;
}

TensorType converted_type(const Checkpoint& source, const Checkpoint::Tensor& tensor,
                          const ConvertOptions& options) {
  const TensorType& type = tensor.type;
  const bool huggingface = options.container == Container::huggingface;
  if (type.shape.rank() == 1) return {huggingface ? options.type : DType::F32, type.shape, {}};
  if (huggingface) return {options.type, type.shape, {}};
  if (options.head && is_head(source, tensor.name)) return matrix_of(*options.head, type, options);
  const bool converted = options.type != DType::NF4 || is_decoder_linear(tensor.name);
  if (!converted || is_excluded(options, tensor.name)) return kept(type, options);
  return matrix_of(options.type, type, options);
}

void source_rows(const Checkpoint& source, const Checkpoint::Tensor& tensor, RopeStyle style,
                 const AdapterTensor* adapter, double scale, std::int64_t begin,
                 std::span<float> out) {
  const RopeStyle from = source.config().rope_style;
  const std::int64_t cols = tensor.type.shape.cols();
  const auto width = static_cast<std::size_t>(cols);
  if (from == style || !has_rope_rows(tensor.name)) {
    source.read_f32(tensor, begin * cols, out);
  } else {
    for (std::size_t row = 0; row * width < out.size(); ++row) {
      const std::int64_t at = rope_source_row(begin + static_cast<std::int64_t>(row),
                                              source.config().head_dim, from, style);
      source.read_f32(tensor, at * cols, out.subspan(row * width, width));
    }
  }
  if (adapter != nullptr) merge(*adapter, scale, begin, out);
}

bool is_copied(const Checkpoint& source, const Checkpoint::Tensor& tensor, const TensorType& target,
               RopeStyle style) {
  // Rows of planes have no bytes of their own, so a reordered tensor is quantized anew.
  const bool reorder = source.config().rope_style != style && has_rope_rows(tensor.name);
  return target == tensor.type && !(is_plane(target.dtype) && reorder);
}

void convert_rows(const Checkpoint& source, const Checkpoint::Tensor& tensor,
                  const TensorType& target, RopeStyle style, const AdapterTensor* adapter,
                  double scale, std::int64_t begin, std::int64_t end, std::span<std::byte> out) {
  const std::int64_t cols = target.shape.cols();
  const bool whole = begin == 0 && end == target.shape.rows();
  if (is_plane(target.dtype) && !whole) throw Error(tensor.name + ": planes are made whole");
  const bool copied = adapter == nullptr && is_copied(source, tensor, target, style);
  if (copied && is_plane(target.dtype)) {
    source.read(tensor, out);
  } else if (copied) {
    copy_rows(source, tensor, style, begin, end, out);
  } else {
    std::vector<float> values(static_cast<std::size_t>((end - begin) * cols));
    source_rows(source, tensor, style, adapter, scale, begin, values);
    TensorType part = target;
    if (!whole) part.shape = {end - begin, cols};
    try {
      quantize(part, values, out);
    } catch (const Unsupported&) {
      throw;
    } catch (const Error& e) {
      throw Error(tensor.file + ": " + tensor.name + ": " + e.what());
    }
  }
}

void convert_tensor(const Checkpoint& source, const Checkpoint::Tensor& tensor,
                    const TensorType& target, RopeStyle style, std::span<std::byte> out) {
  convert_rows(source, tensor, target, style, nullptr, 0.0, 0, target.shape.rows(), out);
}

ConvertPlan plan_conversion(const Checkpoint& source, const ConvertOptions& options,
                            const AdapterFile* adapter) {
  check_options(source, options);
  ConvertPlan plan;
  plan.style = converted_rope_style(options);
  for (const Checkpoint::Tensor& tensor : source.tensors()) {
    PlannedTensor planned{&tensor, converted_type(source, tensor, options), nullptr};
    if (adapter != nullptr) planned.adapter = adapter->find(tensor.name);
    const bool encoded =
        planned.adapter != nullptr || !is_copied(source, tensor, planned.target, plan.style);
    if (encoded && !can_quantize(planned.target.dtype)) {
      planned.target = {DType::BF16, tensor.type.shape, {}};
    }
    plan.bytes += bytes(planned.target);
    plan.tensors.push_back(planned);
  }
  plan.warnings = remarks(source, plan, options);
  return plan;
}

}  // namespace nibble
