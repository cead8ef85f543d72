// dq, dk and dv of attention (formulas: engine/ops/attention.cpp).
//
// Two sweeps, each with the values that it sums into in vector lanes and in one task, so that no
// two threads add to one number and every sum has one order:
//   queries: a task is kTile queries of one head. D, then per tile of keys s and dy.v, ds, and
//            dq += ds k.
//   keys:    a task is kTile keys of one key-value head. For its query heads in order and queries
//            in order: s and dy.v again, then dv += p dy and dk += ds q.
// Computing s and dy.v twice costs 7 products where 5 would do, and buys parallelism over tiles
// where a single sweep could only use one thread per key-value head.
#include "backends/cpu/attention_tile.h"
#include "backends/cpu/kernel.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

bool supports(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

// Sizes and addresses of a call.
template <class S>
struct Problem {
  using T = Arith<S>;
  explicit Problem(const OpCall& call)
      : d(call.node->get<AttentionParams>().head_dim),
        score{call.node->get<AttentionParams>().scale, call.node->get<AttentionParams>().soft_cap},
        rows(call.in_types[0].shape[0]),
        stride(call.in_types[0].shape[1]),
        kv_stride(call.in_types[1].shape[1]),
        heads(stride / d),
        kv_heads(kv_stride / d),
        group(heads / kv_heads),
        q(call.input<S>(0)),
        k(call.input<S>(1)),
        v(call.input<S>(2)),
        o(call.input<S>(3)),
        lse(call.input<T>(4)),
        dy(call.input<S>(5)),
        span_begin(call.input<std::int32_t>(6)),
        dq(call.output<S>(0)),
        dk(call.output<S>(1)),
        dv(call.output<S>(2)) {}
  std::int64_t query(std::int64_t t, std::int64_t head) const { return t * stride + head * d; }
  std::int64_t key(std::int64_t j, std::int64_t kv_head) const {
    return j * kv_stride + kv_head * d;
  }

  std::int64_t d;
  Score<T> score;
  std::int64_t rows, stride, kv_stride, heads, kv_heads, group;
  const S *q, *k, *v, *o;
  const T* lse;
  const S* dy;
  const std::int32_t* span_begin;
  S *dq, *dk, *dv;
};

// What one thread needs. Lanes are queries in the first sweep and keys in the second.
template <class T>
struct TileScratch {
  TileScratch(Scratch& scratch, std::int64_t d) {
    for (T** p : {&lane_a, &lane_b, &sum_a, &sum_b, &row_a, &row_b})
      *p = scratch.take<T>(kTile * d);
    for (T** p : {&p_tile, &ds_tile}) *p = scratch.take<T>(kTile * kTile);
  }
  T *lane_a, *lane_b;  // [d, kTile]: q and dy, then k and v
  T *sum_a, *sum_b;    // [d, kTile]: dq, then dk and dv
  T *row_a, *row_b;    // [kTile, d]: k and v, then q and dy
  T *p_tile, *ds_tile;
};

// D of every head and row, shared by the sweeps, then the threads' own scratch.
template <class T>
T* row_sums(Scratch& scratch, std::int64_t rows, std::int64_t heads) {
  return scratch.take<T>(rows * heads);
}

template <class S>
std::int64_t thread_bytes(std::int64_t d) {
  Scratch scratch;
  TileScratch<Arith<S>>(scratch, d);
  return scratch.used();
}

std::int64_t scratch_bytes(const OpCall& call, int threads) {
  Scratch scratch;
  with_type(call.out_types[0].dtype, [&](auto s) {
    using S = decltype(s);
    const Shape lse = call.in_types[4].shape;
    row_sums<Arith<S>>(scratch, lse[0], lse[1]);
    scratch.take<std::byte>(thread_bytes<S>(call.node->get<AttentionParams>().head_dim) * threads);
  });
  return scratch.used();
}

// p = exp(s - lse) where visible, else 0, and dx = p (dp - D) ds/dx, for one row of a tile.
// `visible` is null when every lane is; lse and sums hold a value per lane.
template <class T, class Visible>
[[gnu::always_inline]] inline void softmax_gradient(T* p_row, T* ds_row, const Score<T>& score,
                                                    Visible visible) {
  using Vector = typename Simd<T>::Vec;
  for (int i = 0; i < kTile; i += Simd<T>::lanes) {
    const auto [lse, sum, mask] = visible(i);
    const Vector s = score.of(load(p_row + i)), e = exp(s - lse), p = mask ? e : Vector{};
    const Vector ds = p * (load(ds_row + i) - sum);
    store(p_row + i, p);
    store(ds_row + i, score.soft_cap > 0 ? ds * score.slope(s) : ds);
  }
}

// What a row of a tile needs per vector of lanes.
template <class T>
struct RowTerms {
  using Vector = typename Simd<T>::Vec;
  Vector lse, sum;
  decltype(Vector{} < Vector{}) mask;
};

// First sweep: tile of queries of one head.
template <class S>
void query_task(const Problem<S>& n, std::int64_t tile, std::int64_t head, Arith<S>* sums,
                const TileScratch<Arith<S>>& s) {
  using T = Arith<S>;
  const std::int64_t d = n.d, begin = tile * kTile, kv_head = head / n.group;
  const auto count = static_cast<int>(std::min<std::int64_t>(kTile, n.rows - begin));
  std::fill_n(s.lane_a, d * kTile, T{0});
  std::fill_n(s.lane_b, d * kTile, T{0});
  T lse[kTile] = {}, sum[kTile] = {}, first[kTile], last[kTile];
  std::int64_t lowest = begin;
  for (int i = 0; i < count; ++i) lowest = std::min<std::int64_t>(lowest, n.span_begin[begin + i]);
  for (int i = 0; i < kTile; ++i) {
    const std::int64_t t = begin + i;
    first[i] = static_cast<T>(i < count ? n.span_begin[t] - lowest : 1);
    last[i] = static_cast<T>(i < count ? t - lowest : 0);
    if (i >= count) continue;
    to_lane(n.q + n.query(t, head), d, s.lane_a, kTile, i);
    to_lane(n.dy + n.query(t, head), d, s.lane_b, kTile, i);
    to_lane(n.o + n.query(t, head), d, s.sum_a, kTile, i);
    lse[i] = n.lse[t * n.heads + head];
  }
  for (int i = 0; i < kTile; i += Simd<T>::lanes) {
    auto total = load(sum + i);
    for (std::int64_t c = 0; c < d; ++c) {
      total = fma(load(s.lane_b + c * kTile + i), load(s.sum_a + c * kTile + i), total);
    }
    store(sum + i, total);
  }
  std::copy_n(sum, count, sums + head * n.rows + begin);
  for (std::int64_t j = lowest; j < begin + count; j += kTile) {
    const std::int64_t rows = std::min<std::int64_t>(kTile, begin + count - j);
    load_rows(n.k + n.key(j, kv_head), n.kv_stride, rows, d, s.row_a);
    load_rows(n.v + n.key(j, kv_head), n.kv_stride, rows, d, s.row_b);
    product<T>(rows, d, {s.row_a, d, 1}, s.lane_a, s.p_tile, kTile);
    product<T>(rows, d, {s.row_b, d, 1}, s.lane_b, s.ds_tile, kTile);
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto key = splat(static_cast<T>(j + r - lowest));
      softmax_gradient<T>(s.p_tile + r * kTile, s.ds_tile + r * kTile, n.score, [&](int i) {
        return RowTerms<T>{load(lse + i), load(sum + i),
                           (key >= load(first + i)) & (key <= load(last + i))};
      });
    }
    product<T>(d, rows, {s.row_a, 1, d}, s.ds_tile, s.sum_a, kTile, j > lowest);
  }
  for (int i = 0; i < count; ++i) {
    from_lane(s.sum_a, kTile, i, n.score.scale, d, n.dq + n.query(begin + i, head));
  }
}

// Adds what queries [begin, begin + rows) of one head contribute to a tile of keys.
template <class S>
void add_queries(const Problem<S>& n, std::int64_t begin, std::int64_t rows, std::int64_t head,
                 std::int64_t first_key, const Arith<S>* sums, const TileScratch<Arith<S>>& s) {
  using T = Arith<S>;
  const std::int64_t d = n.d;
  load_rows(n.q + n.query(begin, head), n.stride, rows, d, s.row_a);
  load_rows(n.dy + n.query(begin, head), n.stride, rows, d, s.row_b);
  product<T>(rows, d, {s.row_a, d, 1}, s.lane_a, s.p_tile, kTile);
  product<T>(rows, d, {s.row_b, d, 1}, s.lane_b, s.ds_tile, kTile);
  T number[kTile];
  for (int i = 0; i < kTile; ++i) number[i] = static_cast<T>(i);
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t t = begin + r;
    const auto lse = splat(n.lse[t * n.heads + head]);
    const auto sum = splat(sums[head * n.rows + t]);
    // Beyond the tile all comparisons come out alike, so the distance need not be larger.
    const auto bounded = [&](std::int64_t key) {
      return splat(static_cast<T>(std::clamp<std::int64_t>(key - first_key, -1, kTile)));
    };
    const auto first = bounded(n.span_begin[t]), last = bounded(t);
    softmax_gradient<T>(s.p_tile + r * kTile, s.ds_tile + r * kTile, n.score, [&](int i) {
      return RowTerms<T>{lse, sum, (load(number + i) >= first) & (load(number + i) <= last)};
    });
  }
  product<T>(d, rows, {s.row_b, 1, d}, s.p_tile, s.sum_b, kTile, true);
  product<T>(d, rows, {s.row_a, 1, d}, s.ds_tile, s.sum_a, kTile, true);
}

// Second sweep: tile of keys of one key-value head.
template <class S>
void key_task(const Problem<S>& n, std::int64_t tile, std::int64_t kv_head, const Arith<S>* sums,
              const TileScratch<Arith<S>>& s) {
  using T = Arith<S>;
  const std::int64_t d = n.d, begin = tile * kTile;
  const auto count = static_cast<int>(std::min<std::int64_t>(kTile, n.rows - begin));
  for (T* p : {s.lane_a, s.lane_b, s.sum_a, s.sum_b}) std::fill_n(p, d * kTile, T{0});
  for (int i = 0; i < count; ++i) {
    to_lane(n.k + n.key(begin + i, kv_head), d, s.lane_a, kTile, i);
    to_lane(n.v + n.key(begin + i, kv_head), d, s.lane_b, kTile, i);
  }
  for (std::int64_t head = kv_head * n.group; head < (kv_head + 1) * n.group; ++head) {
    for (std::int64_t t = begin; t < n.rows; t += kTile) {
      const std::int64_t rows = std::min<std::int64_t>(kTile, n.rows - t);
      const bool any = std::any_of(n.span_begin + t, n.span_begin + t + rows,
                                   [&](std::int32_t first) { return first < begin + count; });
      if (any) add_queries(n, t, rows, head, begin, sums, s);
    }
  }
  for (int i = 0; i < count; ++i) {
    from_lane(s.sum_a, kTile, i, n.score.scale, d, n.dk + n.key(begin + i, kv_head));
    from_lane(s.sum_b, kTile, i, T{1}, d, n.dv + n.key(begin + i, kv_head));
  }
}

template <class S>
void run_typed(const OpCall& call, ThreadPool& pool) {
  using T = Arith<S>;
  const Problem<S> n(call);
  check_spans("attention_backward", n.span_begin, n.rows);
  Scratch scratch(call.scratch);
  T* const sums = row_sums<T>(scratch, n.rows, n.heads);
  const std::int64_t own_bytes = thread_bytes<S>(n.d);
  auto* const own = scratch.take<std::byte>(own_bytes * pool.threads());
  const auto tile_scratch = [&](int thread) {
    Scratch mine(own + thread * own_bytes);
    return TileScratch<T>(mine, n.d);
  };
  const std::int64_t tiles = task_count(n.rows, kTile);
  pool.parallel_for(tiles * n.heads, [&](std::int64_t task, int thread) {
    query_task(n, tiles - 1 - task / n.heads, task % n.heads, sums, tile_scratch(thread));
  });
  pool.parallel_for(tiles * n.kv_heads, [&](std::int64_t task, int thread) {
    key_task(n, task / n.kv_heads, task % n.kv_heads, sums, tile_scratch(thread));
  });
}

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype, [&](auto s) { run_typed<decltype(s)>(call, pool); });
}

}  // namespace

extern const Kernel attention_backward_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cpu::NIBBLE_ISA
