#include "engine/dtype.h"

#include <algorithm>
#include <cctype>

#include "engine/error.h"

namespace nibble {
namespace {

constexpr std::array<DTypeInfo, 21> kInfo = {{
    {"F64", 1, 8},      {"F32", 1, 4},      {"BF16", 1, 2},     {"F16", 1, 2},
    {"I64", 1, 8},      {"I32", 1, 4},      {"I8", 1, 1},       {"U8", 1, 1},
    {"NF4", 2, 1},      {"FP4", 2, 1},      {"INT4", 2, 1},     {"Q4_0", 32, 18},
    {"Q4_1", 32, 20},   {"Q5_0", 32, 22},   {"Q5_1", 32, 24},   {"Q8_0", 32, 34},
    {"Q2_K", 256, 84},  {"Q3_K", 256, 110}, {"Q4_K", 256, 144}, {"Q5_K", 256, 176},
    {"Q6_K", 256, 210},
}};
static_assert(kInfo.size() == static_cast<std::size_t>(DType::Q6_K) + 1);

}  // namespace

const DTypeInfo& info(DType dtype) { return kInfo[static_cast<std::size_t>(dtype)]; }

std::optional<DType> dtype_from_name(std::string_view name) {
  std::string upper(name);
  std::transform(upper.begin(), upper.end(), upper.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  for (std::size_t i = 0; i < kInfo.size(); ++i) {
    if (kInfo[i].name == upper) return static_cast<DType>(i);
  }
  return std::nullopt;
}

Shape::Shape(std::initializer_list<std::int64_t> extents)
    : Shape(std::span<const std::int64_t>(extents.begin(), extents.size())) {}

Shape::Shape(std::span<const std::int64_t> extents) {
  if (extents.size() > extents_.size()) throw ShapeError("a shape has at most 4 extents");
  for (const std::int64_t extent : extents) {
    if (extent < 0) throw ShapeError("a shape has a negative extent");
    extents_[rank_++] = extent;
  }
}

std::int64_t Shape::elements() const {
  std::int64_t product = 1;
  for (int i = 0; i < rank_; ++i) {
    if (extents_[i] != 0 && product > (std::int64_t{1} << 62) / extents_[i]) {
      throw ShapeError("shape " + str() + " has more than 2^62 elements");
    }
    product *= extents_[i];
  }
  return product;
}

std::int64_t Shape::rows() const {
  std::int64_t product = 1;
  for (int i = 0; i + 1 < rank_; ++i) product *= extents_[i];
  return product;
}

std::string Shape::str() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(extents_[i]);
  }
  return text + "]";
}

std::string TensorType::str() const { return std::string(name(dtype)) + shape.str(); }

Planes planes(const TensorType& type, std::int64_t alignment) {
  const std::int64_t block = type.quant.block;
  if (block < 32 || block > 4096 || (block & (block - 1)) != 0) {
    throw ShapeError("quantization block " + std::to_string(block) +
                     " is not a power of two from 32 to 4096");
  }
  const std::int64_t count = type.elements();
  Planes p;
  p.blocks = (count + block - 1) / block;
  std::int64_t end = 0;
  const auto append = [&](std::int64_t& offset, std::int64_t& size, std::int64_t plane_bytes) {
    offset = end;
    size = plane_bytes;
    end = round_up(end + plane_bytes, alignment);
  };
  append(p.codes, p.codes_bytes, (count + 1) / 2);
  append(p.absmax, p.absmax_bytes, type.quant.double_quant ? p.blocks : 4 * p.blocks);
  if (type.quant.double_quant) {
    append(p.scale, p.scale_bytes, 4 * ((p.blocks + 255) / 256));
    append(p.offset, p.offset_bytes, 4);
    if (type.quant.custom_map) append(p.map, p.map_bytes, 4 * 256);
  }
  p.bytes = end;
  return p;
}

std::int64_t bytes(const TensorType& type) {
  if (is_plane(type.dtype)) return planes(type).bytes;
  const DTypeInfo& i = info(type.dtype);
  if (type.shape.cols() % i.block != 0) {
    throw ShapeError(type.str() + ": a row of " + std::to_string(type.shape.cols()) +
                     " elements is not whole blocks of " + std::to_string(i.block));
  }
  return type.elements() / i.block * i.block_bytes;
}

}  // namespace nibble
