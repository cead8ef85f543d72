// SwiGLU and its gradient; the formulas are in engine/ops/swiglu.cpp.
//
// With e = exp(-|g|), which never overflows, and t = 1 / (1 + e): the sigmoid s of g is t for
// g >= 0 and e t below, and 1 - s is the other one. So one exponential and one division give both
// without a difference of nearly equal numbers. BF16 graphs use the hardware's approximations of
// exp and 1/x: together they are off by a few 1e-6 of the value for every gate that matters,
// against the 2e-3 of the rounding at the end.
//
// Bodies of for_each_run(): 16 bytes from each array per run; the first output may be the memory of
// an input.
#include "backends/cuda/runs.cuh"

namespace nibble::cuda {
namespace {

struct Sigmoid {
  float s, rest;  // of g, and 1 - s
};

template <class T>
__device__ inline Sigmoid sigmoid(float g) {
  float e, t;
  if constexpr (std::is_same_v<T, float>) {
    e = expf(-fabsf(g));
    t = 1.0f / (1.0f + e);
  } else {
    e = __expf(-fabsf(g));
    t = __fdividef(1.0f, 1.0f + e);
  }
  return g >= 0 ? Sigmoid{t, e * t} : Sigmoid{e * t, t};
}

template <class T>
struct Forward {
  static constexpr int kWidth = kPackWidth<T>;
  template <int kWidth>
  struct Loaded {
    Run<T, kWidth> gate, up;
  };
  const T *gate, *up;
  T* y;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    return {load_run<kWidth>(gate + i), load_run<kWidth>(up + i)};
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>& from) const {
    Run<T, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float g = to_float(from.gate.values[k]);
      to.values[k] = from_float<T>(g * sigmoid<T>(g).s * to_float(from.up.values[k]));
    }
    store_run(y + i, to);
  }
};

template <class T>
struct Backward {
  static constexpr int kWidth = kPackWidth<T>;
  template <int kWidth>
  struct Loaded {
    Run<T, kWidth> gate, up, dy;
  };
  const T *gate, *up, *dy;
  T *dgate, *dup;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    return {load_run<kWidth>(gate + i), load_run<kWidth>(up + i), load_run<kWidth>(dy + i)};
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>& from) const {
    Run<T, kWidth> to_gate, to_up;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float g = to_float(from.gate.values[k]), d = to_float(from.dy.values[k]);
      const Sigmoid sigma = sigmoid<T>(g);
      to_gate.values[k] =
          from_float<T>(d * to_float(from.up.values[k]) * sigma.s * (1.0f + g * sigma.rest));
      to_up.values[k] = from_float<T>(d * g * sigma.s);
    }
    store_run(dgate + i, to_gate);
    store_run(dup + i, to_up);
  }
};

bool supports(const OpCall& call) { return is_computable(call.in_types[0].dtype); }

void run(const OpCall& call, const Launch& launch) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const Forward<T> body{call.input<T>(0), call.input<T>(1), call.output<T>(0)};
    for_each_run("swiglu", body, call.out_types[0].elements(), launch);
  });
}

void run_backward(const OpCall& call, const Launch& launch) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const Backward<T> body{call.input<T>(0), call.input<T>(1), call.input<T>(2), call.output<T>(0),
                           call.output<T>(1)};
    for_each_run("swiglu_backward", body, call.out_types[0].elements(), launch);
  });
}

}  // namespace

extern const Kernel swiglu_kernel{supports, nullptr, run};
extern const Kernel swiglu_backward_kernel{supports, nullptr, run_backward};

}  // namespace nibble::cuda
