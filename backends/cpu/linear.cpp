// linear, linear_dx and linear_dw: one call each of the matrix products in gemm.h, where the
// decoding of the weight, the shares of the threads and the order of summation are explained.
#include "backends/cpu/gemm_call.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

bool supports(const OpCall& call) {
  return multiplies(call.in_types[0].dtype, call.out_types[0].dtype) &&
         can_decode(call.in_types[1].dtype);
}

std::int64_t scratch(const OpCall& call, int) {
  const Shape& x = call.in_types[0].shape;
  return multiply_scratch_bytes(call.in_types[0].dtype, call.out_types[0].dtype, x[0],
                                call.out_types[0].shape[1], x[1]);
}

void multiply(const OpCall& call, ThreadPool& pool, WeightUse use) {
  const Term term{input_matrix(call, 0), input_weight(call, 1),
                  call.node->get<LinearParams>().scale};
  cpu::multiply(gemm_context(call, pool, scratch(call, pool.threads())), use,
                call.in_types[0].shape[0], {&term, 1}, output_matrix(call, 0));
}

void run(const OpCall& call, ThreadPool& pool) { multiply(call, pool, WeightUse::Transposed); }
void run_dx(const OpCall& call, ThreadPool& pool) { multiply(call, pool, WeightUse::Plain); }

bool supports_dw(const OpCall& call) {
  return accumulates(call.in_types[1].dtype, call.in_types[2].dtype, call.in_types[0].dtype);
}

std::int64_t scratch_dw(const OpCall& call, int) {
  const Shape &x = call.in_types[1].shape, &dy = call.in_types[2].shape;
  return gradient_scratch_bytes(call.in_types[0].dtype, x[0], dy[1], x[1]);
}

void run_dw(const OpCall& call, ThreadPool& pool) {
  const Shape &x = call.in_types[1].shape, &dy = call.in_types[2].shape;
  accumulate_gradient(gemm_context(call, pool, scratch_dw(call, pool.threads())), x[0], dy[1], x[1],
                      input_matrix(call, 2), input_matrix(call, 1),
                      call.node->get<LinearParams>().scale, output_matrix(call, 0));
}

}  // namespace

extern const Kernel linear_kernel{supports, scratch, run};
extern const Kernel linear_dx_kernel{supports, scratch, run_dx};
extern const Kernel linear_dw_kernel{supports_dw, scratch_dw, run_dw};

}  // namespace nibble::cpu::NIBBLE_ISA
