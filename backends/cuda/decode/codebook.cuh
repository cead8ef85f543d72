// NF4 and FP4 planes: value = codebook[4-bit code] * absmax[block], one F32 multiply.
//
// Elements are numbered over the whole tensor; element 2k is the high nibble of byte k. With
// double quantization absmax = map[u8] * scale + offset in two roundings. The codebook lies in
// shared memory, where 16 floats are 16 banks: any 32 lookups of a warp are free of conflicts.
#pragma once

#include "backends/cuda/decode/unit.cuh"

namespace nibble::cuda {

// 16 values, and the 256 of the usual map of 8-bit absmax. As a kernel's argument on the host's
// side, in shared memory on the device's.
struct alignas(16) CodebookTables {
  float values[16];
  float map[256];
};
// An argument's address as one of global memory. Reading arguments at an index of the thread's own
// is otherwise a walk through the constant cache, one address at a time.
template <class T>
__device__ inline const T* argument_address(const T* argument) {
  asm volatile("" : "+l"(argument));
  return argument;
}
template <int kThreads>
__device__ inline void share_tables(const CodebookTables& from, CodebookTables& to) {
  constexpr int kPacks = sizeof(CodebookTables) / 16;
  static_assert(kThreads >= kPacks);
  const auto* source = argument_address(reinterpret_cast<const float4*>(&from));
  if (threadIdx.x < kPacks) reinterpret_cast<float4*>(&to)[threadIdx.x] = source[threadIdx.x];
  __syncthreads();
}

// The absmax of quantization blocks.
struct AbsmaxReader {
  const std::uint8_t* absmax;  // u8 per block when `scale` is set, else F32
  const float* scale;          // per 256 blocks; null without double quantization
  const float* offset;
  const float* custom_map;  // null: the usual one
  int block_shift;          // log2 of the elements in a block

  // As loaded: the 8-bit code and the scale of its group, or the float's bits.
  struct Raw {
    std::uint32_t bits;
    float scale;
  };
  __device__ Raw load(std::int64_t element) const {
    const std::int64_t block = element >> block_shift;
    if (scale == nullptr) return {load_u32(absmax + 4 * block), 0};
    return {load_u8(absmax + block), __ldg(scale + (block >> 8))};
  }
  __device__ float load_offset() const { return scale != nullptr ? __ldg(offset) : 0; }
  __device__ float value(const Raw& raw, float the_offset, const float (&map)[256]) const {
    if (scale == nullptr) return __uint_as_float(raw.bits);
    const float centered = custom_map != nullptr ? __ldg(custom_map + raw.bits) : map[raw.bits];
    return __fadd_rn(__fmul_rn(centered, raw.scale), the_offset);
  }
};

struct CodebookDecoder {
  using Tables = CodebookTables;
  static constexpr bool kBf16 = false;
  struct Raw {
    std::uint32_t codes;
    AbsmaxReader::Raw absmax;
    float offset;
  };
  const std::uint8_t* codes;
  AbsmaxReader absmax;

  // Blocks are 32 elements or more, so a unit has one absmax.
  __device__ Raw load(std::int64_t unit) const {
    return {__ldcs(reinterpret_cast<const std::uint32_t*>(codes) + unit), absmax.load(unit * kUnit),
            absmax.load_offset()};
  }
  __device__ void decode(const Raw& raw, std::int64_t, const Tables& tables,
                         float (&out)[kUnit]) const {
    const float scale = absmax.value(raw.absmax, raw.offset, tables.map);
    const auto* values = reinterpret_cast<const std::uint8_t*>(tables.values);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      // Byte i / 2 of the word; the even element of the pair is the high nibble. As a distance in
      // bytes it is the code times 4.
      const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0) - 2;
      const std::uint32_t at = (shift < 0 ? raw.codes << 2 : raw.codes >> shift) & 60;
      out[i] = __fmul_rn(*reinterpret_cast<const float*>(values + at), scale);
    }
  }
  __device__ float one(std::int64_t element, const Tables& tables) const {
    const float scale = absmax.value(absmax.load(element), absmax.load_offset(), tables.map);
    const std::uint32_t byte = load_u8(codes + element / 2);
    return __fmul_rn(tables.values[element % 2 == 0 ? byte >> 4 : byte & 15], scale);
  }
};

}  // namespace nibble::cuda
