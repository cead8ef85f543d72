// NF4 and FP4, with and without double quantization, in the bytes of bitsandbytes' CUDA kernels.
//
// The flattened tensor is cut in blocks; each stores its largest magnitude (absmax) and, per
// element, the code of x * (1/absmax). Codes are found by counting the thresholds below the scaled
// value, strictly, so a value on a threshold takes the lower code; counting has no branches and the
// compiler vectorizes it. The reciprocal is correctly rounded (the CUDA library's own may be one
// ulp off and then differs where a value lies within 2 ulp of a threshold).
//
// Where the CUDA rule gives NaN, zero is stored instead: a block of zeros takes the code of +0
// (CUDA: the lowest code, which decodes to -0), a group of equal absmax the map's zero. Where
// 1/absmax overflows, below 2^-128, values are divided by absmax.
//
// Double quantization stores absmax - offset in the signed dynamic map, scaled per 256 blocks;
// decoding rounds twice: fl(fl(map[q] * scale) + offset).
// Source: bitsandbytes csrc/kernels.cu (dQuantizeNF4, dQuantizeFP4, dQuantize); QLoRA,
// arXiv 2305.14314, section 3.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "engine/quantize.h"
#include "engine/quantize_codecs.h"

namespace nibble {

const float nf4_values[16] = {
    -0x1p0f,         -0x1.647362p-1f, -0x1.0cd66p-1f,  -0x1.94654p-2f,
    -0x1.23449ap-2f, -0x1.7a6a7ep-3f, -0x1.74f0e2p-4f, 0.0f,
    0x1.45f5fep-4f,  0x1.4995c6p-3f,  0x1.f809bap-3f,  0x1.5a0674p-2f,
    0x1.c3497p-2f,   0x1.200f56p-1f,  0x1.722766p-1f,  0x1p0f,
};

// Each is fl((nf4_values[i] + nf4_values[i + 1]) / 2).
const float nf4_thresholds[15] = {
    -0x1.b239bp-1f,  -0x1.38a4ep-1f,  -0x1.d709p-2f,  -0x1.5bd4ecp-2f, -0x1.e079d8p-3f,
    -0x1.1a7178p-3f, -0x1.74f0e2p-5f, 0x1.45f5fep-5f, 0x1.ec90c4p-4f,  0x1.a0cfcp-3f,
    0x1.2b05a8p-2f,  0x1.8ea7f2p-2f,  0x1.00da08p-1f, 0x1.491b5ep-1f,  0x1.b913b4p-1f,
};

// Bit 3 is the sign; the low three bits index 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4.
const float fp4_values[16] = {
    0.0f,
    0x1.555556p-8f,
    0x1.555556p-1f,
    0x1p0f,
    0x1.555556p-2f,
    0x1p-1f,
    0x1.555556p-3f,
    0x1p-2f,
    -0.0f,
    -0x1.555556p-8f,
    -0x1.555556p-1f,
    -0x1p0f,
    -0x1.555556p-2f,
    -0x1p-1f,
    -0x1.555556p-3f,
    -0x1p-2f,
};

namespace codecs {
namespace {

constexpr std::int64_t kLargestBlock = 4096;
constexpr std::int64_t kGroup = 256;    // blocks that share one scale of absmax
constexpr std::uint8_t kMapZero = 127;  // dynamic_map_signed[127] is 0

// The CUDA kernel's literals; five of the seven are not the exact midpoints.
constexpr float kFp4Thresholds[7] = {
    0x1.555572p-9f, 0x1.6p-4f,     0x1.aaaaaap-3f, 0x1.2aaaaap-2f,
    0x1.aaaaacp-2f, 0x1.2aaaap-1f, 0x1.aaaaaap-1f,
};
// FP4 magnitudes in rising order, as codes.
constexpr std::uint8_t kFp4Order[8] = {0, 1, 6, 7, 4, 5, 2, 3};

struct Nf4 {
  static constexpr std::uint8_t kZero = 7;
  static std::uint8_t code(float x) {
    int below = 0;
    for (const float threshold : nf4_thresholds) below += x > threshold ? 1 : 0;
    return static_cast<std::uint8_t>(below);
  }
};

struct Fp4 {
  static constexpr std::uint8_t kZero = 0;
  static std::uint8_t code(float x) {
    const float magnitude = std::fabs(x);
    int below = 0;
    for (const float threshold : kFp4Thresholds) below += magnitude > threshold ? 1 : 0;
    return static_cast<std::uint8_t>(kFp4Order[below] + (x < 0.0f ? 8 : 0));
  }
};

// Calls scaled(x) with the rule for x / absmax that holds for this absmax; not for absmax 0.
template <typename Use>
void with_scaling(float absmax, Use use) {
  const float inverse = 1.0f / absmax;
  if (std::isinf(inverse)) {
    use([absmax](float x) { return x / absmax; });
  } else {
    use([inverse](float x) { return x * inverse; });
  }
}

// Codes of one block, two in a byte, the earlier in the high half. An odd element at the end of the
// tensor is followed by a zero.
template <typename Format>
void encode_block(std::span<const float> values, float absmax, std::byte* out) {
  std::array<std::uint8_t, kLargestBlock> codes;
  const std::size_t count = values.size();
  if (absmax == 0.0f) {
    std::fill_n(codes.begin(), count, Format::kZero);
  } else {
    with_scaling(absmax, [&](auto scaled) {
      for (std::size_t i = 0; i < count; ++i) codes[i] = Format::code(scaled(values[i]));
    });
  }
  if (count % 2 != 0) codes[count] = Format::kZero;
  for (std::size_t i = 0; i < (count + 1) / 2; ++i) {
    out[i] = static_cast<std::byte>(codes[2 * i] << 4 | codes[2 * i + 1]);
  }
}

std::uint8_t map_code(float x) {
  const auto& thresholds = dynamic_thresholds_signed;
  const auto at = std::lower_bound(thresholds.begin(), thresholds.end(), x);
  return static_cast<std::uint8_t>(at - thresholds.begin());
}

void store(std::byte* at, float value) { std::memcpy(at, &value, sizeof value); }

float load(const std::byte* at) {
  float value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

void double_quantize(const Planes& layout, std::vector<float>& absmax, std::byte* out) {
  double sum = 0;
  for (const float value : absmax) sum += value;
  const float offset =
      absmax.empty() ? 0.0f : static_cast<float>(sum / static_cast<double>(absmax.size()));
  store(out + layout.offset, offset);
  for (float& value : absmax) value -= offset;
  for (std::int64_t begin = 0; begin < layout.blocks; begin += kGroup) {
    const auto group = std::span<const float>(absmax).subspan(
        static_cast<std::size_t>(begin),
        static_cast<std::size_t>(std::min(kGroup, layout.blocks - begin)));
    const float scale = finite_absmax(group, begin, DType::F32);
    store(out + layout.scale + begin / kGroup * 4, scale);
    auto* codes = reinterpret_cast<std::uint8_t*>(out + layout.absmax + begin);
    if (scale == 0.0f) {
      std::fill_n(codes, group.size(), kMapZero);
      continue;
    }
    with_scaling(scale, [&](auto scaled) {
      for (std::size_t i = 0; i < group.size(); ++i) codes[i] = map_code(scaled(group[i]));
    });
  }
}

// absmax of any block of a stored tensor.
class AbsmaxReader {
 public:
  AbsmaxReader(const TensorType& type, const Planes& layout, const std::byte* data)
      : double_quant_(type.quant.double_quant),
        absmax_(data + layout.absmax),
        scale_(data + layout.scale),
        offset_(double_quant_ ? load(data + layout.offset) : 0.0f),
        map_(layout.map_bytes > 0 ? data + layout.map
                                  : reinterpret_cast<const std::byte*>(dynamic_map_signed)) {}

  float operator[](std::int64_t block) const {
    if (!double_quant_) return load(absmax_ + 4 * block);
    const auto code = static_cast<std::uint8_t>(absmax_[block]);
    const float centered = load(map_ + 4 * code) * load(scale_ + block / kGroup * 4);
    return centered + offset_;
  }

 private:
  bool double_quant_;
  const std::byte *absmax_, *scale_;
  float offset_;
  const std::byte* map_;  // 256 floats, perhaps in a file
};

}  // namespace

void quantize_planes(const TensorType& type, std::span<const float> values,
                     std::span<std::byte> out) {
  const Planes layout = planes(type);
  const auto block = static_cast<std::size_t>(type.quant.block);
  std::fill(out.begin(), out.end(), std::byte{0});
  std::vector<float> absmax(static_cast<std::size_t>(layout.blocks));
  for (std::size_t i = 0; i < absmax.size(); ++i) {
    const std::size_t begin = i * block;
    const auto part = values.subspan(begin, std::min(block, values.size() - begin));
    absmax[i] = finite_absmax(part, static_cast<std::int64_t>(begin), type.dtype);
    std::byte* codes = out.data() + layout.codes + begin / 2;
    if (type.dtype == DType::NF4) {
      encode_block<Nf4>(part, absmax[i], codes);
    } else {
      encode_block<Fp4>(part, absmax[i], codes);
    }
  }
  if (type.quant.double_quant) {
    double_quantize(layout, absmax, out.data());
    if (layout.map_bytes > 0) {
      std::memcpy(out.data() + layout.map, dynamic_map_signed, sizeof dynamic_map_signed);
    }
  } else if (!absmax.empty()) {
    std::memcpy(out.data() + layout.absmax, absmax.data(), absmax.size() * sizeof(float));
  }
}

void dequantize_planes(const TensorType& type, const std::byte* data, std::int64_t begin,
                       std::span<float> out) {
  if (out.empty()) return;
  const Planes layout = planes(type);
  const AbsmaxReader absmax(type, layout, data);
  const float* values = type.dtype == DType::NF4 ? nf4_values : fp4_values;
  const auto* codes = reinterpret_cast<const std::uint8_t*>(data + layout.codes);
  const std::int64_t end = begin + static_cast<std::int64_t>(out.size());
  float* to = out.data();
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t block = i / type.quant.block;
    const std::int64_t stop = std::min(end, (block + 1) * type.quant.block);
    float products[16];
    const float scale = absmax[block];
    for (int code = 0; code < 16; ++code) products[code] = values[code] * scale;
    for (; i < stop; ++i) *to++ = products[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
  }
}

}  // namespace codecs
}  // namespace nibble
