// Loss, dx and dW of a linear layer under cross-entropy (engine/ops/linear_cross_entropy.cpp).
//
// Loss and dx: the rows that count are gathered kRows at a time (fewer when the vocabulary is
// large), their logits are one product, a task turns one row of logits into its loss and its
// gradient in place, and dx is a second product. W is decoded twice per chunk; 256 rows make that
// a few percent.
//
// dW: entries whose rows lie in the same 512 rows of x form one tile, so that the tiles are those
// of every other sum over tokens however a step is split. A tile takes the vocabulary in panels:
// one sweep for maximum and sum, one for the gradient. With a single panel the logits of the first
// sweep are still there for the second.
//
// Scratch holds at most kLogitsBytes of logits, or 32 rows of them if that is more, beside the
// gathered rows and what the products need.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backends/cpu/fail.h"
#include "backends/cpu/gemm_call.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/vmath.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kLogitsBytes = 64 << 20;
constexpr std::int64_t kRows = 256, kFewestRows = 32;

template <class T>
T largest_of(const T* z, std::int64_t count, T start) {
  constexpr std::int64_t lanes = Simd<T>::lanes;
  auto most = splat(start);
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto v = load(z + i);
    most = v > most ? v : most;
  }
  for (int lane = 0; lane < lanes; ++lane) start = std::max<T>(start, most[lane]);
  for (; i < count; ++i) start = std::max(start, z[i]);
  return start;
}

// z = exp(z - largest), and their sum.
template <class T>
T exp_and_sum(T* z, std::int64_t count, T largest) {
  constexpr std::int64_t lanes = Simd<T>::lanes;
  typename Simd<T>::Vec total{};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto e = exp(load(z + i) - largest);
    store(z + i, e);
    total += e;
  }
  T sum = sum_lanes<T>(total);
  for (; i < count; ++i) {
    z[i] = exp(z[i] - largest);
    sum += z[i];
  }
  return sum;
}

template <class T>
T sum_of_exp(const T* z, std::int64_t count, T largest) {
  constexpr std::int64_t lanes = Simd<T>::lanes;
  typename Simd<T>::Vec total{};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) total += exp(load(z + i) - largest);
  T sum = sum_lanes<T>(total);
  for (; i < count; ++i) sum += exp(z[i] - largest);
  return sum;
}

template <class T>
void multiply_row(T* z, std::int64_t count, T factor) {
  for_vectors<T>(
      count, [=](std::int64_t i, auto lanes) { store(z + i, load(z + i, lanes) * factor, lanes); });
}

// Sizes and inputs of a call; `first` is the number of its input x.
template <class S>
struct Problem {
  using T = Arith<S>;
  static constexpr DType kStat = std::is_same_v<T, double> ? DType::F64 : DType::F32;

  Problem(const OpCall& call, int first)
      : type(call.in_types[static_cast<std::size_t>(first)]),
        rows(type.shape[0]),
        channels(type.shape[1]),
        vocabulary(call.in_types[static_cast<std::size_t>(first + 1)].shape[0]),
        entries(call.in_types[static_cast<std::size_t>(first + 3)].shape[0]),
        x(call.input<S>(first)),
        labels(call.input<std::int32_t>(first + 2)),
        loss_rows(call.input<std::int32_t>(first + 3)) {}

  // Whether entry `e` has a row with a label. Throws when either is out of range.
  bool counts(std::int64_t e) const {
    const std::int32_t row = loss_rows[e];
    if (row < 0) return false;
    if (row >= rows) {
      fail("linear_cross_entropy: loss_rows[%lld] is %lld, and x has %lld rows",
           static_cast<long long>(e), static_cast<long long>(row), static_cast<long long>(rows));
    }
    if (labels[row] >= vocabulary) {
      fail("linear_cross_entropy: labels[%lld] is %lld, and the vocabulary has %lld entries",
           static_cast<long long>(row), static_cast<long long>(labels[row]),
           static_cast<long long>(vocabulary));
    }
    return labels[row] >= 0;
  }

  void gather(const std::int64_t* chosen, std::int64_t count, S* to) const {
    for (std::int64_t i = 0; i < count; ++i) {
      std::copy_n(x + loss_rows[chosen[i]] * channels, channels, to + i * channels);
    }
  }

  TensorType type;
  std::int64_t rows, channels, vocabulary, entries;
  const S* x;
  const std::int32_t *labels, *loss_rows;
};

bool supports(const OpCall& call) {
  return is_computable(call.in_types[0].dtype) && can_decode(call.in_types[1].dtype);
}

template <class S>
struct LossScratch {
  LossScratch(Scratch& scratch, const Problem<S>& n)
      : rows(std::min(std::clamp<std::int64_t>(
                          kLogitsBytes / static_cast<std::int64_t>(sizeof(Arith<S>)) / n.vocabulary,
                          kFewestRows, kRows),
                      n.entries)),
        gemm_bytes(std::max(
            multiply_scratch_bytes(n.type.dtype, n.kStat, rows, n.vocabulary, n.channels),
            multiply_scratch_bytes(n.kStat, n.type.dtype, rows, n.channels, n.vocabulary))),
        gemm(scratch.take<std::byte>(gemm_bytes)),
        chosen(scratch.take<std::int64_t>(rows)),
        x(scratch.take<S>(rows * n.channels)),
        dx(scratch.take<S>(rows * n.channels)),
        logits(scratch.take<Arith<S>>(rows * n.vocabulary)) {}
  std::int64_t rows;  // of a chunk
  std::int64_t gemm_bytes;
  std::byte* gemm;
  std::int64_t* chosen;  // entries of loss_rows
  S *x, *dx;
  Arith<S>* logits;
};

std::int64_t scratch_bytes(const OpCall& call, int) {
  Scratch scratch;
  with_type(call.in_types[0].dtype, [&](auto s) {
    using S = decltype(s);
    LossScratch<S>(scratch, Problem<S>(call, 0));
  });
  return scratch.used();
}

// Losses of `count` gathered rows and, in place of the logits, their gradients when `keep_dx`.
template <class S>
void score_rows(const Problem<S>& n, const LossScratch<S>& s, std::int64_t count, bool keep_dx,
                Arith<S>* losses, ThreadPool& pool) {
  using T = Arith<S>;
  pool.parallel_for(count, [&](std::int64_t i, int) {
    T* z = s.logits + i * n.vocabulary;
    const std::int32_t label = n.labels[n.loss_rows[s.chosen[i]]];
    const T largest = largest_of(z, n.vocabulary, -std::numeric_limits<T>::infinity());
    const T distance = largest - z[label];
    T sum;
    if (keep_dx) {
      sum = exp_and_sum(z, n.vocabulary, largest);
      multiply_row(z, n.vocabulary, 1 / sum);
      z[label] -= 1;
    } else {
      sum = sum_of_exp(z, n.vocabulary, largest);
    }
    losses[s.chosen[i]] = distance + std::log(sum);
  });
}

template <class S>
void run_typed(const OpCall& call, ThreadPool& pool) {
  using T = Arith<S>;
  const Problem<S> n(call, 0);
  Scratch scratch(call.scratch);
  const LossScratch<S> s(scratch, n);
  const GemmContext context{kIsa, pool, {s.gemm, static_cast<std::size_t>(s.gemm_bytes)}};
  const StoredMatrix w = input_weight(call, 1);
  const bool keep_dx = call.node->get<CrossEntropyParams>().keep_dx != 0;
  T* const losses = call.output<T>(1);
  std::fill_n(losses, n.entries, T{0});
  if (keep_dx) std::fill_n(call.output<S>(2), n.rows * n.channels, S{});
  for (std::int64_t e = 0; e < n.entries;) {
    std::int64_t count = 0;
    for (; e < n.entries && count < s.rows; ++e) {
      if (n.counts(e)) s.chosen[count++] = e;
    }
    if (count == 0) break;
    n.gather(s.chosen, count, s.x);
    const Term forward{{s.x, n.type.dtype, n.channels}, w};
    multiply(context, WeightUse::Transposed, count, {&forward, 1},
             {s.logits, n.kStat, n.vocabulary});
    score_rows(n, s, count, keep_dx, losses, pool);
    if (!keep_dx) continue;
    const Term backward{{s.logits, n.kStat, n.vocabulary}, w};
    multiply(context, WeightUse::Plain, count, {&backward, 1}, {s.dx, n.type.dtype, n.channels});
    for (std::int64_t i = 0; i < count; ++i) {
      std::copy_n(s.dx + i * n.channels, n.channels,
                  call.output<S>(2) + n.loss_rows[s.chosen[i]] * n.channels);
    }
  }
  double total = 0;
  for (std::int64_t e = 0; e < n.entries; ++e) total += static_cast<double>(losses[e]);
  *call.output<T>(0) = static_cast<T>(total);
}

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[0].dtype, [&](auto s) { run_typed<decltype(s)>(call, pool); });
}

bool supports_dw(const OpCall& call) {
  return is_computable(call.in_types[1].dtype) && can_decode(call.in_types[2].dtype);
}

template <class S>
struct GradientScratch {
  // The panel is a function of the vocabulary alone: with it the bits of the softmax sums change.
  GradientScratch(Scratch& scratch, const Problem<S>& n)
      : rows(std::min(kGradientTile, n.entries)),
        panel(std::min(n.vocabulary,
                       kLogitsBytes / static_cast<std::int64_t>(sizeof(Arith<S>)) / kGradientTile)),
        gemm_bytes(std::max(multiply_scratch_bytes(n.type.dtype, n.kStat, rows, panel, n.channels),
                            gradient_scratch_bytes(n.kStat, rows, panel, n.channels))),
        gemm(scratch.take<std::byte>(gemm_bytes)),
        chosen(scratch.take<std::int64_t>(rows)),
        largest(scratch.take<Arith<S>>(rows)),
        sum(scratch.take<Arith<S>>(rows)),
        x(scratch.take<S>(rows * n.channels)),
        logits(scratch.take<Arith<S>>(rows * panel)) {}
  std::int64_t rows, panel;
  std::int64_t gemm_bytes;
  std::byte* gemm;
  std::int64_t* chosen;
  Arith<S>*largest, *sum;
  S* x;
  Arith<S>* logits;
};

std::int64_t scratch_bytes_dw(const OpCall& call, int) {
  Scratch scratch;
  with_type(call.in_types[1].dtype, [&](auto s) {
    using S = decltype(s);
    GradientScratch<S>(scratch, Problem<S>(call, 1));
  });
  return scratch.used();
}

// One tile of dW: its gathered rows, panel by panel.
template <class S>
class TileGradient {
 public:
  using T = Arith<S>;
  TileGradient(const OpCall& call, ThreadPool& pool, const Problem<S>& n,
               const GradientScratch<S>& s)
      : n_(n),
        s_(s),
        pool_(pool),
        context_{kIsa, pool, {s.gemm, static_cast<std::size_t>(s.gemm_bytes)}},
        w_(input_weight(call, 2)),
        dloss_(*call.input<T>(5)),
        acc_(call.output<T>(0)) {}

  void add(std::int64_t count) {
    n_.gather(s_.chosen, count, s_.x);
    std::fill_n(s_.largest, count, -std::numeric_limits<T>::infinity());
    std::fill_n(s_.sum, count, T{0});
    for (std::int64_t begin = 0; begin < n_.vocabulary; begin += s_.panel) {
      logits(begin, count);
      fold(size(begin), count);
    }
    for (std::int64_t begin = 0; begin < n_.vocabulary; begin += s_.panel) {
      if (s_.panel < n_.vocabulary) logits(begin, count);
      gradients(begin, count);
      accumulate_gradient(context_, count, size(begin), n_.channels,
                          {s_.logits, n_.kStat, s_.panel}, {s_.x, n_.type.dtype, n_.channels}, 1,
                          {acc_ + begin * n_.channels, n_.kStat, n_.channels});
    }
  }

 private:
  std::int64_t size(std::int64_t begin) const { return std::min(s_.panel, n_.vocabulary - begin); }

  void logits(std::int64_t begin, std::int64_t count) {
    const Term term{{s_.x, n_.type.dtype, n_.channels}, row_range(w_, begin, size(begin))};
    multiply(context_, WeightUse::Transposed, count, {&term, 1}, {s_.logits, n_.kStat, s_.panel});
  }

  void fold(std::int64_t width, std::int64_t count) {
    pool_.parallel_for(count, [&](std::int64_t i, int) {
      const T* z = s_.logits + i * s_.panel;
      const T largest = largest_of(z, width, s_.largest[i]);
      s_.sum[i] = s_.sum[i] * exp(s_.largest[i] - largest) + sum_of_exp(z, width, largest);
      s_.largest[i] = largest;
    });
  }

  void gradients(std::int64_t begin, std::int64_t count) {
    pool_.parallel_for(count, [&](std::int64_t i, int) {
      T* z = s_.logits + i * s_.panel;
      const T largest = s_.largest[i], inverse = 1 / s_.sum[i], dloss = dloss_;
      for_vectors<T>(size(begin), [=](std::int64_t c, auto lanes) {
        store(z + c, exp(load(z + c, lanes) - largest) * inverse * dloss, lanes);
      });
      const std::int64_t label = n_.labels[n_.loss_rows[s_.chosen[i]]] - begin;
      if (label >= 0 && label < size(begin)) z[label] -= dloss;
    });
  }

  const Problem<S>& n_;
  const GradientScratch<S>& s_;
  ThreadPool& pool_;
  GemmContext context_;
  StoredMatrix w_;
  T dloss_;
  T* acc_;
};

template <class S>
void run_dw_typed(const OpCall& call, ThreadPool& pool) {
  const Problem<S> n(call, 1);
  Scratch scratch(call.scratch);
  const GradientScratch<S> s(scratch, n);
  TileGradient<S> tile(call, pool, n, s);
  std::int64_t count = 0;
  for (std::int64_t e = 0; e < n.entries; ++e) {
    if (!n.counts(e)) continue;
    const bool same = count > 0 && n.loss_rows[e] / kGradientTile ==
                                       n.loss_rows[s.chosen[count - 1]] / kGradientTile;
    if (count == s.rows || (count > 0 && !same)) {
      tile.add(count);
      count = 0;
    }
    s.chosen[count++] = e;
  }
  if (count > 0) tile.add(count);
}

void run_dw(const OpCall& call, ThreadPool& pool) {
  with_type(call.in_types[1].dtype, [&](auto s) { run_dw_typed<decltype(s)>(call, pool); });
}

}  // namespace

extern const Kernel linear_cross_entropy_kernel{supports, scratch_bytes, run};
extern const Kernel linear_cross_entropy_dw_kernel{supports_dw, scratch_bytes_dw, run_dw};

}  // namespace nibble::cpu::NIBBLE_ISA
