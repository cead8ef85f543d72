// sum_squares, adamw and adamw8bit; the formulas are in engine/ops/optimizer.cpp.
//
// sum_squares: one block of threads sums each 4096 elements in F64 into scratch; a second kernel
// adds those sums to the total one after the other, so that splitting the array at a multiple of
// 4096 changes no bit. The chain of additions costs about a microsecond per million elements.
//
// adamw: elementwise and memory bound, 4 loads and 4 stores of 16 bytes per thread. A block of
// threads covers 1024 elements, so all of it shares one entry of the block table; its first thread
// works out the one F64 number, the factor of the gradients, while the loads are under way.
//
// adamw8bit: 10 bytes loaded and 10 stored per element. A warp takes 256 elements, which share an
// absmax, so that their maximum needs no barrier; a lane has two runs of 4 of them, 128 apart, and
// loads and stores of the warp stay contiguous. A block of 8 warps covers 4096 elements. Both maps
// and their thresholds lie in shared memory, where 8 steps of a binary search find a code. Every
// operation is written out as one that the compiler does not fuse: masters, codes and absmax are
// those of the CPU, bit for bit.
#include <algorithm>

#include "backends/cuda/runs.cuh"
#include "engine/quantize.h"

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
__device__ float gradient_factor(const float* scalars, const double* sum_of_squares) {
  const double inverse_tokens = scalars[6], clip = scalars[7];
  if (clip == 0) return static_cast<float>(inverse_tokens);
  const double norm = __dmul_rn(__dsqrt_rn(*sum_of_squares), inverse_tokens);
  const double coef = __ddiv_rn(clip, __dadd_rn(norm, 1e-6));
  return static_cast<float>(coef < 1 ? __dmul_rn(inverse_tokens, coef) : inverse_tokens);
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
  if (threadIdx.x == 0) shared_factor = gradient_factor(p.scalars, p.norm);
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

constexpr int kQuantBlock = 256;  // elements that share an absmax
constexpr int kRunsPerLane = kQuantBlock / (4 * kWarp);
static_assert(kMomentBlockBytes == kBlock + kBlock / kQuantBlock * 4);

struct Adamw8bit {
  float *master, *grad;
  std::uint8_t *m, *v;  // kMomentBlockBytes per 4096 elements
  const float* table;   // as in Adamw
  const float* scalars;
  const double* norm;
};

struct MomentMaps {
  float first[256], second[256];
};

// A map and its thresholds, in shared memory.
struct MomentTable {
  float values[256], thresholds[256];

  // By kThreads threads; a barrier must follow.
  __device__ void fill(const float* map) {
    static_assert(kThreads == 256);
    const int i = static_cast<int>(threadIdx.x);
    values[i] = map[i];
    if (i < 255) thresholds[i] = dynamic_map_threshold(map, i);
  }
  // How many thresholds lie below x, 0 for NaN.
  __device__ int code(float x) const {
    int count = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
      if (x > thresholds[count + step - 1]) count += step;
    }
    return count;
  }
};

// The code of m over its absmax, on m's side of 0.
__device__ inline int signed_code(const MomentTable& table, float m, float absmax) {
  constexpr int kZero = 127;
  const int code = table.code(__fdiv_rn(m, absmax));
  if ((code < kZero) == (__float_as_uint(m) >> 31 != 0)) return code;
  return m > 0 ? code + 1 : code - 1;
}

// The numbers of a step that 4096 elements share.
struct StepNumbers {
  float beta1, beta2, left1, left2, correction1, correction2, eps, factor, rate, keep;

  // `entry` of the block table.
  __device__ StepNumbers(const float* scalars, const float* entry, float gradient_factor) {
    beta1 = scalars[1], left1 = __fsub_rn(1.0f, beta1);
    beta2 = scalars[2], left2 = __fsub_rn(1.0f, beta2);
    eps = scalars[3];
    correction1 = scalars[4], correction2 = scalars[5];
    factor = gradient_factor;
    rate = __fmul_rn(scalars[0], entry[0]);
    keep = __fsub_rn(1.0f, __fmul_rn(rate, entry[1]));
  }

  // m and v become the new moments, master the new master.
  __device__ void step(float gradient, float& master, float& m, float& v) const {
    constexpr float kLargest = 0x1.fffffep+127f;
    const float g = __fmul_rn(gradient, factor), square = __fmul_rn(g, g);
    const bool finite = square <= kLargest;
    m = __fadd_rn(__fmul_rn(beta1, m), __fmul_rn(left1, g));
    v = __fadd_rn(__fmul_rn(beta2, v), __fmul_rn(left2, square));
    const float root = __fsqrt_rn(__fdiv_rn(v, correction2));
    const float update = __fdiv_rn(__fdiv_rn(m, correction1), __fadd_rn(root, eps));
    const float updated = __fsub_rn(__fmul_rn(master, keep), __fmul_rn(rate, update));
    master = finite ? updated : master;
    m = finite ? m : 0.0f;
    v = finite ? v : 0.0f;
  }
};

// What a lane has of 256 elements: runs of 4, 128 elements apart.
struct LaneElements {
  Run<float, 4> master[kRunsPerLane], grad[kRunsPerLane];
  std::uint32_t m[kRunsPerLane], v[kRunsPerLane];  // four codes each
  float m_absmax, v_absmax;
};

__device__ inline void step_of_warp(const Adamw8bit& p, const StepNumbers& numbers,
                                    const MomentTable& first, const MomentTable& second,
                                    std::int64_t block, int part) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const std::int64_t stored = block * kMomentBlockBytes;
  const std::int64_t absmax_at = stored + kBlock + part * 4;
  LaneElements e;
#pragma unroll
  for (int r = 0; r < kRunsPerLane; ++r) {
    const int i = part * kQuantBlock + (r * kWarp + lane) * 4;
    e.master[r] = load_run<4>(static_cast<const float*>(p.master + block * kBlock + i));
    e.grad[r] = load_run<4>(static_cast<const float*>(p.grad + block * kBlock + i));
    e.m[r] = *reinterpret_cast<const std::uint32_t*>(p.m + stored + i);
    e.v[r] = *reinterpret_cast<const std::uint32_t*>(p.v + stored + i);
  }
  e.m_absmax = *reinterpret_cast<const float*>(p.m + absmax_at);
  e.v_absmax = *reinterpret_cast<const float*>(p.v + absmax_at);
  float m[kRunsPerLane][4], v[kRunsPerLane][4], m_most = 0, v_most = 0;
#pragma unroll
  for (int r = 0; r < kRunsPerLane; ++r) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      m[r][k] = __fmul_rn(first.values[e.m[r] >> (8 * k) & 255], e.m_absmax);
      v[r][k] = __fmul_rn(second.values[e.v[r] >> (8 * k) & 255], e.v_absmax);
      numbers.step(e.grad[r].values[k], e.master[r].values[k], m[r][k], v[r][k]);
      m_most = fmaxf(m_most, fabsf(m[r][k]));
      v_most = fmaxf(v_most, v[r][k]);
      e.grad[r].values[k] = 0;
    }
  }
  m_most = warp_max(m_most);
  v_most = warp_max(v_most);
#pragma unroll
  for (int r = 0; r < kRunsPerLane; ++r) {
    const int i = part * kQuantBlock + (r * kWarp + lane) * 4;
    e.m[r] = e.v[r] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int m_code = signed_code(first, m[r][k], m_most);
      const int v_code = second.code(__fdiv_rn(v[r][k], v_most));
      e.m[r] |= static_cast<std::uint32_t>(m_code & 255) << (8 * k);
      e.v[r] |= static_cast<std::uint32_t>(v_code) << (8 * k);
    }
    store_run(p.master + block * kBlock + i, e.master[r]);
    store_run(p.grad + block * kBlock + i, e.grad[r]);
    *reinterpret_cast<std::uint32_t*>(p.m + stored + i) = e.m[r];
    *reinterpret_cast<std::uint32_t*>(p.v + stored + i) = e.v[r];
  }
  if (lane == 0) {
    *reinterpret_cast<float*>(p.m + absmax_at) = m_most;
    *reinterpret_cast<float*>(p.v + absmax_at) = v_most;
  }
}

__global__ __launch_bounds__(kThreads) void adamw8bit_step_kernel(
    const Adamw8bit p, const __grid_constant__ MomentMaps maps) {
  __shared__ MomentTable first, second;
  __shared__ float shared_factor;
  // The tables come with the launch: they are filled while the kernel before this one ends.
  admit_successor();
  first.fill(maps.first);
  second.fill(maps.second);
  wait_for_predecessor();
  if (threadIdx.x == 0) shared_factor = gradient_factor(p.scalars, p.norm);
  __syncthreads();
  const std::int64_t block = blockIdx.x;
  const StepNumbers numbers(p.scalars, p.table + 2 * block, shared_factor);
  for (int part = static_cast<int>(threadIdx.x / kWarp); part < kBlock / kQuantBlock;
       part += kThreads / kWarp) {
    step_of_warp(p, numbers, first, second, block, part);
  }
}

void run_adamw8bit(const OpCall& call, const Launch& launch) {
  const Adamw8bit p{.master = call.output<float>(0),
                    .grad = call.mutable_input<float>(3),
                    .m = call.mutable_input<std::uint8_t>(1),
                    .v = call.mutable_input<std::uint8_t>(2),
                    .table = call.input<float>(4),
                    .scalars = call.input<float>(5),
                    .norm = call.input<double>(6)};
  const std::int64_t blocks = call.in_types[0].elements() / kBlock;
  if (blocks == 0) return;
  MomentMaps maps;
  std::copy_n(dynamic_map_signed, 256, maps.first);
  std::copy_n(dynamic_map_unsigned, 256, maps.second);
  start_kernel("adamw8bit", adamw8bit_step_kernel, static_cast<unsigned>(blocks), kThreads, 0,
               launch, p, maps);
}

}  // namespace

extern const Kernel sum_squares_kernel{supports_sum_squares, partial_bytes, run_sum_squares};
extern const Kernel adamw_kernel{supports_adamw, nullptr, run_adamw};
extern const Kernel adamw8bit_kernel{supports_adamw, nullptr, run_adamw8bit};

}  // namespace nibble::cuda
