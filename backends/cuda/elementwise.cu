// add, scale, fill, accumulate, convert; the formulas are in engine/ops/elementwise.cpp. add_rows
// and slice_rows: engine/ops/rows.cpp.
//
// Memory bound: each element is read and written once. The arrays are flat, whatever their shape,
// and every kernel is a body of for_each_run(). A run is 16 bytes where all arrays have one element
// type, four elements where they differ: then a warp's loads and stores are whole cache lines in
// every array.
#include "backends/cuda/runs.cuh"

namespace nibble::cuda {
namespace {

template <class T, int kRun = kPackWidth<T>>
struct Add {
  static constexpr int kWidth = kRun;
  template <int kWidth>
  struct Loaded {
    Run<T, kWidth> a, b;
  };
  const T *a, *b;
  T* y;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    return {load_run<kWidth>(a + i), load_run<kWidth>(b + i)};
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>& from) const {
    Run<T, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      to.values[k] = from_float<T>(to_float(from.a.values[k]) + to_float(from.b.values[k]));
    }
    store_run(y + i, to);
  }
};

bool supports_add(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && call.in_types[1].dtype == call.in_types[0].dtype;
}

void run_add(const OpCall& call, const Launch& launch) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const Add<T> body{call.input<T>(0), call.input<T>(1), call.output<T>(0)};
    for_each_run("add", body, call.out_types[0].elements(), launch);
  });
}

// Elements before the first of the rows that the op is about.
std::int64_t rows_begin(const OpCall& call) {
  const Shape& shape = call.in_types[0].shape;
  return call.node->get<RowsParams>().first * (shape.rank() == 1 ? 1 : shape[1]);
}

void copy(const char* what, void* to, const void* from, std::int64_t bytes, const Launch& launch) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice,
                        launch.stream),
        what);
}

void run_add_rows(const OpCall& call, const Launch& launch) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const T *a = call.input<T>(0), *b = call.input<T>(1);
    T* y = call.output<T>(0);
    constexpr std::int64_t kSize = sizeof(T);
    const std::int64_t begin = rows_begin(call), count = call.in_types[1].elements();
    const std::int64_t end = begin + count, all = call.out_types[0].elements();
    if (y != a) {
      copy("add_rows", y, a, begin * kSize, launch);
      copy("add_rows", y + end, a + end, (all - end) * kSize, launch);
    }
    if (begin % kPackWidth<T> == 0) {
      for_each_run("add_rows", Add<T>{a + begin, b, y + begin}, count, launch);
    } else {
      for_each_run("add_rows", Add<T, 1>{a + begin, b, y + begin}, count, launch);
    }
  });
}

bool supports_slice_rows(const OpCall&) { return true; }

void run_slice_rows(const OpCall& call, const Launch& launch) {
  const std::int64_t size = info(call.in_types[0].dtype).block_bytes;
  copy("slice_rows", call.out[0], call.input<std::byte>(0) + rows_begin(call) * size,
       call.out_types[0].elements() * size, launch);
}

template <class T>
struct Scale {
  static constexpr int kWidth = kPackWidth<T>;
  template <int kWidth>
  using Loaded = Run<T, kWidth>;
  const T* x;
  const float* factor;
  T* y;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    return load_run<kWidth>(x + i);
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>& from) const {
    const float f = __ldg(factor);
    Run<T, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to.values[k] = from_float<T>(to_float(from.values[k]) * f);
    store_run(y + i, to);
  }
};

bool supports_scale(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && call.in_types[1].dtype == DType::F32;
}

void run_scale(const OpCall& call, const Launch& launch) {
  with_type(call.out_types[0].dtype, [&](auto type) {
    using T = decltype(type);
    const Scale<T> body{call.input<T>(0), call.input<float>(1), call.output<T>(0)};
    for_each_run("scale", body, call.out_types[0].elements(), launch);
  });
}

template <class T>
struct Fill {
  static constexpr int kWidth = kPackWidth<T>;
  template <int kWidth>
  struct Loaded {};
  T value;
  T* y;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t) const {
    return {};
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>&) const {
    Run<T, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to.values[k] = value;
    store_run(y + i, to);
  }
};

bool is_convertible(DType dtype) { return dtype == DType::F64 || is_computable(dtype); }

bool supports_fill(const OpCall& call) { return is_convertible(call.out_types[0].dtype); }

void run_fill(const OpCall& call, const Launch& launch) {
  const double value = call.node->get<FillParams>().value;
  const std::int64_t count = call.out_types[0].elements();
  switch (call.out_types[0].dtype) {
    case DType::F64:
      return for_each_run("fill", Fill<double>{value, call.output<double>(0)}, count, launch);
    case DType::BF16:
      return for_each_run(
          "fill", Fill<bf16>{__float2bfloat16_rn(static_cast<float>(value)), call.output<bf16>(0)},
          count, launch);
    default:
      return for_each_run("fill", Fill<float>{static_cast<float>(value), call.output<float>(0)},
                          count, launch);
  }
}

template <class T>
struct Accumulate {
  static constexpr int kWidth = 4;
  template <int kWidth>
  struct Loaded {
    Run<float, kWidth> acc;
    Run<T, kWidth> x;
  };
  const T* x;
  float* acc;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    return {load_run<kWidth>(static_cast<const float*>(acc) + i), load_run<kWidth>(x + i)};
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>& from) const {
    Run<float, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      to.values[k] = from.acc.values[k] + to_float(from.x.values[k]);
    }
    store_run(acc + i, to);
  }
};

bool supports_accumulate(const OpCall& call) {
  return call.in_types[0].dtype == DType::F32 && is_computable(call.in_types[1].dtype);
}

void run_accumulate(const OpCall& call, const Launch& launch) {
  with_type(call.in_types[1].dtype, [&](auto type) {
    using T = decltype(type);
    const Accumulate<T> body{call.input<T>(1), call.output<float>(0)};
    for_each_run("accumulate", body, call.out_types[0].elements(), launch);
  });
}

// F64 to BF16 rounds through F32; every other pair rounds once at most.
template <class To, class From>
__device__ To converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(to_float(x));
  } else {
    return from_float<To>(to_float(x));
  }
}

template <class From, class To>
struct Convert {
  static constexpr int kWidth = std::is_same_v<From, To> ? kPackWidth<To> : 4;
  template <int kWidth>
  using Loaded = Run<From, kWidth>;
  const From* x;
  To* y;

  template <int kWidth>
  __device__ Loaded<kWidth> load(std::int64_t i) const {
    return load_run<kWidth>(x + i);
  }
  template <int kWidth>
  __device__ void store(std::int64_t i, const Loaded<kWidth>& from) const {
    Run<To, kWidth> to;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to.values[k] = converted<To>(from.values[k]);
    store_run(y + i, to);
  }
};

bool supports_convert(const OpCall& call) {
  return is_convertible(call.in_types[0].dtype) && is_convertible(call.in_types[1].dtype);
}

template <class F>
void with_any_type(DType dtype, F&& f) {
  if (dtype == DType::F64) {
    f(double{});
  } else {
    with_type(dtype, f);
  }
}

void run_convert(const OpCall& call, const Launch& launch) {
  with_any_type(call.in_types[1].dtype, [&](auto from) {
    with_any_type(call.out_types[0].dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const Convert<From, To> body{call.input<From>(1), call.output<To>(0)};
      for_each_run("convert", body, call.out_types[0].elements(), launch);
    });
  });
}

}  // namespace

extern const Kernel add_kernel{supports_add, nullptr, run_add};
extern const Kernel add_rows_kernel{supports_add, nullptr, run_add_rows};
extern const Kernel slice_rows_kernel{supports_slice_rows, nullptr, run_slice_rows};
extern const Kernel scale_kernel{supports_scale, nullptr, run_scale};
extern const Kernel fill_kernel{supports_fill, nullptr, run_fill};
extern const Kernel accumulate_kernel{supports_accumulate, nullptr, run_accumulate};
extern const Kernel convert_kernel{supports_convert, nullptr, run_convert};

}  // namespace nibble::cuda
