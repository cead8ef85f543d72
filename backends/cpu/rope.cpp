// a' = a cos w - b sin w, b' = a sin w + b cos w for each pair of a head, w = positions[t] *
// frequencies[i] (engine/ops/rope.cpp).
//
// Sines and cosines are worked out once per row and serve all its heads; a task is kRows rows.
// A pair is read before it is written, so x and y may be the same memory.
#include <algorithm>

#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/vmath.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kRows = 16;

template <class S>
void rotate_half(const S* x, S* y, std::int64_t pairs, const Arith<S>* cosine,
                 const Arith<S>* sine) {
  for_vectors<S>(pairs, [=](std::int64_t i, auto lanes) {
    const Vec<S> a = load(x + i, lanes), b = load(x + pairs + i, lanes);
    const Vec<S> c = load(cosine + i, lanes), s = load(sine + i, lanes);
    store(y + i, a * c - b * s, lanes);
    store(y + pairs + i, a * s + b * c, lanes);
  });
}

float widen(float x) { return x; }
float widen(bf16 x) { return to_float(x); }
double widen(double x) { return x; }
void narrow(float x, float& to) { to = x; }
void narrow(float x, bf16& to) { to = to_bf16(x); }
void narrow(double x, double& to) { to = x; }

template <class S>
void rotate_adjacent(const S* x, S* y, std::int64_t pairs, const Arith<S>* cosine,
                     const Arith<S>* sine) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const Arith<S> a = widen(x[2 * i]), b = widen(x[2 * i + 1]);
    narrow(a * cosine[i] - b * sine[i], y[2 * i]);
    narrow(a * sine[i] + b * cosine[i], y[2 * i + 1]);
  }
}

bool supports(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

// Cosines and sines of one row per thread.
template <class T>
T* angles(Scratch& scratch, const RopeParams& params, int threads) {
  return scratch.take<T>(static_cast<std::int64_t>(params.head_dim) * threads);
}

std::int64_t scratch_bytes(const OpCall& call, int threads) {
  Scratch scratch;
  with_type(call.out_types[0].dtype, [&](auto s) {
    angles<Arith<decltype(s)>>(scratch, call.node->get<RopeParams>(), threads);
  });
  return scratch.used();
}

template <class S>
void run_typed(const OpCall& call, ThreadPool& pool) {
  using T = Arith<S>;
  const auto params = call.node->get<RopeParams>();
  const std::int64_t rows = call.in_types[0].shape[0], channels = call.in_types[0].shape[1];
  const std::int64_t d = params.head_dim, pairs = d / 2;
  const auto* positions = call.input<std::int32_t>(1);
  const T* frequencies = call.input<T>(2);
  Scratch scratch(call.scratch);
  T* const all_angles = angles<T>(scratch, params, pool.threads());
  pool.parallel_for(task_count(rows, kRows), [&](std::int64_t task, int thread) {
    T* cosine = all_angles + thread * d;
    T* sine = cosine + pairs;
    for (std::int64_t t = task * kRows; t < std::min(rows, (task + 1) * kRows); ++t) {
      const double position = static_cast<double>(params.direction) * positions[t];
      for (std::int64_t i = 0; i < pairs; ++i) {
        sin_cos(position * static_cast<double>(frequencies[i]), sine[i], cosine[i]);
      }
      const S* x = call.input<S>(0) + t * channels;
      S* y = call.output<S>(0) + t * channels;
      for (std::int64_t head = 0; head < channels; head += d) {
        if (params.pairs == RopePairs::half) {
          rotate_half(x + head, y + head, pairs, cosine, sine);
        } else {
          rotate_adjacent(x + head, y + head, pairs, cosine, sine);
        }
      }
    }
  });
}

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto s) { run_typed<decltype(s)>(call, pool); });
}

}  // namespace

extern const Kernel rope_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cpu::NIBBLE_ISA
