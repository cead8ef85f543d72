// rms_norm and its gradients; the formulas are in engine/ops/rms_norm.cpp. Also the two fusions
// with a residual addition of fused.h: the same code with one more operand, so that the bytes are
// those of two steps.
//
// y and dx: memory bound. A row belongs to one warp (up to 128 packs of 16 bytes) or one block of
// threads (up to 1024 packs); it is loaded once, kept in registers as packs, summed, and written.
// The sums of the row meet in one exchange: within a thread in ascending order, then over lanes by
// a butterfly, then over warps in order; who sums what depends on the width alone. Wider rows, and
// rows that are not whole packs, are read twice, the second time mostly from cache. The factors are
// re-read for every row: a few KiB that stay in the L1 cache.
//
// Where a multiplication meets an addition, the rounding is written out (__fmaf_rn and so on): the
// compiler must not contract one way in the plain case and another in the fused one.
//
// dw: r of every row first, then partial sums over kChunk rows, a thread per column, then the sums
// of the chunks of each 512 rows are added and go to dw, in order.
#include "backends/cuda/decode.h"
#include "backends/cuda/fused.h"
#include "backends/cuda/runs.cuh"

namespace nibble::cuda {
namespace {

// The factors w: F32, or BF16 when `narrow`.
struct Factors {
  const void* data;
  bool narrow;

  template <int kWidth>
  __device__ void load(std::int64_t i, float (&w)[kWidth]) const {
    if (narrow) {
      const auto run = load_run<kWidth>(static_cast<const bf16*>(data) + i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) w[k] = to_float(run.values[k]);
    } else {
      const auto run = load_run<kWidth>(static_cast<const float*>(data) + i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) w[k] = run.values[k];
    }
  }
};

// Sums over the kThreads threads of a row, in each of them. Once per kernel: the shared memory is
// not guarded against a second use.
template <int kThreads, int kSums>
__device__ inline void row_sums(float (&x)[kSums]) {
#pragma unroll
  for (int s = 0; s < kSums; ++s) x[s] = warp_sum(x[s]);
  if constexpr (kThreads > kWarp) {
    __shared__ float sums[kSums][kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s][threadIdx.x / kWarp] = x[s];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      x[s] = 0;
#pragma unroll
      for (int i = 0; i < kThreads / kWarp; ++i) x[s] = __fadd_rn(x[s], sums[s][i]);
    }
  }
}

__device__ inline float inverse_rms(float squares, std::int64_t cols, float eps) {
  const float mean = __fdiv_rn(squares, static_cast<float>(cols));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

// a + b, rounded to T.
template <class T, int kWidth>
__device__ inline Run<T, kWidth> rounded_sum(const Run<T, kWidth>& a, const Run<T, kWidth>& b) {
  Run<T, kWidth> sum;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    sum.values[k] = from_float<T>(__fadd_rn(to_float(a.values[k]), to_float(b.values[k])));
  }
  return sum;
}

// y = normalized x; kAdds: of s = x + added instead.
template <class T, bool kAdds>
struct Forward {
  using Element = T;
  static constexpr int kSums = 1;
  const T* x;
  const T* added;
  T* sum;  // s; null: not stored
  Factors w;
  T* y;
  std::int64_t rows, cols;
  float eps;

  template <int kWidth>
  struct Loaded {
    Run<T, kWidth> x, added;
    __device__ void forget() { forget_derived(x); }
  };
  // Elements from i of the flat arrays.
  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    Loaded<kWidth> loaded;
    loaded.x = load_run<kWidth>(x + i);
    if constexpr (kAdds) loaded.added = load_run<kWidth>(added + i);
    return loaded;
  }
  // Adds the residual: loaded.x is the norm's input afterwards.
  template <int kWidth>
  __device__ void prepare(std::int64_t i, Loaded<kWidth>& loaded) const {
    if constexpr (kAdds) {
      loaded.x = rounded_sum(loaded.x, loaded.added);
      if (sum != nullptr) store_run(sum + i, loaded.x);
    }
  }
  // After prepare() of the same elements by the same thread; s may be in the memory of x or added.
  template <int kWidth>
  __device__ Loaded<kWidth> reload(std::int64_t i) const {
    Loaded<kWidth> loaded;
    if (kAdds && sum != nullptr) {
      loaded.x = load_run<kWidth>(static_cast<const T*>(sum) + i);
    } else {
      loaded = load<kWidth>(i);
      prepare(i, loaded);
    }
    return loaded;
  }
  template <int kWidth>
  __device__ void add_to(float (&sums)[kSums], std::int64_t, const Loaded<kWidth>& loaded) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float v = to_float(loaded.x.values[k]);
      sums[0] = __fmaf_rn(v, v, sums[0]);
    }
  }
  __device__ void finish_sums(float (&sums)[kSums]) const {
    sums[0] = inverse_rms(sums[0], cols, eps);
  }
  // Elements from i of the arrays, c of the row.
  template <int kWidth>
  __device__ void store(std::int64_t i, std::int64_t c, const float (&sums)[kSums],
                        const Loaded<kWidth>& loaded) const {
    float factors[kWidth];
    w.load<kWidth>(c, factors);
    Run<T, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float v = __fmul_rn(to_float(loaded.x.values[k]), sums[0]);
      to.values[k] = from_float<T>(__fmul_rn(v, factors[k]));
    }
    store_run(y + i, to);
  }
};

// dx = r * (g - x * k) with g = dy * w and k = r^2 / C * sum of g x; kAdds: dx, rounded, + added.
template <class T, bool kAdds>
struct Backward {
  using Element = T;
  static constexpr int kSums = 2;
  const T *x, *dy;
  const T* added;
  Factors w;
  T* dx;
  std::int64_t rows, cols;
  float eps;

  template <int kWidth>
  struct Loaded {
    Run<T, kWidth> x, dy, added;
    __device__ void forget() {
      forget_derived(x);
      forget_derived(dy);
      if constexpr (kAdds) forget_derived(added);
    }
  };
  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    Loaded<kWidth> loaded;
    loaded.x = load_run<kWidth>(x + i);
    loaded.dy = load_run<kWidth>(dy + i);
    if constexpr (kAdds) loaded.added = load_run<kWidth>(added + i);
    return loaded;
  }
  template <int kWidth>
  __device__ void prepare(std::int64_t, Loaded<kWidth>&) const {}
  template <int kWidth>
  __device__ Loaded<kWidth> reload(std::int64_t i) const {
    return load<kWidth>(i);
  }
  template <int kWidth>
  __device__ void add_to(float (&sums)[kSums], std::int64_t c, const Loaded<kWidth>& loaded) const {
    float factors[kWidth];
    w.load<kWidth>(c, factors);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float v = to_float(loaded.x.values[k]);
      const float g = __fmul_rn(to_float(loaded.dy.values[k]), factors[k]);
      sums[0] = __fmaf_rn(v, v, sums[0]);
      sums[1] = __fmaf_rn(g, v, sums[1]);
    }
  }
  __device__ void finish_sums(float (&sums)[kSums]) const {
    const float r = inverse_rms(sums[0], cols, eps);
    sums[0] = r;
    sums[1] = __fmul_rn(__fdiv_rn(__fmul_rn(r, r), static_cast<float>(cols)), sums[1]);
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, std::int64_t c, const float (&sums)[kSums],
                        const Loaded<kWidth>& loaded) const {
    float factors[kWidth];
    w.load<kWidth>(c, factors);
    Run<T, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float g = __fmul_rn(to_float(loaded.dy.values[k]), factors[k]);
      const float rest = __fmaf_rn(-to_float(loaded.x.values[k]), sums[1], g);
      to.values[k] = from_float<T>(__fmul_rn(sums[0], rest));
    }
    if constexpr (kAdds) to = rounded_sum(to, loaded.added);
    store_run(dx + i, to);
  }
};

constexpr int kWarpRows = 4;  // rows of a block of threads when each warp has one

// kThreads threads per row of up to kThreads * kPacks packs. The second launch bound asks for
// enough blocks on a multiprocessor to hide each other's barriers: 7 of 128 threads leave 72
// registers to each, 2 of 512 leave 64.
template <class Body, int kThreads, int kPacks>
__global__ __launch_bounds__(kThreads == kWarp ? kWarp * kWarpRows : kThreads,
                             kThreads == 512 ? 2 : 7) void row_kernel(Body p) {
  begin_kernel();
  constexpr int kWidth = kPackWidth<typename Body::Element>;
  std::int64_t row = blockIdx.x;
  if constexpr (kThreads == kWarp) {
    row = row * kWarpRows + threadIdx.x / kWarp;
    if (row >= p.rows) return;
  }
  const int thread = threadIdx.x % kThreads;
  const int packs = static_cast<int>(p.cols) / kWidth;
  const std::int64_t base = row * p.cols;
  typename Body::template Loaded<kWidth> loaded[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * kThreads + thread;
    if (pack < packs) loaded[j] = p.template load<kWidth>(base + pack * kWidth);
  }
  float sums[Body::kSums] = {};
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * kThreads + thread;
    if (pack < packs) {
      p.prepare(base + pack * kWidth, loaded[j]);
      p.add_to(sums, pack * kWidth, loaded[j]);
    }
  }
  row_sums<kThreads>(sums);
  p.finish_sums(sums);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = j * kThreads + thread;
    if (pack < packs) {
      loaded[j].forget();
      p.store(base + pack * kWidth, pack * kWidth, sums, loaded[j]);
    }
  }
}

constexpr int kWideThreads = 512;

// A block of threads per row of any width; runs of kWidth elements, read twice by the same thread.
template <class Body, int kWidth>
__global__ __launch_bounds__(kWideThreads, 2) void wide_row_kernel(Body p) {
  begin_kernel();
  const std::int64_t runs = p.cols / kWidth;
  const std::int64_t base = blockIdx.x * p.cols;
  float sums[Body::kSums] = {};
#pragma unroll 2
  for (std::int64_t run = threadIdx.x; run < runs; run += kWideThreads) {
    auto loaded = p.template load<kWidth>(base + run * kWidth);
    p.prepare(base + run * kWidth, loaded);
    p.add_to(sums, run * kWidth, loaded);
  }
  row_sums<kWideThreads>(sums);
  p.finish_sums(sums);
#pragma unroll 2
  for (std::int64_t run = threadIdx.x; run < runs; run += kWideThreads) {
    p.store(base + run * kWidth, run * kWidth, sums,
            p.template reload<kWidth>(base + run * kWidth));
  }
}

template <class Body>
void launch_rows(const char* name, const Body& body, const Launch& launch) {
  constexpr int kWidth = kPackWidth<typename Body::Element>;
  if (body.rows == 0 || body.cols == 0) return;
  const auto rows = static_cast<unsigned>(body.rows);
  const std::int64_t packs = body.cols / kWidth;
  if (body.cols % kWidth != 0) {
    start_kernel(name, wide_row_kernel<Body, 1>, rows, kWideThreads, 0, launch, body);
  } else if (packs <= 128) {
    const auto blocks = static_cast<unsigned>(ceil_div(body.rows, kWarpRows));
    start_kernel(name, row_kernel<Body, kWarp, 4>, blocks, kWarp * kWarpRows, 0, launch, body);
  } else if (packs <= 512) {
    start_kernel(name, row_kernel<Body, 128, 4>, rows, 128, 0, launch, body);
  } else if (packs <= 1024) {
    start_kernel(name, row_kernel<Body, 512, 2>, rows, 512, 0, launch, body);
  } else {
    start_kernel(name, wide_row_kernel<Body, kWidth>, rows, kWideThreads, 0, launch, body);
  }
}

constexpr int kTile = 512;  // rows summed before dw is touched
constexpr int kChunk = 64;  // rows of one partial sum
static_assert(kTile % kChunk == 0);
constexpr int kThreads = 256;

// r of every row, a warp each.
template <class T, int kWidth>
__global__ __launch_bounds__(kThreads) void inverse_rms_kernel(const T* x, std::int64_t rows,
                                                               std::int64_t cols, float eps,
                                                               float* r) {
  begin_kernel();
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  float sum = 0;
#pragma unroll 4
  for (std::int64_t c = lane * kWidth; c < cols; c += kWarp * kWidth) {
    const auto run = load_run<kWidth>(x + row * cols + c);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float v = to_float(run.values[k]);
      sum += v * v;
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) r[row] = inverse_rms(sum, cols, eps);
}

// partial[chunk, c] = the sum of dy * x * r over the chunk's rows.
template <class T>
__global__ __launch_bounds__(kThreads) void chunk_sums_kernel(const T* x, const T* dy,
                                                              const float* r, std::int64_t rows,
                                                              std::int64_t cols, float* partial) {
  begin_kernel();
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= cols) return;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * kChunk;
  const std::int64_t end = begin + kChunk < rows ? begin + kChunk : rows;
  float sum = 0;
#pragma unroll 8
  for (std::int64_t t = begin; t < end; ++t) {
    sum += to_float(dy[t * cols + c]) * (to_float(x[t * cols + c]) * r[t]);
  }
  partial[blockIdx.y * cols + c] = sum;
}

__global__ __launch_bounds__(kThreads) void add_tiles_kernel(const float* partial,
                                                             std::int64_t chunks, std::int64_t cols,
                                                             float* acc) {
  begin_kernel();
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= cols) return;
  float total = acc[c];
  for (std::int64_t tile = 0; tile < chunks; tile += kTile / kChunk) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kTile / kChunk; ++k) {
      if (tile + k < chunks) sum += partial[(tile + k) * cols + c];
    }
    total += sum;
  }
  acc[c] = total;
}

bool is_direct(DType dtype) { return dtype == DType::F32 || dtype == DType::BF16; }

// The factors, input 1; decoded into scratch when they are stored as another type.
Factors factors(const OpCall& call, const Launch& launch) {
  const TensorType& type = call.in_types[1];
  if (is_direct(type.dtype)) return {call.in[1], type.dtype == DType::BF16};
  dequantize(type, call.in[1], DType::F32, call.scratch, type.shape.cols(), launch);
  return {call.scratch, false};
}

std::int64_t factor_bytes(const OpCall& call, const Card&) {
  const TensorType& type = call.in_types[1];
  return is_direct(type.dtype) ? 0 : type.elements() * static_cast<std::int64_t>(sizeof(float));
}

template <class T, bool kAdds = false>
Forward<T, kAdds> forward(const OpCall& call, const Factors& w) {
  return {.x = call.input<T>(0),
          .added = nullptr,
          .sum = nullptr,
          .w = w,
          .y = call.output<T>(0),
          .rows = call.in_types[0].shape[0],
          .cols = call.in_types[0].shape[1],
          .eps = call.node->get<RmsNormParams>().eps};
}

template <class T, bool kAdds = false>
Backward<T, kAdds> backward(const OpCall& call, const Factors& w) {
  return {.x = call.input<T>(0),
          .dy = call.input<T>(2),
          .added = nullptr,
          .w = w,
          .dx = call.output<T>(0),
          .rows = call.in_types[0].shape[0],
          .cols = call.in_types[0].shape[1],
          .eps = call.node->get<RmsNormParams>().eps};
}

bool supports(const OpCall& call) {
  const DType w = call.in_types[1].dtype;
  return is_computable(call.in_types[0].dtype) && (is_direct(w) || can_decode(w));
}

void run(const OpCall& call, const Launch& launch) {
  const Factors w = factors(call, launch);
  with_type(call.in_types[0].dtype,
            [&](auto type) { launch_rows("rms_norm", forward<decltype(type)>(call, w), launch); });
}

void run_dx(const OpCall& call, const Launch& launch) {
  const Factors w = factors(call, launch);
  with_type(call.in_types[0].dtype, [&](auto type) {
    launch_rows("rms_norm_dx", backward<decltype(type)>(call, w), launch);
  });
}

bool supports_dw(const OpCall& call) {
  return call.in_types[0].dtype == DType::F32 && is_computable(call.in_types[1].dtype);
}

// r of every row, and the partial sums.
std::int64_t dw_bytes(const OpCall& call, const Card&) {
  const std::int64_t rows = call.in_types[1].shape[0], cols = call.in_types[1].shape[1];
  return (rows + ceil_div(rows, kChunk) * cols) * static_cast<std::int64_t>(sizeof(float));
}

void run_dw(const OpCall& call, const Launch& launch) {
  const std::int64_t rows = call.in_types[1].shape[0], cols = call.in_types[1].shape[1];
  if (rows == 0 || cols == 0) return;
  const float eps = call.node->get<RmsNormParams>().eps;
  const std::int64_t chunks = ceil_div(rows, kChunk);
  auto* r = static_cast<float*>(call.scratch);
  float* partial = r + rows;
  const auto row_blocks = static_cast<unsigned>(ceil_div(rows, kThreads / kWarp));
  const auto column_blocks = static_cast<unsigned>(ceil_div(cols, kThreads));
  with_type(call.in_types[1].dtype, [&](auto type) {
    using T = decltype(type);
    const T *x = call.input<T>(1), *dy = call.input<T>(2);
    const auto find_r =
        cols % kPackWidth<T> == 0 ? inverse_rms_kernel<T, kPackWidth<T>> : inverse_rms_kernel<T, 1>;
    start_kernel("rms_norm_dw", find_r, row_blocks, kThreads, 0, launch, x, rows, cols, eps, r);
    start_kernel("rms_norm_dw", chunk_sums_kernel<T>,
                 dim3(column_blocks, static_cast<unsigned>(chunks)), kThreads, 0, launch, x, dy, r,
                 rows, cols, partial);
  });
  start_kernel("rms_norm_dw", add_tiles_kernel, column_blocks, kThreads, 0, launch, partial, chunks,
               cols, call.output<float>(0));
}

// Both steps of a fused pair work on activations of one type and shape, with factors that need no
// decoding.
bool same_activations(const OpCall& first, const OpCall& second, DType w) {
  return is_computable(first.out_types[0].dtype) && first.out_types[0].shape.rank() == 2 &&
         first.out_types[0] == second.out_types[0] && is_direct(w) &&
         !(second.node->inputs[0] == second.node->inputs[1]);
}

}  // namespace

bool add_rms_norm_supports(const OpCall& first, const OpCall& second) {
  return same_activations(first, second, second.in_types[1].dtype);
}

void add_rms_norm(const OpCall& first, const OpCall& second, const Launch& launch) {
  const Factors w = factors(second, launch);
  with_type(first.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    Forward<T, true> body = forward<T, true>(second, w);
    body.x = first.input<T>(0);
    body.added = first.input<T>(1);
    body.sum = first.out[0] == second.out[0] ? nullptr : first.output<T>(0);
    launch_rows("add_rms_norm", body, launch);
  });
}

bool rms_norm_dx_add_supports(const OpCall& first, const OpCall& second) {
  return same_activations(first, second, first.in_types[1].dtype);
}

void rms_norm_dx_add(const OpCall& first, const OpCall& second, const Launch& launch) {
  const Factors w = factors(first, launch);
  const int other = second.in[0] == first.out[0] ? 1 : 0;
  with_type(first.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T, true> body = backward<T, true>(first, w);
    body.added = second.input<T>(other);
    body.dx = second.output<T>(0);
    launch_rows("rms_norm_dx_add", body, launch);
  });
}

extern const Kernel rms_norm_kernel{supports, factor_bytes, run};
extern const Kernel rms_norm_dx_kernel{supports, factor_bytes, run_dx};
extern const Kernel rms_norm_dw_kernel{supports_dw, dw_bytes, run_dw};

}  // namespace nibble::cuda
