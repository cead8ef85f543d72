// lora_linear     u = drop(x) A^T,  y = x W^T + scale * u B^T
// lora_linear_y   y from a stored u
// lora_linear_dx  dx = dy W + keep * (du A) / (1 - p)
// lora_linear_da  acc += du^T drop(x)
//
// u is a thin product (low_rank); the adapter's part of y and dx rides inside the dense product
// (gemm.h) or, for few rows, inside the one that reads W in its storage type.
#include "backends/cuda/gemm.h"
#include "backends/cuda/low_rank.h"
#include "backends/cuda/weight.h"

namespace nibble::cuda {
namespace {

float keep_scale(const OpCall& call) { return 1 / (1 - call.node->get<LoraParams>().dropout); }

std::int64_t at_least(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// -- Ranks the tensor cores have no rows for -----------------------------------------------------

// Rows of an adapter's operands are whole 16 bytes in the products that pay; other ranks get
// channels of zeros, in copies of u and B (or A).
std::int64_t padded_rank(const Gemm& g) {
  return g.dtype == DType::BF16 ? round_up(g.rank, 8) : g.rank;
}
std::int64_t padding_bytes(const Gemm& g) {
  const std::int64_t rank = padded_rank(g);
  if (rank == g.rank) return 0;
  return round_up(g.m * rank * element_bytes(g.dtype), 256) +
         round_up(g.n * rank * element_bytes(g.dtype), 256);
}

// to [to_rows, to_cols] = from [rows, cols], and zeros.
__global__ void pad(const bf16* from, std::int64_t rows, std::int64_t cols, bf16* to,
                    std::int64_t to_rows, std::int64_t to_cols) {
  begin_kernel();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= to_rows * to_cols) return;
  const std::int64_t row = i / to_cols, col = i % to_cols;
  to[i] = row < rows && col < cols ? from[row * cols + col] : from_float<bf16>(0.0f);
}
const void* padded(const void* from, std::int64_t rows, std::int64_t cols, std::int64_t to_rows,
                   std::int64_t to_cols, std::byte*& scratch, const Launch& launch) {
  constexpr unsigned kThreads = 256;
  auto* const to = reinterpret_cast<bf16*>(scratch);
  scratch += round_up(to_rows * to_cols * static_cast<std::int64_t>(sizeof(bf16)), 256);
  start_kernel("pad", pad, static_cast<unsigned>(ceil_div(to_rows * to_cols, kThreads)), kThreads,
               0, launch, static_cast<const bf16*>(from), rows, cols, to, to_rows, to_cols);
  return to;
}
// Takes its copies from `scratch` and moves it on.
void pad_rank(Gemm& g, std::byte*& scratch, const Launch& launch) {
  const std::int64_t rank = padded_rank(g);
  if (rank == g.rank || g.m == 0) return;
  g.u = padded(g.u, g.m, g.rank, g.m, rank, scratch, launch);
  g.b = g.layout == WeightLayout::n_by_k ? padded(g.b, g.n, g.rank, g.n, rank, scratch, launch)
                                         : padded(g.b, g.rank, g.n, rank, g.n, scratch, launch);
  g.rank = rank;
}

std::int64_t padded_product_scratch(Gemm g, const Card& card) {
  const std::int64_t padding = padding_bytes(g);
  g.rank = padded_rank(g);
  return padding + product_scratch_bytes(g, card);
}
void padded_product(Gemm g, std::byte* scratch, const Launch& launch) {
  pad_rank(g, scratch, launch);
  product(g, scratch, launch);
}

// -- y and u -----------------------------------------------------------------------------------

// y from u, which the caller gives; W and B are inputs 1 and 3 of both ops.
Gemm dense(const OpCall& call, const void* u, std::int64_t rank) {
  const Shape &x = call.in_types[0].shape, &w = call.in_types[1].shape;
  Gemm g;
  g.dtype = call.in_types[0].dtype;
  g.m = x[0];
  g.n = w[0];
  g.k = g.x_stride = g.w_stride = x[1];
  g.x = call.in[0];
  g.rank = rank;
  g.u = u;
  g.low_scale = call.node->get<LoraParams>().scale;
  g.y = call.out[0];
  g.y_dtype = g.dtype;
  g.y_stride = g.n;
  return g;
}

// The routes that read W in its storage type: for a few rows of x, and for a few more.
enum class Route { matvec, few_rows, dense };
Route route(const OpCall& call) {
  const TensorType& w = call.in_types[1];
  const std::int64_t m = call.in_types[0].shape[0];
  const DType dtype = call.in_types[0].dtype;
  if (matvec_supports(w, m, dtype)) return Route::matvec;
  return few_rows_supports(w, m, dtype) ? Route::few_rows : Route::dense;
}

MatVec stored_product(const OpCall& call, const Gemm& g) {
  MatVec v;
  v.weight = call.in_types[1];
  v.w = call.in[1];
  v.m = g.m;
  v.dtype = g.dtype;
  v.x = g.x;
  v.rank = g.rank;
  v.u = g.u;
  v.b_type = {g.dtype, call.in_types[3].shape, {}};
  v.b = g.b;
  v.low_scale = g.low_scale;
  v.y_dtype = g.dtype;
  v.y = g.y;
  return v;
}

// What y takes: a copy of B, and one of W with the dense product.
std::int64_t output_scratch(const OpCall& call, std::int64_t rank, const Card& card) {
  const Gemm g = dense(call, nullptr, rank);
  const std::int64_t b = weight_copy_bytes(call.in_types[3], g.dtype);
  switch (route(call)) {
    case Route::matvec:
      return b;
    case Route::few_rows:
      return b + few_rows_scratch_bytes(stored_product(call, g), card);
    case Route::dense:
      break;
  }
  return b + weight_copy_bytes(call.in_types[1], g.dtype) + padded_product_scratch(g, card);
}

void run_output(const OpCall& call, Gemm g, std::byte* scratch, const Launch& launch) {
  g.b = dense_weight(call.in_types[3], call.in[3], g.dtype, scratch, launch);
  switch (route(call)) {
    case Route::matvec:
      return matvec(stored_product(call, g), launch);
    case Route::few_rows:
      return few_rows(stored_product(call, g), scratch, launch);
    case Route::dense:
      g.w = dense_weight(call.in_types[1], call.in[1], g.dtype, scratch, launch);
      return padded_product(g, scratch, launch);
  }
}

bool supports(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype) &&
         can_decode(call.in_types[2].dtype) && can_decode(call.in_types[3].dtype);
}

// u, without the address of A.
DownProduct down_product_call(const OpCall& call) {
  const Shape &x = call.in_types[0].shape, &a = call.in_types[2].shape;
  return {call.in_types[0].dtype, x[0],       x[1], a[0], call.in[0], nullptr, dropout_of(call, 4),
          keep_scale(call),       call.out[1]};
}

// u comes first and is done with its scratch when y begins.
std::int64_t scratch(const OpCall& call, const Card& card) {
  const DownProduct down = down_product_call(call);
  const std::int64_t bytes =
      weight_copy_bytes(call.in_types[2], down.dtype) + down_scratch_bytes(down, card);
  return at_least(bytes, output_scratch(call, down.rank, card));
}

void run(const OpCall& call, const Launch& launch) {
  auto* scratch = static_cast<std::byte*>(call.scratch);
  DownProduct down = down_product_call(call);
  down.a = dense_weight(call.in_types[2], call.in[2], down.dtype, scratch, launch);
  down_product(down, scratch, launch);
  run_output(call, dense(call, call.out[1], down.rank), static_cast<std::byte*>(call.scratch),
             launch);
}

bool supports_y(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype) &&
         can_decode(call.in_types[3].dtype);
}

std::int64_t scratch_y(const OpCall& call, const Card& card) {
  return output_scratch(call, call.in_types[2].shape[1], card);
}

void run_y(const OpCall& call, const Launch& launch) {
  run_output(call, dense(call, call.in[2], call.in_types[2].shape[1]),
             static_cast<std::byte*>(call.scratch), launch);
}

// -- dx ----------------------------------------------------------------------------------------

Gemm dense_dx(const OpCall& call) {
  const Shape &dy = call.in_types[0].shape, &w = call.in_types[1].shape;
  Gemm g;
  g.layout = WeightLayout::k_by_n;
  g.dtype = call.in_types[0].dtype;
  g.m = dy[0];
  g.n = g.w_stride = g.y_stride = w[1];
  g.k = g.x_stride = dy[1];
  g.x = call.in[0];
  g.rank = call.in_types[2].shape[1];
  g.u = call.in[2];
  g.low_scale = keep_scale(call);
  g.keep = dropout_of(call, 4);
  g.y = call.out[0];
  g.y_dtype = g.dtype;
  return g;
}

std::int64_t scratch_dx(const OpCall& call, const Card& card) {
  const Gemm g = dense_dx(call);
  return weight_copy_bytes(call.in_types[3], g.dtype) +
         weight_copy_bytes(call.in_types[1], g.dtype) + padded_product_scratch(g, card);
}

void run_dx(const OpCall& call, const Launch& launch) {
  Gemm g = dense_dx(call);
  auto* scratch = static_cast<std::byte*>(call.scratch);
  g.b = dense_weight(call.in_types[3], call.in[3], g.dtype, scratch, launch);
  g.w = dense_weight(call.in_types[1], call.in[1], g.dtype, scratch, launch);
  padded_product(g, scratch, launch);
}

bool supports_dx(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype) &&
         can_decode(call.in_types[3].dtype);
}

// -- dA ----------------------------------------------------------------------------------------

TokenSum token_sum_call(const OpCall& call) {
  const Shape &x = call.in_types[1].shape, &du = call.in_types[2].shape;
  TokenSum p;
  p.left_dtype = p.right_dtype = call.in_types[1].dtype;
  p.rows = x[0];
  p.left_cols = du[1];
  p.right_cols = x[1];
  p.left = call.in[2];
  p.right = call.in[1];
  p.drop = dropout_of(call, 3);
  p.scale = keep_scale(call);
  p.acc = call.output<float>(0);
  return p;
}

bool supports_da(const OpCall& call) {
  return is_computable(call.in_types[1].dtype) && call.in_types[0].dtype == DType::F32;
}

std::int64_t scratch_da(const OpCall& call, const Card& card) {
  return token_sum_scratch_bytes(token_sum_call(call), card);
}

void run_da(const OpCall& call, const Launch& launch) {
  token_sum(token_sum_call(call), call.scratch, launch);
}

}  // namespace

extern const Kernel lora_linear_kernel{supports, scratch, run};
extern const Kernel lora_linear_y_kernel{supports_y, scratch_y, run_y};
extern const Kernel lora_linear_dx_kernel{supports_dx, scratch_dx, run_dx};
extern const Kernel lora_linear_da_kernel{supports_da, scratch_da, run_da};

}  // namespace nibble::cuda
