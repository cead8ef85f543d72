// sum_squares and adamw; the formulas are in engine/ops/optimizer.cpp.
//
// sum_squares: one block of threads sums each 4096 elements in F64 into scratch; a second kernel
// adds those sums to the total one after the other, so that splitting the array at a multiple of
// 4096 changes no bit. The chain of additions costs about a microsecond per million elements.
//
// adamw: elementwise and memory bound, 4 loads and 4 stores of 16 bytes per thread. A block of
// threads covers 1024 elements, so all of it shares one entry of the block table; its first thread
// works out the one F64 number, the factor of the gradients, while the loads are under way.
#include "backends/cuda/runs.cuh"

namespace nibble::cuda {
namespace {

constexpr int kBlock = 4096;  // elements
constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void block_squares_kernel(const float* x, std::int64_t count,
                                                                 double* partial) {
  begin_kernel();
  constexpr int kPacks = kBlock / (4 * kThreads);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kBlock;
  Run<float, 4> packs[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const std::int64_t i = begin + (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (i + 4 <= count) {
      packs[j] = load_run<4>(x + i);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) packs[j].values[k] = i + k < count ? x[i + k] : 0.0f;
    }
  }
  double sum = 0;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const double v = packs[j].values[k];
      sum += v * v;
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block of threads: all fetch, one adds in order.
__global__ __launch_bounds__(kThreads) void add_sums_kernel(const double* partial,
                                                            std::int64_t blocks, double* acc) {
  begin_kernel();
  __shared__ double sums[kThreads];
  double total = threadIdx.x == 0 ? *acc : 0;
  for (std::int64_t begin = 0; begin < blocks; begin += kThreads) {
    const std::int64_t i = begin + threadIdx.x;
    if (i < blocks) sums[threadIdx.x] = partial[i];
    __syncthreads();
    if (threadIdx.x == 0) {
      const int n = static_cast<int>(blocks - begin < kThreads ? blocks - begin : kThreads);
#pragma unroll 8
      for (int k = 0; k < n; ++k) total += sums[k];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *acc = total;
}

bool supports_sum_squares(const OpCall& call) {
  return call.in_types[0].dtype == DType::F64 && call.in_types[1].dtype == DType::F32;
}

std::int64_t partial_bytes(const OpCall& call, const Card&) {
  return ceil_div(call.in_types[1].elements(), kBlock) * static_cast<std::int64_t>(sizeof(double));
}

void run_sum_squares(const OpCall& call, const Launch& launch) {
  const std::int64_t count = call.in_types[1].elements();
  const std::int64_t blocks = ceil_div(count, kBlock);
  if (blocks == 0) return;
  auto* partial = static_cast<double*>(call.scratch);
  start_kernel("sum_squares", block_squares_kernel, static_cast<unsigned>(blocks), kThreads, 0,
               launch, call.input<float>(1), count, partial);
  start_kernel("sum_squares", add_sums_kernel, 1, kThreads, 0, launch, partial, blocks,
               call.output<double>(0));
}

struct Adamw {
  float *master, *m, *v, *grad;
  const float* table;    // {lr scale, weight decay} of each block
  const float* scalars;  // lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, 1 / tokens, clip
  const double* norm;    // the sum of squares of the unscaled gradients
};

// What gradients are multiplied by: 1 / tokens, and the clip coefficient.
__device__ float gradient_factor(const Adamw& p) {
  const double inverse_tokens = p.scalars[6], clip = p.scalars[7];
  if (clip == 0) return static_cast<float>(inverse_tokens);
  const double coef = clip / (sqrt(*p.norm) * inverse_tokens + 1e-6);
  return static_cast<float>(coef < 1 ? inverse_tokens * coef : inverse_tokens);
}

__global__ __launch_bounds__(kThreads) void adamw_step_kernel(Adamw p) {
  begin_kernel();
  constexpr int kPerBlock = 4 * kThreads;
  static_assert(kBlock % kPerBlock == 0);
  __shared__ float shared_factor;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPerBlock + threadIdx.x * 4;
  Run<float, 4> master = load_run<4>(static_cast<const float*>(p.master + i));
  Run<float, 4> m = load_run<4>(static_cast<const float*>(p.m + i));
  Run<float, 4> v = load_run<4>(static_cast<const float*>(p.v + i));
  Run<float, 4> grad = load_run<4>(static_cast<const float*>(p.grad + i));
  if (threadIdx.x == 0) shared_factor = gradient_factor(p);
  const float beta1 = p.scalars[1], beta2 = p.scalars[2], eps = p.scalars[3];
  const float correction1 = p.scalars[4], correction2 = p.scalars[5];
  const unsigned entry = blockIdx.x / (kBlock / kPerBlock);
  const float lr = p.scalars[0] * p.table[2 * static_cast<std::int64_t>(entry)];
  const float keep = 1.0f - lr * p.table[2 * static_cast<std::int64_t>(entry) + 1];
  __syncthreads();
  const float factor = shared_factor;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float g = grad.values[k] * factor;
    m.values[k] = beta1 * m.values[k] + (1.0f - beta1) * g;
    v.values[k] = beta2 * v.values[k] + (1.0f - beta2) * (g * g);
    const float step = (m.values[k] / correction1) / (sqrtf(v.values[k] / correction2) + eps);
    master.values[k] = master.values[k] * keep - lr * step;
    grad.values[k] = 0;
  }
  store_run(p.master + i, master);
  store_run(p.m + i, m);
  store_run(p.v + i, v);
  store_run(p.grad + i, grad);
}

bool supports_adamw(const OpCall& call) { return call.in_types[0].dtype == DType::F32; }

void run_adamw(const OpCall& call, const Launch& launch) {
  const Adamw p{.master = call.output<float>(0),
                .m = call.mutable_input<float>(1),
                .v = call.mutable_input<float>(2),
                .grad = call.mutable_input<float>(3),
                .table = call.input<float>(4),
                .scalars = call.input<float>(5),
                .norm = call.input<double>(6)};
  const std::int64_t blocks = call.in_types[0].elements() / (4 * kThreads);
  if (blocks == 0) return;
  start_kernel("adamw", adamw_step_kernel, static_cast<unsigned>(blocks), kThreads, 0, launch, p);
}

}  // namespace

extern const Kernel sum_squares_kernel{supports_sum_squares, partial_bytes, run_sum_squares};
extern const Kernel adamw_kernel{supports_adamw, nullptr, run_adamw};

}  // namespace nibble::cuda
