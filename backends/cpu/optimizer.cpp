// sum_squares and adamw; the formulas are in engine/ops/optimizer.cpp.
//
// Both work in blocks of 4096 elements, one task each. sum_squares keeps one F64 sum per block in
// scratch (eight running sums, added in order) and adds them to the total one after the other, so
// that splitting the array at a multiple of 4096 changes no bit. adamw is elementwise and memory
// bound: 4 loads and 4 stores per element, one division and one square root.
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"

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

// One block; the pointers are to its first element.
template <class T>
struct AdamwBlock {
  T *master, *m, *v, *grad;
  T beta1, beta2, eps, correction1, correction2, factor;
  T lr, decay;  // of this block

  void step() const {
    using V = typename Simd<T>::Vec;
    const V b1 = splat(beta1), b2 = splat(beta2), c1 = splat(correction1), c2 = splat(correction2);
    const V left1 = splat(1 - beta1), left2 = splat(1 - beta2);
    const V scale = splat(factor), rate = splat(lr), keep = splat(1 - lr * decay), e = splat(eps);
    for (std::int64_t i = 0; i < kBlock; i += Simd<T>::lanes) {
      const V g = load(grad + i) * scale;
      const V m1 = b1 * load(m + i) + left1 * g;
      const V v1 = b2 * load(v + i) + left2 * (g * g);
      const V update = (m1 / c1) / (square_root(v1 / c2) + e);
      store(master + i, load(master + i) * keep - rate * update);
      store(m + i, m1);
      store(v + i, v1);
      store(grad + i, V{});
    }
  }
};

bool supports_adamw(const OpCall& call) {
  const DType d = call.in_types[0].dtype;
  return d == DType::F32 || d == DType::F64;
}

template <class T>
void adamw(const OpCall& call, ThreadPool& pool) {
  static_assert(kBlock % Simd<T>::lanes == 0);
  const T* s = call.input<T>(5);
  const T* table = call.input<T>(4);
  const auto factor = static_cast<T>(gradient_factor(s[6], s[7], *call.input<double>(6)));
  pool.parallel_for(call.in_types[0].elements() / kBlock, [&](std::int64_t block, int) {
    const std::int64_t at = block * kBlock;
    const AdamwBlock<T> b{.master = call.output<T>(0) + at,
                          .m = call.mutable_input<T>(1) + at,
                          .v = call.mutable_input<T>(2) + at,
                          .grad = call.mutable_input<T>(3) + at,
                          .beta1 = s[1],
                          .beta2 = s[2],
                          .eps = s[3],
                          .correction1 = s[4],
                          .correction2 = s[5],
                          .factor = factor,
                          .lr = s[0] * table[2 * block],
                          .decay = table[2 * block + 1]};
    b.step();
  });
}

void run_adamw(const OpCall& call, ThreadPool& pool) {
  call.in_types[0].dtype == DType::F64 ? adamw<double>(call, pool) : adamw<float>(call, pool);
}

}  // namespace

extern const Kernel sum_squares_kernel{supports_sum_squares, partial_bytes, run_sum_squares};
extern const Kernel adamw_kernel{supports_adamw, nullptr, run_adamw};

}  // namespace nibble::cpu::NIBBLE_ISA
