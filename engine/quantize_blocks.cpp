// ggml's block formats: encoders of Q4_0, Q4_1 and Q8_0 with ggml's bytes, decoders of those and
// of Q5_0, Q5_1 and Q2_K to Q6_K.
//
// A block of 32 (or 256, "K") consecutive elements of a row stores small integers and half
// precision scales. In the blocks of 32, byte j holds element j in its low and element j + 16 in
// its high half. Values are computed in ggml's F32 order: (d * scale) * q, then minus (dmin * min).
// K types are decoded only: making them well is a search, and nobody trains from one made here.
// Source: ggml src/ggml-common.h and src/ggml-quants.c.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/float16.h"
#include "engine/quantize_codecs.h"

namespace nibble::codecs {
namespace {

using Byte = std::uint8_t;
constexpr int kSmall = 32;
constexpr float kNothing = -0.0f;  // x + -0 is x, for the zeros of both signs too

float half_at(const Byte* at) {
  f16 value;
  std::memcpy(&value, at, sizeof value);
  return to_float(value);
}

// A scale must stay finite as a half, or the whole block would decode to infinities and NaN.
void store_half(Byte* at, float value, std::int64_t begin, DType dtype) {
  const f16 half = to_f16(value);
  if (std::isinf(to_float(half))) {
    throw Error("quantize: the values from element " + std::to_string(begin) + " on are too large" +
                " for " + std::string(name(dtype)) +
                ", whose scales are half precision; choose NF4, BF16 or F32");
  }
  std::memcpy(at, &half, sizeof half);
}

// 1/d as ggml has it. Where it overflows, d is zero as a half and every code gives zero.
float inverse_or_zero(float d) {
  const float inverse = 1.0f / d;
  return d == 0.0f || std::isinf(inverse) ? 0.0f : inverse;
}

void encode_q8_0(const float* x, std::int64_t begin, float absmax, Byte* out) {
  const float d = absmax / 127.0f;
  const float inverse = inverse_or_zero(d);
  store_half(out, d, begin, DType::Q8_0);
  for (int i = 0; i < kSmall; ++i) {
    out[2 + i] = static_cast<Byte>(static_cast<std::int8_t>(std::round(x[i] * inverse)));
  }
}

Byte truncated_nibble(float x) { return static_cast<Byte>(std::min(15, static_cast<int>(x))); }

void encode_q4_0(const float* x, std::int64_t begin, float absmax, Byte* out) {
  const float* largest =
      std::find_if(x, x + kSmall, [absmax](float v) { return std::fabs(v) == absmax; });
  const float d = (absmax == 0.0f ? 0.0f : *largest) / -8.0f;
  const float inverse = inverse_or_zero(d);
  store_half(out, d, begin, DType::Q4_0);
  for (int j = 0; j < 16; ++j) {
    const Byte low = truncated_nibble(x[j] * inverse + 8.5f);
    const Byte high = truncated_nibble(x[j + 16] * inverse + 8.5f);
    out[2 + j] = static_cast<Byte>(low | high << 4);
  }
}

void encode_q4_1(const float* x, std::int64_t begin, Byte* out) {
  const auto [low_at, high_at] = std::minmax_element(x, x + kSmall);
  const float minimum = *low_at;
  const float d = (*high_at - minimum) / 15.0f;
  const float inverse = inverse_or_zero(d);
  store_half(out, d, begin, DType::Q4_1);
  store_half(out + 2, minimum, begin, DType::Q4_1);
  for (int j = 0; j < 16; ++j) {
    const Byte low = truncated_nibble((x[j] - minimum) * inverse + 0.5f);
    const Byte high = truncated_nibble((x[j + 16] - minimum) * inverse + 0.5f);
    out[4 + j] = static_cast<Byte>(low | high << 4);
  }
}

// Blocks of 32. `high` has the fifth bits, or is null for the 4-bit types.
void decode_nibbles(const Byte* qs, const Byte* high, float d, int center, float minimum,
                    float* out) {
  std::uint32_t bits = 0;
  if (high != nullptr) std::memcpy(&bits, high, sizeof bits);
  for (int j = 0; j < 16; ++j) {
    const int low = (qs[j] & 15) | static_cast<int>((bits >> j & 1u) << 4);
    const int up = (qs[j] >> 4) | static_cast<int>((bits >> (j + 16) & 1u) << 4);
    out[j] = d * static_cast<float>(low - center) + minimum;
    out[j + 16] = d * static_cast<float>(up - center) + minimum;
  }
}

void decode_q8_0(const Byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < kSmall; ++i) {
    out[i] = d * static_cast<float>(static_cast<std::int8_t>(block[2 + i]));
  }
}

// scales[16], qs[64], d, dmin.
void decode_q2_k(const Byte* block, float* out) {
  const Byte* qs = block + 16;
  const float d = half_at(block + 80), dmin = half_at(block + 82);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, shift = i % 128 / 32, l = i % 32;
    const Byte scale = block[i / 16];
    const int q = qs[32 * half + l] >> (2 * shift) & 3;
    out[i] = d * static_cast<float>(scale & 15) * static_cast<float>(q) -
             dmin * static_cast<float>(scale >> 4);
  }
}

// hmask[32], qs[64], scales[12], d.
void decode_q3_k(const Byte* block, float* out) {
  const Byte *qs = block + 32, *packed = block + 96;
  const float d = half_at(block + 108);
  float scales[16];
  for (int i = 0; i < 16; ++i) {
    const int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
    const int high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
    scales[i] = d * static_cast<float>((low | high << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, shift = i % 128 / 32, l = i % 32;
    const int q = qs[32 * half + l] >> (2 * shift) & 3;
    const bool high = (block[l] >> (4 * half + shift) & 1) != 0;
    out[i] = scales[i / 16] * static_cast<float>(q - (high ? 0 : 4));
  }
}

// Scale and minimum of sub-block j, six bits each, from the 12 bytes of Q4_K and Q5_K.
struct ScaleMin {
  int scale, minimum;
};
ScaleMin scale_min(const Byte* b, int j) {
  if (j < 4) return {b[j] & 63, b[j + 4] & 63};
  return {(b[j + 4] & 15) | (b[j - 4] >> 6) << 4, (b[j + 4] >> 4) | (b[j] >> 6) << 4};
}

// d, dmin, scales[12], then qs[128]; Q5_K has qh[32] before qs.
void decode_q4_or_q5_k(const Byte* block, const Byte* qs, const Byte* high, float* out) {
  const float d = half_at(block), dmin = half_at(block + 2);
  for (int sub = 0; sub < 8; ++sub) {
    const ScaleMin s = scale_min(block + 4, sub);
    const float scale = d * static_cast<float>(s.scale);
    const float minimum = dmin * static_cast<float>(s.minimum);
    for (int l = 0; l < 32; ++l) {
      const Byte pair = qs[sub / 2 * 32 + l];
      int q = sub % 2 == 0 ? pair & 15 : pair >> 4;
      if (high != nullptr) q += (high[l] >> sub & 1) * 16;
      *out++ = scale * static_cast<float>(q) - minimum;
    }
  }
}

// ql[128], qh[64], scales[16], d. Quarter k of a half takes bits 2k of qh; quarters 0 and 1 are
// the low halves of ql, 2 and 3 the high ones.
void decode_q6_k(const Byte* block, float* out) {
  const Byte *ql = block, *qh = block + 128, *scales = block + 192;
  const float d = half_at(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
    const Byte pair = ql[64 * half + 32 * (quarter % 2) + l];
    const int low = quarter < 2 ? pair & 15 : pair >> 4;
    const int high = qh[32 * half + l] >> (2 * quarter) & 3;
    const float scale = d * static_cast<float>(static_cast<std::int8_t>(scales[i / 16]));
    out[i] = scale * static_cast<float>((low | high << 4) - 32);
  }
}

}  // namespace

void quantize_blocks(DType dtype, std::span<const float> values, std::span<std::byte> out) {
  auto* block = reinterpret_cast<Byte*>(out.data());
  for (std::size_t at = 0; at < values.size(); at += kSmall) {
    const auto part = values.subspan(at, kSmall);
    const auto begin = static_cast<std::int64_t>(at);
    const float absmax = finite_absmax(part, begin, dtype);
    if (dtype == DType::Q8_0) {
      encode_q8_0(part.data(), begin, absmax, block);
    } else if (dtype == DType::Q4_0) {
      encode_q4_0(part.data(), begin, absmax, block);
    } else {
      encode_q4_1(part.data(), begin, block);
    }
    block += info(dtype).block_bytes;
  }
}

void dequantize_block(DType dtype, const std::byte* data, float* out) {
  const auto* block = reinterpret_cast<const Byte*>(data);
  switch (dtype) {
    case DType::Q4_0:
      return decode_nibbles(block + 2, nullptr, half_at(block), 8, kNothing, out);
    case DType::Q4_1:
      return decode_nibbles(block + 4, nullptr, half_at(block), 0, half_at(block + 2), out);
    case DType::Q5_0:
      return decode_nibbles(block + 6, block + 2, half_at(block), 16, kNothing, out);
    case DType::Q5_1:
      return decode_nibbles(block + 8, block + 4, half_at(block), 0, half_at(block + 2), out);
    case DType::Q8_0:
      return decode_q8_0(block, out);
    case DType::Q2_K:
      return decode_q2_k(block, out);
    case DType::Q3_K:
      return decode_q3_k(block, out);
    case DType::Q4_K:
      return decode_q4_or_q5_k(block, block + 16, nullptr, out);
    case DType::Q5_K:
      return decode_q4_or_q5_k(block, block + 48, block + 16, out);
    case DType::Q6_K:
      return decode_q6_k(block, out);
    default:
      throw Unsupported("dequantize: " + std::string(name(dtype)) + " is no block type");
  }
}

}  // namespace nibble::codecs
