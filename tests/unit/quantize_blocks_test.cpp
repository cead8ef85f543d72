// ggml's block types: decoders against ggml's own loops (which scatter a block's bytes over its
// elements, where ours gather), and both directions against files that llama.cpp's tools wrote.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/philox.h"
#include "engine/quantize.h"
#include "gguf-convert/gguf.h"

using namespace nibble;

namespace {

using Byte = std::uint8_t;

float half(const Byte* at) {
  f16 value;
  std::memcpy(&value, at, 2);
  return to_float(value);
}

// dequantize_row_q2_K of ggml-quants.c.
void ggml_q2_k(const Byte* block, float* y) {
  const Byte *scales = block, *q = block + 16;
  const float d = half(block + 80), min = half(block + 82);
  int is = 0;
  for (int n = 0; n < 256; n += 128) {
    int shift = 0;
    for (int j = 0; j < 4; ++j) {
      for (int part = 0; part < 2; ++part) {
        const Byte sc = scales[is++];
        const float dl = d * static_cast<float>(sc & 15), ml = min * static_cast<float>(sc >> 4);
        for (int l = 0; l < 16; ++l) {
          *y++ = dl * static_cast<float>(q[l + 16 * part] >> shift & 3) - ml;
        }
      }
      shift += 2;
    }
    q += 32;
  }
}

// dequantize_row_q3_K, scales unpacked by its 32-bit masks.
void ggml_q3_k(const Byte* block, float* y) {
  const Byte *hm = block, *q = block + 32;
  const float d = half(block + 108);
  std::uint32_t aux[4];
  std::memcpy(aux, block + 96, 12);
  const std::uint32_t tmp = aux[2], low = 0x0f0f0f0f, top = 0x03030303;
  aux[2] = (aux[0] >> 4 & low) | (tmp >> 4 & top) << 4;
  aux[3] = (aux[1] >> 4 & low) | (tmp >> 6 & top) << 4;
  aux[0] = (aux[0] & low) | (tmp & top) << 4;
  aux[1] = (aux[1] & low) | (tmp >> 2 & top) << 4;
  std::int8_t scales[16];
  std::memcpy(scales, aux, 16);
  int is = 0, m = 1;
  for (int n = 0; n < 256; n += 128) {
    int shift = 0;
    for (int j = 0; j < 4; ++j) {
      for (int part = 0; part < 2; ++part) {
        const float dl = d * static_cast<float>(scales[is++] - 32);
        for (int l = 16 * part; l < 16 * part + 16; ++l) {
          *y++ = dl * static_cast<float>((q[l] >> shift & 3) - ((hm[l] & m) != 0 ? 0 : 4));
        }
      }
      shift += 2;
      m <<= 1;
    }
    q += 32;
  }
}

void ggml_scale_min(int j, const Byte* q, int* d, int* m) {
  if (j < 4) {
    *d = q[j] & 63;
    *m = q[j + 4] & 63;
  } else {
    *d = (q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4);
    *m = (q[j + 4] >> 4) | ((q[j] >> 6) << 4);
  }
}

// dequantize_row_q4_K and _q5_K; `ql` are the low bits, `qh` null for Q4_K.
void ggml_q45_k(const Byte* block, const Byte* ql, const Byte* qh, float* y) {
  const float d = half(block), min = half(block + 2);
  int is = 0, u1 = 1, u2 = 2;
  for (int j = 0; j < 256; j += 64) {
    int sc, m;
    ggml_scale_min(is, block + 4, &sc, &m);
    const float d1 = d * static_cast<float>(sc), m1 = min * static_cast<float>(m);
    ggml_scale_min(is + 1, block + 4, &sc, &m);
    const float d2 = d * static_cast<float>(sc), m2 = min * static_cast<float>(m);
    const auto bit = [qh](int l, int u) { return qh != nullptr && (qh[l] & u) != 0 ? 16 : 0; };
    for (int l = 0; l < 32; ++l) *y++ = d1 * static_cast<float>((ql[l] & 0xF) + bit(l, u1)) - m1;
    for (int l = 0; l < 32; ++l) *y++ = d2 * static_cast<float>((ql[l] >> 4) + bit(l, u2)) - m2;
    ql += 32;
    is += 2;
    u1 <<= 2;
    u2 <<= 2;
  }
}

// dequantize_row_q6_K.
void ggml_q6_k(const Byte* block, float* y) {
  const Byte *ql = block, *qh = block + 128;
  std::int8_t scales[16];
  std::memcpy(scales, block + 192, 16);
  const std::int8_t* sc = scales;
  const float d = half(block + 208);
  for (int n = 0; n < 256; n += 128) {
    for (int l = 0; l < 32; ++l) {
      const int is = l / 16;
      const int q1 = ((ql[l] & 0xF) | ((qh[l] >> 0) & 3) << 4) - 32;
      const int q2 = ((ql[l + 32] & 0xF) | ((qh[l] >> 2) & 3) << 4) - 32;
      const int q3 = ((ql[l] >> 4) | ((qh[l] >> 4) & 3) << 4) - 32;
      const int q4 = ((ql[l + 32] >> 4) | ((qh[l] >> 6) & 3) << 4) - 32;
      y[l] = d * static_cast<float>(sc[is]) * static_cast<float>(q1);
      y[l + 32] = d * static_cast<float>(sc[is + 2]) * static_cast<float>(q2);
      y[l + 64] = d * static_cast<float>(sc[is + 4]) * static_cast<float>(q3);
      y[l + 96] = d * static_cast<float>(sc[is + 6]) * static_cast<float>(q4);
    }
    y += 128;
    ql += 64;
    qh += 32;
    sc += 8;
  }
}

// dequantize_row_q5_0 and _q5_1.
void ggml_q5(const Byte* block, bool with_minimum, float* y) {
  const float d = half(block), m = with_minimum ? half(block + 2) : 0;
  const Byte* at = block + (with_minimum ? 4 : 2);
  std::uint32_t qh;
  std::memcpy(&qh, at, 4);
  for (int j = 0; j < 16; ++j) {
    const auto xh0 = static_cast<Byte>(((qh >> (j + 0)) << 4) & 0x10);
    const auto xh1 = static_cast<Byte>((qh >> (j + 12)) & 0x10);
    const int x0 = (at[4 + j] & 0x0F) | xh0, x1 = (at[4 + j] >> 4) | xh1;
    y[j] = with_minimum ? static_cast<float>(x0) * d + m : static_cast<float>(x0 - 16) * d;
    y[j + 16] = with_minimum ? static_cast<float>(x1) * d + m : static_cast<float>(x1 - 16) * d;
  }
}

void ggml_decode(DType dtype, const Byte* block, float* y) {
  switch (dtype) {
    case DType::Q5_0:
      return ggml_q5(block, false, y);
    case DType::Q5_1:
      return ggml_q5(block, true, y);
    case DType::Q2_K:
      return ggml_q2_k(block, y);
    case DType::Q3_K:
      return ggml_q3_k(block, y);
    case DType::Q4_K:
      return ggml_q45_k(block, block + 16, nullptr, y);
    case DType::Q5_K:
      return ggml_q45_k(block, block + 48, block + 16, y);
    default:
      return ggml_q6_k(block, y);
  }
}

std::vector<int> scale_offsets(DType dtype) {  // where the halves lie in a block
  switch (dtype) {
    case DType::Q2_K:
      return {80, 82};
    case DType::Q3_K:
      return {108};
    case DType::Q6_K:
      return {208};
    case DType::Q5_0:
      return {0};
    default:
      return {0, 2};
  }
}

}  // namespace

TEST_CASE("blocks of random bytes decode as in ggml, bit for bit") {
  for (const DType dtype : {DType::Q5_0, DType::Q5_1, DType::Q2_K, DType::Q3_K, DType::Q4_K,
                            DType::Q5_K, DType::Q6_K}) {
    const DTypeInfo& layout = info(dtype);
    for (std::uint32_t seed = 0; seed < 200; ++seed) {
      std::vector<Byte> block(static_cast<std::size_t>(layout.block_bytes));
      for (std::size_t i = 0; i < block.size(); ++i) {
        block[i] = static_cast<Byte>(philox(seed, {static_cast<std::uint32_t>(i), 1, 0, 0})[0]);
      }
      for (const int at : scale_offsets(dtype)) {
        const f16 scale = to_f16(philox_normal(seed, 5, static_cast<std::uint64_t>(at)));
        std::memcpy(block.data() + at, &scale, 2);
      }
      const auto count = static_cast<std::size_t>(layout.block);
      std::vector<float> ours(count), theirs(count);
      dequantize({dtype, {layout.block}, {}}, reinterpret_cast<const std::byte*>(block.data()), 0,
                 ours);
      ggml_decode(dtype, block.data(), theirs.data());
      CAPTURE(layout.name);
      REQUIRE(std::memcmp(ours.data(), theirs.data(), count * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("stories260K: llama.cpp's quantized files decode close to the F32 file") {
  const std::string folder = "../shared/models/stories260K/stories260K-";
  if (!std::filesystem::exists(folder + "f32.gguf")) {
    MESSAGE("skipped: ../shared/models/stories260K is absent");
    return;
  }
  const GgufFile exact(folder + "f32.gguf");
  for (const std::string kind : {"q8_0", "q4_0", "f16"}) {
    const GgufFile file(folder + kind + ".gguf");
    int quantized = 0;
    for (const GgufTensor& tensor : file.tensors()) {
      if (tensor.type.dtype == DType::F32) continue;
      ++quantized;
      CAPTURE(tensor.name);
      const GgufTensor* source = exact.find(tensor.name);
      REQUIRE(source != nullptr);
      REQUIRE(source->type.dtype == DType::F32);
      const auto count = static_cast<std::size_t>(tensor.type.elements());
      std::vector<float> x(count), y(count);
      dequantize(source->type, source->bytes.data(), 0, x);
      dequantize(tensor.type, tensor.bytes.data(), 0, y);
      // Our encoder writes the very bytes of the file.
      std::vector<std::byte> encoded(tensor.bytes.size());
      quantize(tensor.type, x, encoded);
      CHECK(std::memcmp(encoded.data(), tensor.bytes.data(), encoded.size()) == 0);
      double error = 0, norm = 0;
      for (std::size_t i = 0; i < count; ++i) {
        error += (x[i] - y[i]) * static_cast<double>(x[i] - y[i]);
        norm += static_cast<double>(x[i]) * x[i];
      }
      const double relative = std::sqrt(error / norm);
      CHECK(relative > 0);
      CHECK(relative < (kind == "q4_0" ? 0.12 : kind == "q8_0" ? 0.008 : 0.0005));
    }
    CHECK(quantized > 20);
  }
}
