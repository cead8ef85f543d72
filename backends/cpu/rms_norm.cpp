// rms_norm and its gradients; the formulas are in engine/ops/rms_norm.cpp.
//
// y and dx: tasks are groups of whole rows, two sweeps over a row that stays in cache. dw: one
// task list finds r of every row, a second sums columns; a task owns 256 columns and walks down the
// rows, 512 to a tile, so that the order of summation is the row order whatever the
// number of threads. Factors in another type than the arithmetic's are decoded once per call.
#include "backends/cpu/decode.h"
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kTile = 512;  // rows summed before dw is touched (DESIGN, section 9)

std::int64_t rows_per_task(std::int64_t cols) {
  return cols >= kTaskElements ? 1 : kTaskElements / (cols < 1 ? 1 : cols);
}

// sum over i of term(i), a vector at a time: four running sums, added in a fixed order.
template <class T, class Term>
[[gnu::always_inline]] inline Arith<T> sum_over(std::int64_t count, const Term& term) {
  constexpr std::int64_t L = kLanes<T>;
  Vec<T> s0{}, s1{}, s2{}, s3{};
  std::int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    s0 += term(i, AllLanes{});
    s1 += term(i + L, AllLanes{});
    s2 += term(i + 2 * L, AllLanes{});
    s3 += term(i + 3 * L, AllLanes{});
  }
  for (; i + L <= count; i += L) s0 += term(i, AllLanes{});
  if (i < count) s1 += term(i, static_cast<int>(count - i));
  return sum_lanes<Arith<T>>((s0 + s1) + (s2 + s3));
}

template <class T>
Arith<T> inverse_rms(const T* x, std::int64_t cols, float eps) {
  const Arith<T> sum = sum_over<T>(cols, [=](std::int64_t i, auto lanes) {
    const Vec<T> v = load(x + i, lanes);
    return v * v;
  });
  return 1 / square_root(sum / static_cast<Arith<T>>(cols) + static_cast<Arith<T>>(eps));
}

DType arithmetic(DType d) { return d == DType::F64 ? DType::F64 : DType::F32; }

// Scratch for the factors when they have to be decoded.
std::int64_t factor_bytes(const OpCall& call, int) {
  const DType d = arithmetic(call.in_types[0].dtype);
  return call.in_types[1].dtype == d ? 0 : call.in_types[1].elements() * info(d).block_bytes;
}

template <class T>
const Arith<T>* factors(const OpCall& call) {
  const TensorType& type = call.in_types[1];
  if (type.dtype == arithmetic(call.in_types[0].dtype)) return call.input<Arith<T>>(1);
  auto* w = static_cast<Arith<T>*>(call.scratch);
  decode_row(kIsa, stored_matrix(type, call.input<std::byte>(1)), 0, 0, type.shape[0], w);
  return w;
}

// body(t) for every row.
template <class Body>
void parallel_rows(ThreadPool& pool, std::int64_t rows, std::int64_t cols, const Body& body) {
  const std::int64_t per_task = rows_per_task(cols);
  pool.parallel_for(task_count(rows, per_task), [&](std::int64_t task, int) {
    const std::int64_t begin = task * per_task, size = task_size(task, rows, per_task);
    for (std::int64_t t = begin; t < begin + size; ++t) body(t);
  });
}

template <class T>
void forward(const OpCall& call, ThreadPool& pool) {
  const std::int64_t rows = call.in_types[0].shape[0], cols = call.in_types[0].shape[1];
  const float eps = call.node->get<RmsNormParams>().eps;
  const Arith<T>* w = factors<T>(call);
  parallel_rows(pool, rows, cols, [&](std::int64_t t) {
    const T* x = call.input<T>(0) + t * cols;
    T* y = call.output<T>(0) + t * cols;
    const Vec<T> r = splat(inverse_rms(x, cols, eps));
    for_vectors<T>(cols, [=](std::int64_t i, auto lanes) {
      store(y + i, load(x + i, lanes) * r * load(w + i, lanes), lanes);
    });
  });
}

template <class T>
void backward_x(const OpCall& call, ThreadPool& pool) {
  const std::int64_t rows = call.in_types[0].shape[0], cols = call.in_types[0].shape[1];
  const float eps = call.node->get<RmsNormParams>().eps;
  const Arith<T>* w = factors<T>(call);
  parallel_rows(pool, rows, cols, [&](std::int64_t t) {
    const T* x = call.input<T>(0) + t * cols;
    const T* dy = call.input<T>(2) + t * cols;
    T* dx = call.output<T>(0) + t * cols;
    const Arith<T> r = inverse_rms(x, cols, eps);
    const Arith<T> dot = sum_over<T>(cols, [=](std::int64_t i, auto lanes) {
      return load(dy + i, lanes) * load(w + i, lanes) * load(x + i, lanes);
    });
    // r * (g - x * k) with k = r^2 / C * dot.
    const Vec<T> k = splat(r * r / static_cast<Arith<T>>(cols) * dot), scale = splat(r);
    for_vectors<T>(cols, [=](std::int64_t i, auto lanes) {
      const Vec<T> g = load(dy + i, lanes) * load(w + i, lanes);
      store(dx + i, scale * (g - load(x + i, lanes) * k), lanes);
    });
  });
}

// r of every row.
std::int64_t inverse_rms_bytes(const OpCall& call, int) {
  return call.in_types[1].shape[0] * info(arithmetic(call.in_types[1].dtype)).block_bytes;
}

// Columns of one task of dw: stretches of a row that are long enough to stream, sums that stay in
// the first cache.
constexpr std::int64_t kColumns = 256;

// Adds `count` columns of all rows into acc, tile by tile; the pointers are to the first column.
template <class T>
void sum_columns(Arith<T>* acc, const T* x, const T* dy, const Arith<T>* r, std::int64_t rows,
                 std::int64_t cols, std::int64_t count) {
  Arith<T> sums[kColumns];
  for (std::int64_t tile = 0; tile < rows; tile += kTile) {
    const std::int64_t end = tile + kTile < rows ? tile + kTile : rows;
    for (Arith<T>& sum : sums) sum = 0;
    for (std::int64_t t = tile; t < end; ++t) {
      const Vec<T> scale = splat(r[t]);
      for_vectors<T>(count, [&](std::int64_t i, auto lanes) {
        const Vec<T> product =
            load(dy + t * cols + i, lanes) * (load(x + t * cols + i, lanes) * scale);
        store(sums + i, load(sums + i, lanes) + product, lanes);
      });
    }
    for_vectors<T>(count, [&](std::int64_t i, auto lanes) {
      store(acc + i, load(acc + i, lanes) + load(sums + i, lanes), lanes);
    });
  }
}

template <class T>
void backward_w(const OpCall& call, ThreadPool& pool) {
  const std::int64_t rows = call.in_types[1].shape[0], cols = call.in_types[1].shape[1];
  const float eps = call.node->get<RmsNormParams>().eps;
  const T *x = call.input<T>(1), *dy = call.input<T>(2);
  auto* r = static_cast<Arith<T>*>(call.scratch);
  parallel_rows(pool, rows, cols,
                [&](std::int64_t t) { r[t] = inverse_rms(x + t * cols, cols, eps); });
  pool.parallel_for(task_count(cols, kColumns), [&](std::int64_t task, int) {
    const std::int64_t begin = task * kColumns;
    sum_columns(call.output<Arith<T>>(0) + begin, x + begin, dy + begin, r, rows, cols,
                task_size(task, cols, kColumns));
  });
}

bool supports(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype);
}
bool supports_dw(const OpCall& call) {
  return is_computable(call.in_types[1].dtype) &&
         call.in_types[0].dtype == arithmetic(call.in_types[1].dtype);
}

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[0].dtype, [&](auto type) { forward<decltype(type)>(call, pool); });
}
void run_dx(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[0].dtype, [&](auto type) { backward_x<decltype(type)>(call, pool); });
}
void run_dw(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[1].dtype, [&](auto type) { backward_w<decltype(type)>(call, pool); });
}

}  // namespace

extern const Kernel rms_norm_kernel{supports, factor_bytes, run};
extern const Kernel rms_norm_dx_kernel{supports, factor_bytes, run_dx};
extern const Kernel rms_norm_dw_kernel{supports_dw, inverse_rms_bytes, run_dw};

}  // namespace nibble::cpu::NIBBLE_ISA
