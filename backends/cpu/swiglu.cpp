// SwiGLU and its gradient; the formulas are in engine/ops/swiglu.cpp.
//
// s = 1 / (1 + exp(-g)). exp overflows to infinity for gates below -88, where s is 0 and so are
// y, dg and du. 1 - s is taken as the sigmoid of -g: for large gates the difference would keep few
// digits, and g multiplies what is left. Tasks are runs of 16384 elements; every input vector is
// loaded before a vector is stored, so the first output may share memory with an input.
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"
#include "backends/cpu/vmath.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

template <class V>
[[gnu::always_inline]] inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

template <class T>
void forward(ThreadPool& pool, std::int64_t count, const T* gate, const T* up, T* y) {
  pool.parallel_for(task_count(count, kTaskElements), [=](std::int64_t task, int) {
    const std::int64_t begin = task * kTaskElements;
    for_vectors<T>(task_size(task, count, kTaskElements), [=](std::int64_t offset, auto lanes) {
      const std::int64_t i = begin + offset;
      const Vec<T> g = load(gate + i, lanes), u = load(up + i, lanes);
      store(y + i, g * sigmoid(g) * u, lanes);
    });
  });
}

template <class T>
void backward(ThreadPool& pool, std::int64_t count, const T* gate, const T* up, const T* dy,
              T* dgate, T* dup) {
  pool.parallel_for(task_count(count, kTaskElements), [=](std::int64_t task, int) {
    const std::int64_t begin = task * kTaskElements;
    for_vectors<T>(task_size(task, count, kTaskElements), [=](std::int64_t offset, auto lanes) {
      const std::int64_t i = begin + offset;
      const Vec<T> g = load(gate + i, lanes), u = load(up + i, lanes), d = load(dy + i, lanes);
      const Vec<T> s = sigmoid(g);
      store(dgate + i, d * u * s * (1 + g * sigmoid(-g)), lanes);
      store(dup + i, d * g * s, lanes);
    });
  });
}

bool supports(const OpCall& call) { return is_computable(call.in_types[0].dtype); }

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    forward(pool, call.out_types[0].elements(), call.input<T>(0), call.input<T>(1),
            call.output<T>(0));
  });
}

void run_backward(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    backward(pool, call.out_types[0].elements(), call.input<T>(0), call.input<T>(1),
             call.input<T>(2), call.output<T>(0), call.output<T>(1));
  });
}

}  // namespace

extern const Kernel swiglu_kernel{supports, nullptr, run};
extern const Kernel swiglu_backward_kernel{supports, nullptr, run_backward};

}  // namespace nibble::cpu::NIBBLE_ISA
