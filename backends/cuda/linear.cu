// linear     y = scale * x W^T         linear_dx   dx = scale * dy W
// linear_dw  acc += scale * dy^T x
//
// y for few rows reads W once, in its storage type (matvec, few_rows). dx by a narrow W, the B of
// an adapter, is a thin product (low_rank). The rest decodes W into scratch and is a dense product,
// for which the copy is small change from a few hundred rows on.
#include "backends/cuda/gemm.h"
#include "backends/cuda/linear.h"
#include "backends/cuda/low_rank.h"
#include "backends/cuda/weight.h"

namespace nibble::cuda {

bool linear_is_matvec(const OpCall& call) {
  return matvec_supports(call.in_types[1], call.in_types[0].shape[0], call.in_types[0].dtype);
}

MatVec linear_matvec(const OpCall& call) {
  MatVec v;
  v.weight = call.in_types[1];
  v.w = call.in[1];
  v.m = call.in_types[0].shape[0];
  v.dtype = call.in_types[0].dtype;
  v.x = call.in[0];
  v.scale = call.node->get<LinearParams>().scale;
  v.y_dtype = call.out_types[0].dtype;
  v.y = call.out[0];
  return v;
}

namespace {

constexpr std::int64_t kNarrow = 256;  // channels of what counts as an adapter's side

// The dtype that operands take: F32 as soon as the activation side is.
DType operand_dtype(const OpCall& call, int activation) {
  return call.in_types[static_cast<std::size_t>(activation)].dtype;
}

bool supports(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && is_computable(call.out_types[0].dtype) &&
         can_decode(call.in_types[1].dtype);
}

Gemm dense(const OpCall& call, WeightLayout layout) {
  const Shape &x = call.in_types[0].shape, &w = call.in_types[1].shape;
  Gemm g;
  g.layout = layout;
  g.dtype = operand_dtype(call, 0);
  g.m = x[0];
  g.k = x[1];
  g.n = layout == WeightLayout::n_by_k ? w[0] : w[1];
  g.x = call.in[0];
  g.x_stride = x[1];
  g.w_stride = w[1];
  g.alpha = call.node->get<LinearParams>().scale;
  g.y = call.out[0];
  g.y_dtype = call.out_types[0].dtype;
  g.y_stride = g.n;
  return g;
}

void run_dense(const OpCall& call, WeightLayout layout, const Launch& launch) {
  Gemm g = dense(call, layout);
  auto* scratch = static_cast<std::byte*>(call.scratch);
  g.w = dense_weight(call.in_types[1], call.in[1], g.dtype, scratch, launch);
  product(g, scratch, launch);
}

std::int64_t dense_scratch(const OpCall& call, WeightLayout layout, const Card& card) {
  const Gemm g = dense(call, layout);
  return weight_copy_bytes(call.in_types[1], g.dtype) + product_scratch_bytes(g, card);
}

bool is_few_rows(const OpCall& call) {
  return few_rows_supports(call.in_types[1], call.in_types[0].shape[0], call.in_types[0].dtype);
}

std::int64_t scratch(const OpCall& call, const Card& card) {
  if (linear_is_matvec(call)) return 0;
  if (is_few_rows(call)) return few_rows_scratch_bytes(linear_matvec(call), card);
  return dense_scratch(call, WeightLayout::n_by_k, card);
}

void run(const OpCall& call, const Launch& launch) {
  if (linear_is_matvec(call)) return matvec(linear_matvec(call), launch);
  if (is_few_rows(call)) return few_rows(linear_matvec(call), call.scratch, launch);
  run_dense(call, WeightLayout::n_by_k, launch);
}

// -- dx ----------------------------------------------------------------------------------------

bool is_up_gradient(const OpCall& call) {
  const DType d = call.in_types[0].dtype;
  return call.in_types[1].dtype == d && call.out_types[0].dtype == d &&
         call.in_types[1].shape[1] <= kNarrow;
}

UpGradient up_gradient_call(const OpCall& call) {
  const Shape& w = call.in_types[1].shape;
  return {call.in_types[0].dtype,
          call.in_types[0].shape[0],
          w[0],
          w[1],
          call.in[0],
          call.in[1],
          call.node->get<LinearParams>().scale,
          call.out[0]};
}

std::int64_t scratch_dx(const OpCall& call, const Card& card) {
  if (!is_up_gradient(call)) return dense_scratch(call, WeightLayout::k_by_n, card);
  return up_gradient_scratch_bytes(up_gradient_call(call), card);
}

void run_dx(const OpCall& call, const Launch& launch) {
  if (!is_up_gradient(call)) return run_dense(call, WeightLayout::k_by_n, launch);
  up_gradient(up_gradient_call(call), call.scratch, launch);
}

// -- dW ----------------------------------------------------------------------------------------

TokenSum token_sum_call(const OpCall& call) {
  const Shape &x = call.in_types[1].shape, &dy = call.in_types[2].shape;
  TokenSum p;
  p.left_dtype = call.in_types[2].dtype;
  p.right_dtype = call.in_types[1].dtype;
  p.rows = x[0];
  p.left_cols = dy[1];
  p.right_cols = x[1];
  p.left = call.in[2];
  p.right = call.in[1];
  p.scale = call.node->get<LinearParams>().scale;
  p.acc = call.output<float>(0);
  return p;
}

bool supports_dw(const OpCall& call) {
  return is_computable(call.in_types[1].dtype) && is_computable(call.in_types[2].dtype) &&
         call.in_types[0].dtype == DType::F32;
}

std::int64_t scratch_dw(const OpCall& call, const Card& card) {
  return token_sum_scratch_bytes(token_sum_call(call), card);
}

void run_dw(const OpCall& call, const Launch& launch) {
  token_sum(token_sum_call(call), call.scratch, launch);
}

}  // namespace

extern const Kernel linear_kernel{supports, scratch, run};
extern const Kernel linear_dx_kernel{supports, scratch_dx, run_dx};
extern const Kernel linear_dw_kernel{supports_dw, scratch_dw, run_dw};

}  // namespace nibble::cuda
