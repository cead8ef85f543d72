// y[t] = table[ids[t]], and acc[ids[t]] += dy[t] (engine/ops/embedding.cpp).
//
// Forward: gather_rows() decodes the rows out of whatever the table is stored as.
//
// Backward: each entry's sum must run over t in ascending order, and an entry that occurs often
// must not wait for a search of its next occurrence. So the first kernel sorts t by (ids[t], t): a
// warp per row counts the rows that come before it, which is its place (T^2 comparisons: a few
// microseconds at T = 4096, under a millisecond at 65536). It also notes at the first place of
// each entry how many rows follow. In the second kernel a block owns one entry that occurs and
// kColumns channels, and adds its rows to registers one after the other; their addresses are known
// ahead, so that the loads of several rows are in flight. Rows with an id outside of the table are
// left out.
#include "backends/cuda/decode.h"

namespace nibble::cuda {
namespace {

bool supports(const OpCall& call) {
  return is_computable(call.out_types[0].dtype) && can_decode(call.in_types[1].dtype);
}

void run(const OpCall& call, const Launch& launch) {
  gather_rows(call.in_types[1], call.in[1], call.input<std::int32_t>(0), call.out_types[0].shape[0],
              call.out_types[0].dtype, call.out[0], launch);
}

constexpr int kSortThreads = 128;

// order[p] is the row at place p; counts[p] the rows of its entry if it is their first, else 0.
__global__ __launch_bounds__(kSortThreads) void sort_rows_kernel(const std::int32_t* ids, int rows,
                                                                 std::int64_t entries,
                                                                 std::int32_t* order,
                                                                 std::int32_t* counts) {
  begin_kernel();
  const int lane = threadIdx.x % kWarp;
  const std::int64_t t =
      static_cast<std::int64_t>(blockIdx.x) * (kSortThreads / kWarp) + threadIdx.x / kWarp;
  if (t >= rows) return;
  const std::int32_t id = ids[t];
  int smaller = 0, before = 0, after = 0;
#pragma unroll 4
  for (int other = lane; other < rows; other += kWarp) {
    const std::int32_t other_id = ids[other];
    smaller += other_id < id;
    before += other_id == id && other < t;
    after += other_id == id && other > t;
  }
  smaller = __reduce_add_sync(~0u, smaller);
  before = __reduce_add_sync(~0u, before);
  after = __reduce_add_sync(~0u, after);
  if (lane != 0) return;
  const bool starts = before == 0 && id >= 0 && id < entries;
  order[smaller + before] = static_cast<std::int32_t>(t);
  counts[smaller + before] = starts ? after + 1 : 0;
}

constexpr int kThreads = 128;
constexpr int kPerThread = 4;
constexpr int kColumns = kThreads * kPerThread;

template <class T>
__global__ __launch_bounds__(kThreads) void add_rows_kernel(const std::int32_t* ids,
                                                            const std::int32_t* order,
                                                            const std::int32_t* counts, const T* dy,
                                                            std::int64_t cols, float* acc) {
  begin_kernel();
  const std::int64_t place = blockIdx.x;
  const int count = counts[place];
  if (count == 0) return;
  const std::int64_t entry = ids[order[place]];
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kColumns + threadIdx.x;
  float sums[kPerThread];
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const std::int64_t c = first + j * kThreads;
    sums[j] = c < cols ? acc[entry * cols + c] : 0.0f;
  }
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const T* row = dy + order[place + i] * cols;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const std::int64_t c = first + j * kThreads;
      if (c < cols) sums[j] += to_float(row[c]);
    }
  }
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const std::int64_t c = first + j * kThreads;
    if (c < cols) acc[entry * cols + c] = sums[j];
  }
}

bool supports_dw(const OpCall& call) {
  return call.in_types[0].dtype == DType::F32 && is_computable(call.in_types[2].dtype);
}

// order and counts.
std::int64_t sort_bytes(const OpCall& call, const Card&) {
  return 2 * call.in_types[1].elements() * static_cast<std::int64_t>(sizeof(std::int32_t));
}

void run_dw(const OpCall& call, const Launch& launch) {
  const std::int64_t rows = call.in_types[2].shape[0], cols = call.in_types[2].shape[1];
  const std::int64_t entries = call.out_types[0].shape[0];
  if (rows == 0 || cols == 0) return;
  const auto* ids = call.input<std::int32_t>(1);
  auto* order = static_cast<std::int32_t*>(call.scratch);
  std::int32_t* counts = order + rows;
  start_kernel("embedding_dw", sort_rows_kernel,
               static_cast<unsigned>(ceil_div(rows, kSortThreads / kWarp)), kSortThreads, 0, launch,
               ids, static_cast<int>(rows), entries, order, counts);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(cols, kColumns)));
  with_type(call.in_types[2].dtype, [&](auto type) {
    using T = decltype(type);
    start_kernel("embedding_dw", add_rows_kernel<T>, grid, kThreads, 0, launch, ids, order, counts,
                 call.input<T>(2), cols, call.output<float>(0));
  });
}

}  // namespace

extern const Kernel embedding_kernel{supports, nullptr, run};
extern const Kernel embedding_dw_kernel{supports_dw, sort_bytes, run_dw};

}  // namespace nibble::cuda
