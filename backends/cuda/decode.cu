// Stored tensors to dense BF16 or F32: whole, a range of rows, or rows picked by index.
//
// A thread takes units of 8 consecutive elements: 4 bytes of NF4 codes in, one 16-byte store of
// bf16 out, so that the loads and the stores of a warp are both contiguous without an exchange.
// Four units of a thread, a block's width apart, have their loads in flight together. At 2.5 bytes
// of traffic per NF4 element the arithmetic (about 6 instructions) stays well under the memory's
// time.
//
// Rows that are not whole units, or a destination that is not aligned for 16-byte stores, go
// element by element.
#include "backends/cuda/decode.h"

#include <limits>

#include "backends/cuda/decode/decoders.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;

// Which rows, and where they go.
struct Rows {
  const std::int32_t* ids;  // the rows to take; null: all
  std::int64_t count;
  std::int64_t cols;
  std::int64_t stride;  // of the destination, elements
  bool contiguous;      // rows follow one another on both sides

  __device__ std::int64_t source(std::int64_t row) const {
    return ids != nullptr ? __ldg(ids + row) : row;
  }
};

__device__ inline void store_unit(bf16* to, const float (&values)[kUnit]) {
  Pack<bf16> pack;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) pack.values[i] = from_float<bf16>(values[i]);
  store_pack(to, pack);
}
__device__ inline void store_unit(float* to, const float (&values)[kUnit]) {
  Pack<float> pack;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pack.values[i] = values[4 * half + i];
    store_pack(to + 4 * half, pack);
  }
}

template <class Decoder, class T>
__global__ void __launch_bounds__(kThreads)
    unit_kernel(const Decoder decoder, const __grid_constant__ typename Decoder::Tables tables,
                const Rows rows, T* to) {
  begin_kernel();
  __shared__ typename Decoder::Tables shared;
  share_tables<kThreads>(tables, shared);
  const std::int64_t per_row = rows.cols / kUnit, units = rows.count * per_row;
  const std::int64_t first = std::int64_t{blockIdx.x} * (kThreads * kUnitsPerThread);
  std::int64_t first_row = 0;
  std::uint32_t first_col = 0;
  if (!rows.contiguous) {
    // One wide division a block; a thread's place follows from it with a narrow one.
    first_row = first / per_row;
    first_col = static_cast<std::uint32_t>(first - first_row * per_row);
  }
  typename Decoder::Raw raw[kUnitsPerThread];
  std::int64_t source[kUnitsPerThread], place[kUnitsPerThread];
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    const std::uint32_t step = i * kThreads + threadIdx.x;
    // Past the end the last unit is read again, and not written.
    const std::int64_t unit = min(first + step, units - 1);
    if (rows.contiguous) {
      source[i] = unit;
      place[i] = unit * kUnit;
    } else {
      const auto at = first_col + static_cast<std::uint32_t>(unit - first);
      const auto width = static_cast<std::uint32_t>(per_row);
      const std::int64_t row = first_row + at / width, col = at % width;
      source[i] = rows.source(row) * per_row + col;
      place[i] = row * rows.stride + col * kUnit;
    }
    raw[i] = decoder.load(source[i]);
  }
#pragma unroll
  for (int i = 0; i < kUnitsPerThread; ++i) {
    if (first + i * kThreads + threadIdx.x >= units) break;
    float values[kUnit];
    decoder.decode(raw[i], source[i], shared, values);
    store_unit(to + place[i], values);
  }
}

// A block a row, or several.
template <class Decoder, class T>
__global__ void __launch_bounds__(kThreads)
    element_kernel(const Decoder decoder, const __grid_constant__ typename Decoder::Tables tables,
                   const Rows rows, T* to) {
  begin_kernel();
  __shared__ typename Decoder::Tables shared;
  share_tables<kThreads>(tables, shared);
  for (std::int64_t row = blockIdx.x; row < rows.count; row += gridDim.x) {
    const std::int64_t first = rows.source(row) * rows.cols;
    for (std::int64_t col = threadIdx.x; col < rows.cols; col += kThreads) {
      float value;
      if constexpr (requires { decoder.one(first, shared); }) {
        value = decoder.one(first + col, shared);
      } else {
        const std::int64_t unit = (first + col) / kUnit;
        float values[kUnit];
        decoder.decode(decoder.load(unit), unit, shared, values);
        value = values[0];
#pragma unroll
        for (int i = 1; i < kUnit; ++i) value = col % kUnit == i ? values[i] : value;
      }
      to[row * rows.stride + col] = from_float<T>(value);
    }
  }
}

template <class T>
void decode_rows(const TensorType& type, const void* data, const Rows& rows, T* to,
                 const Launch& launch) {
  if (rows.count == 0 || rows.cols == 0) return;
  constexpr std::int64_t kBlockUnits = kThreads * kUnitsPerThread;
  const bool in_units = rows.cols % kUnit == 0 && rows.stride % kUnit == 0 &&
                        reinterpret_cast<std::uintptr_t>(to) % 16 == 0 &&
                        rows.cols / kUnit <= std::numeric_limits<std::int32_t>::max();
  with_decoder(type, data, [&](auto decoder) {
    using Decoder = decltype(decoder);
    const auto tables = tables_of<typename Decoder::Tables>(type.dtype);
    if (in_units) {
      const std::int64_t blocks = ceil_div(rows.count * (rows.cols / kUnit), kBlockUnits);
      start_kernel("dequantize", unit_kernel<Decoder, T>, static_cast<unsigned>(blocks), kThreads,
                   0, launch, decoder, tables, rows, to);
    } else {
      const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(rows.count, 1 << 20));
      start_kernel("dequantize", element_kernel<Decoder, T>, blocks, kThreads, 0, launch, decoder,
                   tables, rows, to);
    }
  });
}

void decode_rows(const TensorType& type, const void* data, const Rows& rows, DType to_dtype,
                 void* to, const Launch& launch) {
  with_type(to_dtype, [&](auto zero) {
    using T = decltype(zero);
    decode_rows<T>(type, data, rows, static_cast<T*>(to), launch);
  });
}

}  // namespace

bool can_decode(DType dtype) { return is_float(dtype) || is_codebook(dtype) || is_block(dtype); }

void dequantize(const TensorType& type, const void* data, DType to_dtype, void* to,
                std::int64_t stride, const Launch& launch) {
  const std::int64_t cols = type.shape.cols();
  const Rows rows{nullptr, type.shape.rows(), cols, stride, stride == cols};
  decode_rows(type, data, rows, to_dtype, to, launch);
}

void gather_rows(const TensorType& type, const void* data, const std::int32_t* ids,
                 std::int64_t count, DType to_dtype, void* to, const Launch& launch) {
  const std::int64_t cols = type.shape.cols();
  decode_rows(type, data, Rows{ids, count, cols, cols, false}, to_dtype, to, launch);
}

}  // namespace nibble::cuda
