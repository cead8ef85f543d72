// sum_squares, adamw and adamw8bit; the formulas are in engine/ops/optimizer.cpp.
//
// All work in blocks of 4096 elements, one task each. sum_squares keeps one F64 sum per block in
// scratch (eight running sums, added in order) and adds them to the total one after the other, so
// that splitting the array at a multiple of 4096 changes no bit. adamw is elementwise and memory
// bound: 4 loads and 4 stores per element, one division and one square root.
//
// adamw8bit decodes 256 elements' moments, takes the step, and encodes the new moments by a binary
// search over the map's 255 thresholds. Its F32 arithmetic is that of the CUDA kernel to the bit.
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"
#include "engine/quantize.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kBlock = 4096;

template <class T>
double block_sum(const T* x, std::int64_t count) {
  double sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const auto v = static_cast<double>(x[i + j]);
      sums[j] += v * v;
    }
  }
  for (; i < count; ++i) sums[i % 8] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

bool supports_sum_squares(const OpCall& call) {
  const DType x = call.in_types[1].dtype;
  return call.in_types[0].dtype == DType::F64 && (x == DType::F32 || x == DType::F64);
}

std::int64_t partial_bytes(const OpCall& call, int) {
  return task_count(call.in_types[1].elements(), kBlock) *
         static_cast<std::int64_t>(sizeof(double));
}

template <class T>
void sum_squares(const OpCall& call, ThreadPool& pool) {
  const std::int64_t count = call.in_types[1].elements();
  const std::int64_t blocks = task_count(count, kBlock);
  auto* partial = static_cast<double*>(call.scratch);
  pool.parallel_for(blocks, [&](std::int64_t block, int) {
    partial[block] = block_sum(call.input<T>(1) + block * kBlock, task_size(block, count, kBlock));
  });
  double total = *call.output<double>(0);
  for (std::int64_t block = 0; block < blocks; ++block) total += partial[block];
  *call.output<double>(0) = total;
}

void run_sum_squares(const OpCall& call, ThreadPool& pool) {
  call.in_types[1].dtype == DType::F64 ? sum_squares<double>(call, pool)
                                       : sum_squares<float>(call, pool);
}

// What gradients are multiplied by: 1 / tokens, and the clip coefficient.
double gradient_factor(double inverse_tokens, double clip, double sum_of_squares) {
  if (clip == 0) return inverse_tokens;
  const double norm = square_root(sum_of_squares) * inverse_tokens;
  const double coef = clip / (norm + 1e-6);
  return coef < 1 ? inverse_tokens * coef : inverse_tokens;
}

// A step's numbers for one block of 4096 elements, in every lane.
template <class T>
struct AdamwStep {
  using V = typename Simd<T>::Vec;
  V beta1, beta2, left1, left2, correction1, correction2, eps, factor, rate, keep;

  AdamwStep(const OpCall& call, std::int64_t block) {
    const T* s = call.input<T>(5);
    const T* entry = call.input<T>(4) + 2 * block;
    const T lr = s[0] * entry[0];
    beta1 = splat(s[1]), left1 = splat(1 - s[1]);
    beta2 = splat(s[2]), left2 = splat(1 - s[2]);
    eps = splat(s[3]);
    correction1 = splat(s[4]), correction2 = splat(s[5]);
    factor = splat(static_cast<T>(gradient_factor(s[6], s[7], *call.input<double>(6))));
    rate = splat(lr), keep = splat(1 - lr * entry[1]);
  }

  // g is scaled already; m and v become the new moments. Returns the new master.
  V operator()(V master, V g, V& m, V& v) const {
    m = beta1 * m + left1 * g;
    v = beta2 * v + left2 * (g * g);
    const V update = (m / correction1) / (square_root(v / correction2) + eps);
    return master * keep - rate * update;
  }
};

bool supports_adamw(const OpCall& call) {
  const DType d = call.in_types[0].dtype;
  return d == DType::F32 || d == DType::F64;
}

template <class T>
void adamw(const OpCall& call, ThreadPool& pool) {
  static_assert(kBlock % Simd<T>::lanes == 0);
  pool.parallel_for(call.in_types[0].elements() / kBlock, [&](std::int64_t block, int) {
    const AdamwStep<T> step(call, block);
    T* master = call.output<T>(0);
    T *m = call.mutable_input<T>(1), *v = call.mutable_input<T>(2),
      *grad = call.mutable_input<T>(3);
    for (std::int64_t i = block * kBlock; i < (block + 1) * kBlock; i += Simd<T>::lanes) {
      auto m1 = load(m + i), v1 = load(v + i);
      store(master + i, step(load(master + i), load(grad + i) * step.factor, m1, v1));
      store(m + i, m1);
      store(v + i, v1);
      store(grad + i, typename Simd<T>::Vec{});
    }
  });
}

void run_adamw(const OpCall& call, ThreadPool& pool) {
  call.in_types[0].dtype == DType::F64 ? adamw<double>(call, pool) : adamw<float>(call, pool);
}

constexpr int kQuantBlock = 256;  // elements that share an absmax
static_assert(kMomentBlockBytes == kBlock + kBlock / kQuantBlock * 4);

// 256 elements of a moment where it is stored.
struct StoredMoment {
  std::uint8_t* codes;
  unsigned char* absmax;  // an F32

  StoredMoment(const OpCall& call, int input, std::int64_t begin) {
    auto* block = call.mutable_input<std::uint8_t>(input) + begin / kBlock * kMomentBlockBytes;
    codes = block + begin % kBlock;
    absmax = block + kBlock + begin % kBlock / kQuantBlock * 4;
  }

  template <class T>
  void decode(const float* map, T* values) const {
    float scale;
    __builtin_memcpy(&scale, absmax, sizeof scale);
    for (int i = 0; i < kQuantBlock; ++i) values[i] = static_cast<T>(map[codes[i]]) * scale;
  }

  template <class T, class Code>
  void encode(const T* values, Code code) const {
    float rounded[kQuantBlock], most = 0;
    for (int i = 0; i < kQuantBlock; ++i) {
      rounded[i] = static_cast<float>(values[i]);
      const float magnitude = __builtin_fabsf(rounded[i]);
      most = magnitude > most ? magnitude : most;
    }
    __builtin_memcpy(absmax, &most, sizeof most);
    for (int i = 0; i < kQuantBlock; ++i) codes[i] = code(rounded[i], rounded[i] / most);
  }
};

// How many thresholds lie below x, 0 for NaN.
int thresholds_below(const float* thresholds, float x) {
  int count = 0;
  for (int step = 128; step > 0; step /= 2) {
    count += x > thresholds[count + step - 1] ? step : 0;
  }
  return count;
}

// The code of m over its absmax, on m's side of 0.
std::uint8_t signed_code(float m, float quotient) {
  constexpr int kZero = 127;
  const int code = thresholds_below(dynamic_thresholds_signed.data(), quotient);
  const bool same_sign = (code < kZero) == static_cast<bool>(__builtin_signbit(m));
  return static_cast<std::uint8_t>(same_sign ? code : m > 0 ? code + 1 : code - 1);
}
std::uint8_t unsigned_code(float, float quotient) {
  return static_cast<std::uint8_t>(thresholds_below(dynamic_thresholds_unsigned.data(), quotient));
}

// 256 elements from `begin` on.
template <class T>
void adamw8bit_step(const OpCall& call, const AdamwStep<T>& step, std::int64_t begin) {
  constexpr T kLargest = 0x1.fffffep+127f;  // of F32
  const StoredMoment first(call, 1, begin), second(call, 2, begin);
  T m[kQuantBlock], v[kQuantBlock];
  first.decode(dynamic_map_signed, m);
  second.decode(dynamic_map_unsigned, v);
  T* master = call.output<T>(0) + begin;
  T* grad = call.mutable_input<T>(3) + begin;
  for (std::int64_t i = 0; i < kQuantBlock; i += Simd<T>::lanes) {
    using V = typename Simd<T>::Vec;
    const V g = load(grad + i) * step.factor, old = load(master + i);
    const auto finite = g * g <= splat(kLargest);
    V m1 = load(m + i), v1 = load(v + i);
    const V updated = step(old, g, m1, v1);
    store(master + i, finite ? updated : old);
    store(m + i, finite ? m1 : V{});
    store(v + i, finite ? v1 : V{});
    store(grad + i, V{});
  }
  first.encode(m, signed_code);
  second.encode(v, unsigned_code);
}

template <class T>
void adamw8bit(const OpCall& call, ThreadPool& pool) {
  pool.parallel_for(call.in_types[0].elements() / kBlock, [&](std::int64_t block, int) {
    const AdamwStep<T> step(call, block);
    for (std::int64_t i = 0; i < kBlock; i += kQuantBlock) {
      adamw8bit_step(call, step, block * kBlock + i);
    }
  });
}

void run_adamw8bit(const OpCall& call, ThreadPool& pool) {
  call.in_types[0].dtype == DType::F64 ? adamw8bit<double>(call, pool)
                                       : adamw8bit<float>(call, pool);
}

}  // namespace

extern const Kernel sum_squares_kernel{supports_sum_squares, partial_bytes, run_sum_squares};
extern const Kernel adamw_kernel{supports_adamw, nullptr, run_adamw};
extern const Kernel adamw8bit_kernel{supports_adamw, nullptr, run_adamw8bit};

}  // namespace nibble::cpu::NIBBLE_ISA
