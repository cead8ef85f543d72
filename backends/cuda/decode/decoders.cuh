// The decoder of a stored tensor, chosen by its type.
#pragma once

#include <algorithm>
#include <bit>

#include "backends/cuda/decode/codebook.cuh"
#include "backends/cuda/decode/plain.cuh"
#include "backends/cuda/decode/q2_k_q3_k.cuh"
#include "backends/cuda/decode/q4.cuh"
#include "backends/cuda/decode/q4_k_q5_k.cuh"
#include "backends/cuda/decode/q5.cuh"
#include "backends/cuda/decode/q6_k.cuh"
#include "backends/cuda/decode/q8_0.cuh"
#include "engine/error.h"
#include "engine/quantize.h"

namespace nibble::cuda {

inline bool is_codebook(DType dtype) { return dtype == DType::NF4 || dtype == DType::FP4; }

inline CodebookDecoder codebook_decoder(const TensorType& type, const void* data) {
  const auto* base = static_cast<const std::uint8_t*>(data);
  const Planes p = planes(type);
  CodebookDecoder decoder{};
  decoder.codes = base + p.codes;
  decoder.absmax.absmax = base + p.absmax;
  decoder.absmax.block_shift = std::countr_zero(static_cast<std::uint32_t>(type.quant.block));
  if (type.quant.double_quant) {
    decoder.absmax.scale = reinterpret_cast<const float*>(base + p.scale);
    decoder.absmax.offset = reinterpret_cast<const float*>(base + p.offset);
    if (type.quant.custom_map) {
      decoder.absmax.custom_map = reinterpret_cast<const float*>(base + p.map);
    }
  }
  return decoder;
}

// A kernel's tables for tensors of this type.
template <class Tables>
Tables tables_of(DType dtype) {
  Tables tables{};
  if constexpr (std::is_same_v<Tables, CodebookTables>) {
    std::copy_n(dtype == DType::NF4 ? nf4_values : fp4_values, 16, tables.values);
    std::copy_n(dynamic_map_signed, 256, tables.map);
  }
  return tables;
}

// Calls f(decoder) with the decoder of a tensor of `type` at `data`, a plain value.
template <class F>
void with_decoder(const TensorType& type, const void* data, F&& f) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  switch (type.dtype) {
    case DType::F64:
      return f(PlainDecoder<double>{static_cast<const double*>(data)});
    case DType::F32:
      return f(PlainDecoder<float>{static_cast<const float*>(data)});
    case DType::F16:
      return f(PlainDecoder<__half>{static_cast<const __half*>(data)});
    case DType::BF16:
      return f(PlainDecoder<bf16>{static_cast<const bf16*>(data)});
    case DType::NF4:
    case DType::FP4:
      return f(codebook_decoder(type, data));
    case DType::Q4_0:
      return f(Q40Decoder{bytes});
    case DType::Q4_1:
      return f(Q41Decoder{bytes});
    case DType::Q5_0:
      return f(Q50Decoder{bytes});
    case DType::Q5_1:
      return f(Q51Decoder{bytes});
    case DType::Q8_0:
      return f(Q80Decoder{bytes});
    case DType::Q2_K:
      return f(Q2KDecoder{bytes});
    case DType::Q3_K:
      return f(Q3KDecoder{bytes});
    case DType::Q4_K:
      return f(Q4KDecoder</*kFive=*/false>{bytes});
    case DType::Q5_K:
      return f(Q4KDecoder</*kFive=*/true>{bytes});
    case DType::Q6_K:
      return f(Q6KDecoder{bytes});
    default:
      throw Unsupported(type.str() +
                        ": the CUDA backend reads F64, F32, F16, BF16, NF4, FP4 and "
                        "ggml blocks; convert it to one of these");
  }
}

}  // namespace nibble::cuda
