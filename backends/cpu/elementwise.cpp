// add, scale, fill, accumulate, convert; the formulas are in engine/ops/elementwise.cpp;
// add_rows: engine/ops/rows.cpp.
//
// Tasks are runs of 16384 elements. Memory bound: each element is read and written once, and a
// vector is loaded from every input before it is stored, so an output may share memory with an
// input of its own type.
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

// body(i, lanes) over all vectors of T in `count` elements, shared out over the pool.
template <class T, class Body>
void parallel_vectors(ThreadPool& pool, std::int64_t count, const Body& body) {
  pool.parallel_for(task_count(count, kTaskElements), [&](std::int64_t task, int) {
    const std::int64_t begin = task * kTaskElements;
    for_vectors<T>(task_size(task, count, kTaskElements),
                   [&](std::int64_t i, auto lanes) { body(begin + i, lanes); });
  });
}

bool supports_binary(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && call.in_types[1].dtype == call.in_types[0].dtype;
}

void run_add(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const T *a = call.input<T>(0), *b = call.input<T>(1);
    T* y = call.output<T>(0);
    parallel_vectors<T>(pool, call.out_types[0].elements(), [=](std::int64_t i, auto lanes) {
      store(y + i, load(a + i, lanes) + load(b + i, lanes), lanes);
    });
  });
}

void run_add_rows(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const T *a = call.input<T>(0), *b = call.input<T>(1);
    T* y = call.output<T>(0);
    const std::int64_t begin = call.node->get<RowsParams>().first * call.in_types[0].shape[1];
    const std::int64_t count = call.in_types[1].elements();
    if (y != a) {
      const std::int64_t all = call.out_types[0].elements();
      parallel_vectors<T>(pool, begin, [=](std::int64_t i, auto lanes) {
        store(y + i, load(a + i, lanes), lanes);
      });
      parallel_vectors<T>(pool, all - begin - count, [=](std::int64_t i, auto lanes) {
        store(y + begin + count + i, load(a + begin + count + i, lanes), lanes);
      });
    }
    parallel_vectors<T>(pool, count, [=](std::int64_t i, auto lanes) {
      store(y + begin + i, load(a + begin + i, lanes) + load(b + i, lanes), lanes);
    });
  });
}

// An F32 or BF16 value goes with F32 statistics, F64 with F64.
bool fits_statistic(DType statistic, DType value) {
  return is_computable(value) && statistic == (value == DType::F64 ? DType::F64 : DType::F32);
}

bool supports_scale(const OpCall& call) {
  return fits_statistic(call.in_types[1].dtype, call.in_types[0].dtype);
}

void run_scale(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = call.input<T>(0);
    T* y = call.output<T>(0);
    const Vec<T> factor = splat(*call.input<Arith<T>>(1));
    parallel_vectors<T>(pool, call.out_types[0].elements(), [=](std::int64_t i, auto lanes) {
      store(y + i, load(x + i, lanes) * factor, lanes);
    });
  });
}

bool supports_fill(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

void run_fill(const OpCall& call, ThreadPool& pool) {
  const double value = call.node->get<FillParams>().value;
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    T* y = call.output<T>(0);
    const Vec<T> v = splat(static_cast<Arith<T>>(value));
    parallel_vectors<T>(pool, call.out_types[0].elements(),
                        [=](std::int64_t i, auto lanes) { store(y + i, v, lanes); });
  });
}

bool supports_accumulate(const OpCall& call) {
  return fits_statistic(call.in_types[0].dtype, call.in_types[1].dtype);
}

void run_accumulate(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[1].dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = call.input<T>(1);
    Arith<T>* acc = call.output<Arith<T>>(0);
    parallel_vectors<T>(pool, call.out_types[0].elements(), [=](std::int64_t i, auto lanes) {
      store(acc + i, load(acc + i, lanes) + load(x + i, lanes), lanes);
    });
  });
}

bool supports_convert(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && is_computable(call.in_types[1].dtype);
}

// F64 to BF16 rounds through F32; every other pair rounds once at most.
template <class From, class To>
void convert(ThreadPool& pool, std::int64_t count, const From* x, To* y) {
  if constexpr (std::is_same_v<Arith<From>, Arith<To>>) {
    parallel_vectors<To>(
        pool, count, [=](std::int64_t i, auto lanes) { store(y + i, load(x + i, lanes), lanes); });
  } else {
    pool.parallel_for(task_count(count, kTaskElements), [&](std::int64_t task, int) {
      const std::int64_t begin = task * kTaskElements;
      constexpr std::int64_t kChunk = 64;  // whole vectors of every type
      const std::int64_t size = task_size(task, count, kTaskElements);
      for (std::int64_t at = begin; at < begin + size; at += kChunk) {
        const std::int64_t n = begin + size - at < kChunk ? begin + size - at : kChunk;
        Arith<From> wide[kChunk] = {};
        Arith<To> other[kChunk];
        for_vectors<From>(n, [&](std::int64_t i, auto lanes) {
          store(wide + i, load(x + at + i, lanes), lanes);
        });
        for (std::int64_t i = 0; i < kChunk; ++i) other[i] = static_cast<Arith<To>>(wide[i]);
        for_vectors<To>(n, [&](std::int64_t i, auto lanes) {
          store(y + at + i, load(other + i, lanes), lanes);
        });
      }
    });
  }
}

void run_convert(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[1].dtype, [&](auto from) {
    with_type(call.out_types[0].dtype, [&](auto to) {
      convert(pool, call.out_types[0].elements(), call.input<decltype(from)>(1),
              call.output<decltype(to)>(0));
    });
  });
}

}  // namespace

extern const Kernel add_kernel{supports_binary, nullptr, run_add};
extern const Kernel add_rows_kernel{supports_binary, nullptr, run_add_rows};
extern const Kernel scale_kernel{supports_scale, nullptr, run_scale};
extern const Kernel fill_kernel{supports_fill, nullptr, run_fill};
extern const Kernel accumulate_kernel{supports_accumulate, nullptr, run_accumulate};
extern const Kernel convert_kernel{supports_convert, nullptr, run_convert};

}  // namespace nibble::cpu::NIBBLE_ISA
