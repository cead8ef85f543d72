// Loss, dx and dW of a linear layer under cross-entropy (engine/ops/linear_cross_entropy.cpp).
//
//   z[e] = x[row_e] W^T,  loss[e] = max + log sum exp(z - max) - z[label],  dz = softmax(z) -
//   onehot dx[row_e] = dz[e] W                    dW += dloss * sum over e of dz[e]^T x[row_e]
//
// Entries of loss_rows are taken in chunks whose size is a function of the shapes: gather their
// rows of x, one product for the logits in F32 (BF16 ones would lose the loss), one block per
// entry that turns its logits into loss and gradient, one product for dx, scatter. Which entries
// are padding is known on the device alone, so all chunks are launched; the kernels here pass over
// padding. A weight that is not in the compute dtype is dequantized once and serves all chunks.
//
// dz takes the place of the logits, row by row. In BF16 a row's gradient is half as long: a block
// reads a run of logits, waits, and writes the run's gradients to half the offset, which is behind
// everything it has yet to read.
//
// dW sums in tiles of 512 entries, in order. A label or a row out of range makes that entry's loss
// NaN and is otherwise padding: nothing outside the tensors is touched.
#include <algorithm>

#include <cfloat>

#include "backends/cuda/gemm.h"
#include "backends/cuda/low_rank.h"
#include "backends/cuda/weight.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRun = 8;  // logits a thread takes at a time: 32 bytes

// Entries of a chunk: a multiple of 512 whose logits stay within 512 MiB for 262144 words.
std::int64_t chunk_rows(const OpCall& call, std::int64_t vocabulary, std::int64_t entries) {
  const std::int64_t most = call.node->get<CrossEntropyParams>().chunk_rows;
  const std::int64_t rows = vocabulary <= 32768 ? 2048 : vocabulary <= 131072 ? 1024 : 512;
  return std::min({rows, most > 0 ? most : rows, entries});
}

// Inputs and sizes of a call; `first` is the number of its input x.
struct Problem {
  Problem(const OpCall& call, int first)
      : dtype(call.in_types[static_cast<std::size_t>(first)].dtype),
        weight(call.in_types[static_cast<std::size_t>(first + 1)]),
        rows(call.in_types[static_cast<std::size_t>(first)].shape[0]),
        channels(weight.shape[1]),
        vocabulary(weight.shape[0]),
        entries(call.in_types[static_cast<std::size_t>(first + 3)].shape[0]),
        chunk(chunk_rows(call, vocabulary, entries)),
        x(call.in[static_cast<std::size_t>(first)]),
        w(call.in[static_cast<std::size_t>(first + 1)]),
        labels(call.input<std::int32_t>(first + 2)),
        loss_rows(call.input<std::int32_t>(first + 3)) {}

  std::int64_t logit_stride() const { return round_up(vocabulary, 64); }
  // Of dz, in its own elements.
  std::int64_t dz_stride() const { return logit_stride() * 4 / element_bytes(dtype); }
  // Calls f(begin, count) for every chunk.
  template <class F>
  void for_each_chunk(F&& f) const {
    for (std::int64_t begin = 0; begin < entries; begin += chunk) {
      f(begin, entries - begin < chunk ? entries - begin : chunk);
    }
  }

  DType dtype;
  TensorType weight;
  std::int64_t rows, channels, vocabulary, entries, chunk;
  const void *x, *w;
  const std::int32_t *labels, *loss_rows;
};

// What a block needs to know of its entry.
struct Entries {
  const std::int32_t *labels, *loss_rows;
  std::int64_t begin;  // of the chunk
  std::int64_t rows, vocabulary;

  enum class State { scored, padding, out_of_range };
  __device__ State find(std::int64_t i, std::int64_t& row, std::int64_t& label) const {
    row = loss_rows[begin + i];
    if (row < 0) return State::padding;
    if (row >= rows) return State::out_of_range;
    label = labels[row];
    if (label < 0) return State::padding;
    return label < vocabulary ? State::scored : State::out_of_range;
  }
};
Entries entries_of(const Problem& n, std::int64_t begin) {
  return {n.labels, n.loss_rows, begin, n.rows, n.vocabulary};
}

// -- Rows of x in and rows of dx out -----------------------------------------------------------

constexpr int kCopyThreads = 128;

// Copies, or clears when `from` is null, one row by packs where the width allows.
template <class T>
__device__ void copy_row(T* to, const T* from, std::int64_t cols) {
  constexpr int kSize = Pack<T>::kSize;
  if (cols % kSize == 0) {
    for (std::int64_t c = threadIdx.x * kSize; c < cols; c += kCopyThreads * kSize) {
      Pack<T> pack{};
      if (from != nullptr) pack = load_pack(from + c);
      store_pack(to + c, pack);
    }
    return;
  }
  for (std::int64_t c = threadIdx.x; c < cols; c += kCopyThreads) {
    to[c] = from != nullptr ? from[c] : from_float<T>(0.0f);
  }
}

// Row i of `to` = the row of x of the chunk's entry i; zero for padding.
template <class T>
__global__ __launch_bounds__(kCopyThreads) void gather_entries(Entries entries, const T* x, T* to,
                                                               std::int64_t cols) {
  begin_kernel();
  std::int64_t row, label;
  const bool scored = entries.find(blockIdx.x, row, label) == Entries::State::scored;
  copy_row(to + blockIdx.x * cols, scored ? x + row * cols : nullptr, cols);
}

// The inverse; rows that no entry scores stay as they are.
template <class T>
__global__ __launch_bounds__(kCopyThreads) void scatter_entries(Entries entries, const T* from,
                                                                T* dx, std::int64_t cols) {
  begin_kernel();
  std::int64_t row, label;
  if (entries.find(blockIdx.x, row, label) != Entries::State::scored) return;
  copy_row(dx + row * cols, from + blockIdx.x * cols, cols);
}

// -- One row of logits -------------------------------------------------------------------------

struct Score {
  float* logits;  // dz in their place
  std::int64_t stride, vocabulary;
  float* losses;       // by entry of the chunk; null: not wanted
  const float* dloss;  // factor of dz; null: 1
  bool keep_dz;
  bool clear_padding;  // dz of padding is zero; else it is left alone
};

struct Logits {
  float values[kRun];
};
// Logits [i, i + kRun) of a row, which is readable to its stride.
__device__ inline Logits load_logits(const float* z, std::int64_t i) {
  Logits run;
  *reinterpret_cast<float4*>(run.values) = *reinterpret_cast<const float4*>(z + i);
  *reinterpret_cast<float4*>(run.values + 4) = *reinterpret_cast<const float4*>(z + i + 4);
  return run;
}
__device__ inline void store_gradients(float* to, const Logits& run) {
  *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(run.values);
  *reinterpret_cast<float4*>(to + 4) = *reinterpret_cast<const float4*>(run.values + 4);
}
__device__ inline void store_gradients(bf16* to, const Logits& run) {
  Pack<bf16> pack;
#pragma unroll
  for (int j = 0; j < kRun; ++j) pack.values[j] = from_float<bf16>(run.values[j]);
  store_pack(to, pack);
}

// The largest logit and the sum of exp(z - largest), in every thread.
__device__ inline float2 softmax_sums(const float* z, std::int64_t vocabulary) {
  float most = -FLT_MAX, sum = 0;
  for (std::int64_t i = threadIdx.x * kRun; i < vocabulary; i += kThreads * kRun) {
    const Logits run = load_logits(z, i);
    float run_most = most;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (i + j < vocabulary) run_most = fmaxf(run_most, run.values[j]);
    }
    if (run_most > most) {
      sum *= expf(most - run_most);
      most = run_most;
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (i + j < vocabulary) sum += expf(run.values[j] - most);
    }
  }
  const float largest = block_max<kThreads>(most);
  return {largest, block_sum<kThreads>(sum * expf(most - largest))};
}

// Writes factor * (softmax - onehot), zero beyond the vocabulary.
template <class T>
__device__ void write_dz(float* z, std::int64_t vocabulary, std::int64_t label, float2 sums,
                         float factor) {
  const float inverse = 1 / sums.y;
  T* const dz = reinterpret_cast<T*>(z);
  for (std::int64_t first = 0; first < vocabulary; first += kThreads * kRun) {
    const std::int64_t i = first + threadIdx.x * kRun;
    Logits run;
    if (i < vocabulary) run = load_logits(z, i);
    if (sizeof(T) < sizeof(float)) __syncthreads();  // all of this run is read
    if (i >= vocabulary) continue;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      float p = expf(run.values[j] - sums.x) * inverse;
      if (i + j == label) p -= 1;
      run.values[j] = i + j < vocabulary ? p * factor : 0;
    }
    store_gradients(dz + i, run);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads, 2) void score_entries(Entries entries, Score s) {
  begin_kernel();
  float* const z = s.logits + blockIdx.x * s.stride;
  std::int64_t row, label;
  const Entries::State state = entries.find(blockIdx.x, row, label);
  if (state != Entries::State::scored) {
    if (threadIdx.x == 0 && s.losses != nullptr) {
      s.losses[blockIdx.x] = state == Entries::State::padding ? 0.0f : __int_as_float(0x7fc00000);
    }
    if (!s.clear_padding) return;
    T* const dz = reinterpret_cast<T*>(z);
    for (std::int64_t i = threadIdx.x * kRun; i < s.vocabulary; i += kThreads * kRun) {
      store_gradients(dz + i, Logits{});
    }
    return;
  }
  const float of_label = z[label];
  const float2 sums = softmax_sums(z, s.vocabulary);
  if (threadIdx.x == 0 && s.losses != nullptr) {
    s.losses[blockIdx.x] = (sums.x - of_label) + logf(sums.y);
  }
  if (!s.keep_dz) return;
  write_dz<T>(z, s.vocabulary, label, sums, s.dloss != nullptr ? *s.dloss : 1.0f);
}

// total = the sum of the losses in F64; one block.
__global__ __launch_bounds__(kThreads) void add_losses(const float* losses, std::int64_t count,
                                                       float* total) {
  begin_kernel();
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += losses[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *total = static_cast<float>(sum);
}

// -- Chunks ------------------------------------------------------------------------------------

// Pieces of scratch, each 256-byte aligned; offsets from its start.
struct Layout {
  std::int64_t x, logits, dx, rest;  // of a chunk; `rest`: what the products need
};
Layout layout(const Problem& n, bool keep_dx) {
  const std::int64_t row_bytes = n.channels * element_bytes(n.dtype);
  Layout at{};
  at.x = weight_copy_bytes(n.weight, n.dtype);
  at.logits = at.x + round_up(n.chunk * row_bytes, 256);
  at.dx = at.logits + n.chunk * n.logit_stride() * 4;
  at.rest = at.dx + (keep_dx ? round_up(n.chunk * row_bytes, 256) : 0);
  return at;
}

// logits = x W^T for `count` gathered rows.
Gemm logits_product(const Problem& n, std::int64_t count) {
  Gemm g;
  g.layout = WeightLayout::n_by_k;
  g.dtype = n.dtype;
  g.m = count;
  g.n = n.vocabulary;
  g.k = g.x_stride = g.w_stride = n.channels;
  g.y_dtype = DType::F32;
  g.y_stride = n.logit_stride();
  return g;
}
// dx = dz W.
Gemm dx_product(const Problem& n, std::int64_t count) {
  Gemm g;
  g.layout = WeightLayout::k_by_n;
  g.dtype = g.y_dtype = n.dtype;
  g.m = count;
  g.n = g.w_stride = g.y_stride = n.channels;
  g.k = n.vocabulary;
  g.x_stride = n.dz_stride();
  return g;
}

// The most that `bytes`(count) asks for among the chunk sizes of a call.
template <class F>
std::int64_t most_over_chunks(const Problem& n, const F& bytes) {
  std::int64_t most = 0;
  n.for_each_chunk([&](std::int64_t begin, std::int64_t count) {
    if (begin != 0 && count == n.chunk) return;
    const std::int64_t wanted = bytes(count);
    most = wanted > most ? wanted : most;
  });
  return most;
}

// A call at work: the chunk's buffers and the two steps that loss and dW share.
struct Work {
  Work(const Problem& problem, const OpCall& call, bool keep_dx, const Launch& where)
      : n(problem), launch(where) {
    auto* base = static_cast<std::byte*>(call.scratch);
    const Layout at = layout(n, keep_dx);
    x = base + at.x;
    logits = reinterpret_cast<float*>(base + at.logits);
    dx = base + at.dx;
    rest = base + at.rest;
    w = dense_weight(n.weight, n.w, n.dtype, base, launch);
  }

  void compute_logits(std::int64_t begin, std::int64_t count) const {
    with_type(n.dtype, [&](auto type) {
      using T = decltype(type);
      start_kernel("gather_entries", gather_entries<T>, static_cast<unsigned>(count), kCopyThreads,
                   0, launch, entries_of(n, begin), static_cast<const T*>(n.x), static_cast<T*>(x),
                   n.channels);
    });
    Gemm g = logits_product(n, count);
    g.x = x;
    g.w = w;
    g.y = logits;
    product(g, rest, launch);
  }
  void score(std::int64_t begin, std::int64_t count, const Score& s) const {
    with_type(n.dtype, [&](auto type) {
      start_kernel("score_entries", score_entries<decltype(type)>, static_cast<unsigned>(count),
                   kThreads, 0, launch, entries_of(n, begin), s);
    });
  }
  void compute_dx(std::int64_t begin, std::int64_t count, void* to) const {
    Gemm g = dx_product(n, count);
    g.x = logits;
    g.w = w;
    g.y = dx;
    product(g, rest, launch);
    with_type(n.dtype, [&](auto type) {
      using T = decltype(type);
      start_kernel("scatter_entries", scatter_entries<T>, static_cast<unsigned>(count),
                   kCopyThreads, 0, launch, entries_of(n, begin), static_cast<const T*>(dx),
                   static_cast<T*>(to), n.channels);
    });
  }

  const Problem& n;
  const Launch& launch;
  const void* w;
  void *x, *dx, *rest;
  float* logits;
};

// -- Loss and dx -------------------------------------------------------------------------------

bool keeps_dx(const OpCall& call) { return call.node->get<CrossEntropyParams>().keep_dx != 0; }

bool supports(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype);
}

std::int64_t scratch(const OpCall& call, const Card& card) {
  const Problem n(call, 0);
  const bool keep_dx = keeps_dx(call);
  return layout(n, keep_dx).rest + most_over_chunks(n, [&](std::int64_t count) {
           const std::int64_t forward = product_scratch_bytes(logits_product(n, count), card);
           if (!keep_dx) return forward;
           const std::int64_t backward = product_scratch_bytes(dx_product(n, count), card);
           return forward > backward ? forward : backward;
         });
}

void run(const OpCall& call, const Launch& launch) {
  const Problem n(call, 0);
  const bool keep_dx = keeps_dx(call);
  const Work work(n, call, keep_dx, launch);
  float* const losses = call.output<float>(1);
  if (keep_dx) {
    const auto bytes = static_cast<std::size_t>(n.rows * n.channels * element_bytes(n.dtype));
    check(cudaMemsetAsync(call.out[2], 0, bytes, launch.stream), "linear_cross_entropy");
  }
  n.for_each_chunk([&](std::int64_t begin, std::int64_t count) {
    work.compute_logits(begin, count);
    work.score(begin, count,
               {.logits = work.logits,
                .stride = n.logit_stride(),
                .vocabulary = n.vocabulary,
                .losses = losses + begin,
                .dloss = nullptr,
                .keep_dz = keep_dx,
                .clear_padding = false});
    if (keep_dx) work.compute_dx(begin, count, call.out[2]);
  });
  start_kernel("add_losses", add_losses, 1, kThreads, 0, launch, losses, n.entries,
               call.output<float>(0));
}

// -- dW ----------------------------------------------------------------------------------------

TokenSum dw_sum(const Problem& n, std::int64_t count) {
  TokenSum p{};
  p.left_dtype = p.right_dtype = n.dtype;
  p.rows = count;
  p.left_cols = n.vocabulary;
  p.right_cols = n.channels;
  p.left_stride = n.dz_stride();
  p.scale = 1;
  return p;
}

bool supports_dw(const OpCall& call) {
  return is_computable(call.in_types[1].dtype) && can_decode(call.in_types[2].dtype) &&
         call.in_types[0].dtype == DType::F32;
}

std::int64_t scratch_dw(const OpCall& call, const Card& card) {
  const Problem n(call, 1);
  return layout(n, false).rest + most_over_chunks(n, [&](std::int64_t count) {
           const std::int64_t logits = product_scratch_bytes(logits_product(n, count), card);
           const std::int64_t sum = token_sum_scratch_bytes(dw_sum(n, count), card);
           return logits > sum ? logits : sum;
         });
}

void run_dw(const OpCall& call, const Launch& launch) {
  const Problem n(call, 1);
  const Work work(n, call, /*keep_dx=*/false, launch);
  n.for_each_chunk([&](std::int64_t begin, std::int64_t count) {
    work.compute_logits(begin, count);
    work.score(begin, count,
               {.logits = work.logits,
                .stride = n.logit_stride(),
                .vocabulary = n.vocabulary,
                .losses = nullptr,
                .dloss = call.input<float>(5),
                .keep_dz = true,
                .clear_padding = true});
    TokenSum p = dw_sum(n, count);
    p.left = work.logits;
    p.right = work.x;
    p.acc = call.output<float>(0);
    token_sum(p, work.rest, launch);
  });
}

}  // namespace

extern const Kernel linear_cross_entropy_kernel{supports, scratch, run};
extern const Kernel linear_cross_entropy_dw_kernel{supports_dw, scratch_dw, run_dw};

}  // namespace nibble::cuda
