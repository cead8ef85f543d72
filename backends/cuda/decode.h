// Reading stored weights on the device: planes (NF4, FP4) and ggml blocks become BF16 or F32 tiles.
//
// Values are those of nibble::dequantize (engine/quantize.h): each decodes to its F32 value, which
// is then rounded to nearest even when the destination is BF16. A format is one decoder in decode/.
#pragma once

#include "backends/cuda/common.cuh"

namespace nibble::cuda {

bool can_decode(DType dtype);

// Writes all of a tensor of `type` at `data` (device memory, the layout of planes(type) with
// kHostPlaneAlignment) as rows() x cols() elements of bf16 or float, rows `stride` elements apart.
void dequantize(const TensorType& type, const void* data, DType to_dtype, void* to,
                std::int64_t stride, const Launch& launch);
// y[t] = row ids[t] of the tensor, rounded to out_dtype.
void gather_rows(const TensorType& type, const void* data, const std::int32_t* ids,
                 std::int64_t count, DType to_dtype, void* to, const Launch& launch);

// y[m, out] = scale * x[m, in] W^T (+ low_scale * u b^T), m small (decoding): W is read once, in
// its storage type. Whether this route serves the shape; a pure function of its arguments.
struct MatVec {
  TensorType weight;  // [out, in]
  const void* w = nullptr;
  std::int64_t m = 1;
  DType dtype = DType::BF16;  // of x, u and b
  const void* x = nullptr;
  float scale = 1;
  std::int64_t rank = 0;    // the adapter's part; 0: none
  const void* u = nullptr;  // [m, rank]
  TensorType b_type;        // [out, rank], plain F32 or BF16
  const void* b = nullptr;
  float low_scale = 1;
  DType y_dtype = DType::BF16;
  void* y = nullptr;
};
bool matvec_supports(const TensorType& weight, std::int64_t m, DType dtype);
void matvec(const MatVec& call, const Launch& launch);
// Up to 4 products of the same x, m and dtype (q, k and v, or gate and up), in one launch when the
// weights are stored alike. The results are those of the single calls, bit for bit.
void matvec_group(const MatVec* calls, int count, const Launch& launch);

// The same product for up to kFewRows rows of x in BF16 graphs, on the tensor cores.
inline constexpr std::int64_t kFewRows = 64;
bool few_rows_supports(const TensorType& weight, std::int64_t m, DType dtype);
std::int64_t few_rows_scratch_bytes(const MatVec& call, const Card& card);
void few_rows(const MatVec& call, void* scratch, const Launch& launch);

}  // namespace nibble::cuda
