// F64, F32, F16 and BF16 storage: one value per element; F64 is rounded to F32.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

__device__ inline float to_float(__half x) { return __half2float(x); }

template <class Stored>
struct PlainDecoder {
  using Tables = NoTables;
  static constexpr bool kBf16 = std::is_same_v<Stored, bf16>;
  static constexpr int kPacks = kUnit * static_cast<int>(sizeof(Stored)) / 16;
  struct Raw {
    Pack<Stored> packs[kPacks];
  };
  const Stored* data;

  __device__ Raw load(std::int64_t unit) const {
    Raw raw;
    const auto* from = reinterpret_cast<const uint4*>(data + unit * kUnit);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) *reinterpret_cast<uint4*>(&raw.packs[i]) = __ldcs(from + i);
    return raw;
  }
  __device__ void decode(const Raw& raw, std::int64_t, const NoTables&, float (&out)[kUnit]) const {
    constexpr int kSize = Pack<Stored>::kSize;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out[i] = to_float(raw.packs[i / kSize].values[i % kSize]);
  }
  __device__ float one(std::int64_t element, const NoTables&) const {
    return to_float(data[element]);
  }
};

}  // namespace nibble::cuda
