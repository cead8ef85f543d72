// The entry points of engine/quantize.h: argument checks, the choice of a family, and the plain
// types. The families are in quantize_planes.cpp (NF4, FP4) and quantize_blocks.cpp (ggml).
#include "engine/quantize.h"

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/quantize_codecs.h"

namespace nibble {
namespace {

void encode_plain(DType dtype, std::span<const float> values, std::span<std::byte> out) {
  if (values.empty()) return;
  if (dtype == DType::F32) {
    std::memcpy(out.data(), values.data(), values.size_bytes());
    return;
  }
  auto* at = out.data();
  for (const float value : values) {
    const std::uint16_t bits = dtype == DType::F16 ? to_f16(value).bits : to_bf16(value).bits;
    std::memcpy(at, &bits, sizeof bits);
    at += sizeof bits;
  }
}

template <typename Stored, typename Convert>
void decode_each(const std::byte* data, std::span<float> out, Convert convert) {
  for (float& value : out) {
    Stored stored;
    std::memcpy(&stored, data, sizeof stored);
    value = convert(stored);
    data += sizeof stored;
  }
}

bool decode_plain(DType dtype, const std::byte* data, std::int64_t begin, std::span<float> out) {
  data += begin * info(dtype).block_bytes;
  switch (dtype) {
    case DType::F64:
      decode_each<double>(data, out, [](double v) { return static_cast<float>(v); });
      return true;
    case DType::F32:
      decode_each<float>(data, out, [](float v) { return v; });
      return true;
    case DType::F16:
      decode_each<f16>(data, out, [](f16 v) { return to_float(v); });
      return true;
    case DType::BF16:
      decode_each<bf16>(data, out, [](bf16 v) { return to_float(v); });
      return true;
    default:
      return false;
  }
}

// Whole blocks go straight to `out`, the pieces at the ends through a buffer.
void decode_blocks(DType dtype, const std::byte* data, std::int64_t begin, std::span<float> out) {
  const DTypeInfo& layout = info(dtype);
  const auto block = static_cast<std::size_t>(layout.block);
  float buffer[256];
  data += begin / layout.block * layout.block_bytes;
  auto skip = static_cast<std::size_t>(begin % layout.block);
  while (!out.empty()) {
    const std::size_t count = std::min(block - skip, out.size());
    if (count == block) {
      codecs::dequantize_block(dtype, data, out.data());
    } else {
      codecs::dequantize_block(dtype, data, buffer);
      std::copy_n(buffer + skip, count, out.data());
    }
    out = out.subspan(count);
    data += layout.block_bytes;
    skip = 0;
  }
}

}  // namespace

bool can_quantize(DType dtype) {
  switch (dtype) {
    case DType::F32:
    case DType::F16:
    case DType::BF16:
    case DType::NF4:
    case DType::FP4:
    case DType::Q8_0:
    case DType::Q4_0:
    case DType::Q4_1:
      return true;
    default:
      return false;
  }
}

void quantize(const TensorType& type, std::span<const float> values, std::span<std::byte> out) {
  if (!can_quantize(type.dtype)) {
    throw Unsupported("quantize: cannot encode " + std::string(name(type.dtype)) +
                      "; supported are F32, F16, BF16, NF4, FP4, Q8_0, Q4_0 and Q4_1");
  }
  if (static_cast<std::int64_t>(values.size()) != type.elements() ||
      static_cast<std::int64_t>(out.size()) != bytes(type)) {
    throw ShapeError("quantize: " + type.str() + " wants " + std::to_string(type.elements()) +
                     " values and " + std::to_string(bytes(type)) + " bytes, got " +
                     std::to_string(values.size()) + " and " + std::to_string(out.size()));
  }
  if (is_plane(type.dtype)) return codecs::quantize_planes(type, values, out);
  if (is_block(type.dtype)) return codecs::quantize_blocks(type.dtype, values, out);
  encode_plain(type.dtype, values, out);
}

void dequantize(const TensorType& type, const std::byte* data, std::int64_t begin,
                std::span<float> out) {
  const std::int64_t count = type.elements();
  if (begin < 0 || begin > count || static_cast<std::int64_t>(out.size()) > count - begin) {
    throw ShapeError("dequantize: elements " + std::to_string(begin) + " to " +
                     std::to_string(begin + static_cast<std::int64_t>(out.size())) +
                     " are not inside " + type.str());
  }
  if (type.dtype == DType::NF4 || type.dtype == DType::FP4) {
    return codecs::dequantize_planes(type, data, begin, out);
  }
  if (is_block(type.dtype)) return decode_blocks(type.dtype, data, begin, out);
  if (!decode_plain(type.dtype, data, begin, out)) {
    throw Unsupported("dequantize: cannot decode " + type.str() +
                      " to real values; wanted a float type, NF4, FP4 or a ggml block type");
  }
}

}  // namespace nibble
