// a' = a cos w - b sin w, b' = a sin w + b cos w for each pair of a head, w = positions[t] *
// frequencies[i] (engine/ops/rope.cpp). One launch serves one tensor or two (q and k of fused.h),
// whose heads then count as one list.
//
// A block of threads owns one row and up to kPairs pairs of a head. Its threads first work out the
// sines and cosines of those pairs, into shared memory, and then share out the runs of pairs of all
// heads: a thread keeps to one place within a head, with its sines and cosines in registers, and
// walks over heads. The first run is loaded before the sines are worked out, so that the two
// latencies overlap.
//
// The angle is formed and reduced in F64: a handful of F64 instructions per pair and row, whatever
// the number of heads, since consumer cards have few F64 units. The polynomials after it are F32,
// those of backends/cpu/vmath.h (Cephes library, S. Moshier): at most 8e-8 off.
//
// A pair is read before it is written, by one thread, so x and y may be the same memory.
#include "backends/cuda/fused.h"
#include "backends/cuda/runs.cuh"

namespace nibble::cuda {
namespace {

constexpr int kPairs = 128;       // of one block of threads
constexpr int kMaxThreads = 384;  // runs of 8 pairs: 48 heads of 128 channels at once

// Branch-free. |angle| < 2^31.
__device__ inline void sin_cos(double angle, float& sine, float& cosine) {
  const double round = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = fma(angle, 0.636619772367581343, round);
  const double n = shifted - round;
  const int quadrant = __double2loint(shifted);
  const auto r = static_cast<float>(fma(n, -1.57079632679489662, angle));
  const float z = r * r;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const bool swap = (quadrant & 1) != 0;
  sine = (swap ? c : s) * ((quadrant & 2) != 0 ? -1.0f : 1.0f);
  cosine = (swap ? s : c) * (((quadrant + 1) & 2) != 0 ? -1.0f : 1.0f);
}

template <class T>
struct Rope {
  const T *x0, *x1;  // x1: the second tensor, of heads - heads0 heads
  T *y0, *y1;
  const std::int32_t* positions;
  const float* frequencies;
  int heads0, heads;  // of the first tensor, of both
  int head_dim;
  float direction;

  // Where a head of a row begins.
  __device__ const T* input(std::int64_t row, int head) const {
    return head < heads0 ? x0 + (row * heads0 + head) * head_dim
                         : x1 + (row * (heads - heads0) + head - heads0) * head_dim;
  }
  __device__ T* output(std::int64_t row, int head) const {
    return head < heads0 ? y0 + (row * heads0 + head) * head_dim
                         : y1 + (row * (heads - heads0) + head - heads0) * head_dim;
  }
};

// kWidth pairs, as they lie in memory: all a and then all b, or a and b in turn.
template <class T, int kWidth, RopePairs kLayout>
struct PairRun {
  static constexpr bool kHalf = kLayout == RopePairs::half;
  Run<T, kHalf ? kWidth : 2 * kWidth> runs[kHalf ? 2 : 1];

  __device__ float a(int i) const { return to_float(runs[0].values[kHalf ? i : 2 * i]); }
  __device__ float b(int i) const {
    return kHalf ? to_float(runs[kHalf ? 1 : 0].values[i]) : to_float(runs[0].values[2 * i + 1]);
  }
  __device__ void set(int i, float a, float b) {
    runs[0].values[kHalf ? i : 2 * i] = from_float<T>(a);
    runs[kHalf ? 1 : 0].values[kHalf ? i : 2 * i + 1] = from_float<T>(b);
  }
  // Pairs from `pair` of the head at `head`.
  __device__ void load(const T* head, int pair, int head_dim) {
    if constexpr (kHalf) {
      runs[0] = load_run<kWidth>(head + pair);
      runs[1] = load_run<kWidth>(head + head_dim / 2 + pair);
    } else {
      runs[0] = load_run<2 * kWidth>(head + 2 * pair);
    }
  }
  __device__ void store(T* head, int pair, int head_dim) const {
    if constexpr (kHalf) {
      store_run(head + pair, runs[0]);
      store_run(head + head_dim / 2 + pair, runs[1]);
    } else {
      store_run(head + 2 * pair, runs[0]);
    }
  }
};

template <class T, int kWidth, RopePairs kLayout>
__global__ __launch_bounds__(kMaxThreads) void rotate_kernel(Rope<T> p) {
  begin_kernel();
  alignas(16) __shared__ float cosines[kPairs];
  alignas(16) __shared__ float sines[kPairs];
  const std::int64_t row = blockIdx.x;
  const int begin = blockIdx.y * kPairs;
  const int pairs = min(kPairs, p.head_dim / 2 - begin);
  const int runs_per_head = pairs / kWidth;
  const int heads_at_once = static_cast<int>(blockDim.x) / runs_per_head;
  const int thread = threadIdx.x;
  const int pair = thread % runs_per_head * kWidth;
  int head = thread / runs_per_head;
  if (head >= heads_at_once) head = p.heads;  // threads left over
  PairRun<T, kWidth, kLayout> run;
  if (head < p.heads) run.load(p.input(row, head), begin + pair, p.head_dim);

  const double position = static_cast<double>(p.direction) * p.positions[row];
#pragma unroll 1
  for (int i = thread; i < pairs; i += static_cast<int>(blockDim.x)) {
    sin_cos(position * static_cast<double>(p.frequencies[begin + i]), sines[i], cosines[i]);
  }
  __syncthreads();
  if (head >= p.heads) return;

  const auto c = load_run<kWidth>(static_cast<const float*>(cosines) + pair);
  const auto s = load_run<kWidth>(static_cast<const float*>(sines) + pair);
  while (true) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float a = run.a(i), b = run.b(i);
      run.set(i, a * c.values[i] - b * s.values[i], a * s.values[i] + b * c.values[i]);
    }
    run.store(p.output(row, head), begin + pair, p.head_dim);
    head += heads_at_once;
    if (head >= p.heads) break;
    run.load(p.input(row, head), begin + pair, p.head_dim);
  }
}

template <int kWidth, RopePairs kLayout, class T>
void launch_width(const Rope<T>& p, std::int64_t rows, const Launch& launch) {
  const int pairs = p.head_dim / 2;
  const std::int64_t runs = std::int64_t{p.heads} * ((pairs < kPairs ? pairs : kPairs) / kWidth);
  // The same number of runs for every thread, nearly; never less than a head's.
  const std::int64_t threads = ceil_div(runs, ceil_div(runs, kMaxThreads));
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(pairs, kPairs)));
  const auto block = static_cast<unsigned>(ceil_div(threads, kWarp) * kWarp);
  start_kernel("rope", rotate_kernel<T, kWidth, kLayout>, grid, block, 0, launch, p);
}

// 16 bytes at a time where the pairs of a head come in whole packs, else pair by pair.
template <class T>
void launch_rope(const Rope<T>& p, std::int64_t rows, RopePairs layout, const Launch& launch) {
  if (rows == 0 || p.heads == 0) return;
  constexpr int kHalf = kPackWidth<T>, kAdjacent = kPackWidth<T> / 2;
  const int pairs = p.head_dim / 2;
  if (layout == RopePairs::half) {
    pairs % kHalf == 0 ? launch_width<kHalf, RopePairs::half>(p, rows, launch)
                       : launch_width<1, RopePairs::half>(p, rows, launch);
  } else {
    pairs % kAdjacent == 0 ? launch_width<kAdjacent, RopePairs::adjacent>(p, rows, launch)
                           : launch_width<1, RopePairs::adjacent>(p, rows, launch);
  }
}

template <class T>
Rope<T> rope_of(const OpCall& call) {
  const auto params = call.node->get<RopeParams>();
  const int heads = static_cast<int>(call.in_types[0].shape[1] / params.head_dim);
  return {.x0 = call.input<T>(0),
          .x1 = nullptr,
          .y0 = call.output<T>(0),
          .y1 = nullptr,
          .positions = call.input<std::int32_t>(1),
          .frequencies = call.input<float>(2),
          .heads0 = heads,
          .heads = heads,
          .head_dim = params.head_dim,
          .direction = params.direction};
}

bool supports(const OpCall& call) {
  return is_computable(call.out_types[0].dtype) && call.in_types[2].dtype == DType::F32;
}

void run(const OpCall& call, const Launch& launch) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    launch_rope(rope_of<decltype(type)>(call), call.in_types[0].shape[0],
                call.node->get<RopeParams>().pairs, launch);
  });
}

}  // namespace

// Roping one tensor twice is left out: the second call may work in the memory that the first reads.
bool rope_pair_supports(const OpCall& first, const OpCall& second) {
  const Node &a = *first.node, &b = *second.node;
  const auto p = a.get<RopeParams>(), q = b.get<RopeParams>();
  return supports(first) && first.out_types[0].dtype == second.out_types[0].dtype &&
         first.in_types[0].shape[0] == second.in_types[0].shape[0] && p.head_dim == q.head_dim &&
         p.pairs == q.pairs && p.direction == q.direction && !(a.inputs[0] == b.inputs[0]) &&
         a.inputs[1] == b.inputs[1] && a.inputs[2] == b.inputs[2];
}

void rope_pair(const OpCall& first, const OpCall& second, const Launch& launch) {
  with_type(first.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    Rope<T> p = rope_of<T>(first);
    const Rope<T> q = rope_of<T>(second);
    p.x1 = q.x0;
    p.y1 = q.y0;
    p.heads += q.heads;
    launch_rope(p, first.in_types[0].shape[0], first.node->get<RopeParams>().pairs, launch);
  });
}

extern const Kernel rope_kernel{supports, nullptr, run};

}  // namespace nibble::cuda
