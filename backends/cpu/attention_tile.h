// Attention of a tile of queries, one query per vector lane.
//
// Keeping queries in lanes means that scores, softmax and output never need a sum across lanes, and
// keys and values are read where they lie: every product is "scalar of K, V times a vector over
// queries". Scores of the whole span are kept (keys x lanes), so the softmax is the plain one, in
// three sweeps: maximum, exp and sum, weighted values.
//
// Each number is one chain of multiply-adds over channels or over keys in ascending order, starting
// from zero, and a key that a query does not see adds exact zeros. So the bits of a row depend on
// its own keys alone: not on the tile, its width, or what runs beside it.
//
// Limits: positions within a tile's span are compared as numbers of the compute type, which is
// exact below 2^24 keys.
//
// Only for files compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "backends/cpu/fail.h"
#include "backends/cpu/lanes.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/vmath.h"

namespace nibble::cpu::NIBBLE_ISA {

inline constexpr int kTile = 64;  // queries or keys worked on together

// Vectors per register tile: 6 x 4 accumulators fill 32 registers, 6 x 2 fill 16.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = NIBBLE_ISA_LEVEL == 2 ? 4 : 2;

[[gnu::always_inline]] inline float widen(float x) { return x; }
[[gnu::always_inline]] inline float widen(bf16 x) { return to_float(x); }
[[gnu::always_inline]] inline double widen(double x) { return x; }
[[gnu::always_inline]] inline void narrow(float x, float& to) { to = x; }
[[gnu::always_inline]] inline void narrow(float x, bf16& to) { to = to_bf16(x); }
[[gnu::always_inline]] inline void narrow(double x, double& to) { to = x; }

// A matrix read one scalar at a time: element (m, k) is data[m * row + k * col].
template <class T>
struct Scalars {
  const T* data;
  std::int64_t row, col;
};

template <int M, int V, class T>
[[gnu::always_inline]] inline void product_tile(std::int64_t depth, Scalars<T> a, const T* b, T* c,
                                                std::int64_t width, bool accumulate) {
  using Vector = typename Simd<T>::Vec;
  constexpr int lanes = Simd<T>::lanes;
  Vector sum[M][V];
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      sum[m][v] = accumulate ? load(c + m * width + v * lanes) : Vector{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * width + v * lanes);
    for (int m = 0; m < M; ++m) {
      const Vector left = splat(a.data[m * a.row + k * a.col]);
      for (int v = 0; v < V; ++v) sum[m][v] = fma(left, right[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) store(c + m * width + v * lanes, sum[m][v]);
  }
}

template <int V, class T>
void product_columns(std::int64_t rows, std::int64_t depth, Scalars<T> a, const T* b, T* c,
                     std::int64_t width, bool accumulate) {
  for (std::int64_t m = 0; m < rows; m += kTileRows) {
    const Scalars<T> at{a.data + m * a.row, a.row, a.col};
    T* to = c + m * width;
    switch (std::min<std::int64_t>(rows - m, kTileRows)) {
      case 6:
        product_tile<6, V>(depth, at, b, to, width, accumulate);
        break;
      case 5:
        product_tile<5, V>(depth, at, b, to, width, accumulate);
        break;
      case 4:
        product_tile<4, V>(depth, at, b, to, width, accumulate);
        break;
      case 3:
        product_tile<3, V>(depth, at, b, to, width, accumulate);
        break;
      case 2:
        product_tile<2, V>(depth, at, b, to, width, accumulate);
        break;
      default:
        product_tile<1, V>(depth, at, b, to, width, accumulate);
    }
  }
}

// c[m, lane] = or += sum over k of a(m, k) * b[k, lane], m < rows, k < depth. b and c have rows of
// `width` lanes: one vector, or a multiple of kTileVectors.
template <class T>
void product(std::int64_t rows, std::int64_t depth, Scalars<T> a, const T* b, T* c,
             std::int64_t width, bool accumulate = false) {
  constexpr int lanes = Simd<T>::lanes;
  if (width == lanes) {
    product_columns<1>(rows, depth, a, b, c, width, accumulate);
    return;
  }
  for (std::int64_t column = 0; column < width; column += kTileVectors * lanes) {
    product_columns<kTileVectors>(rows, depth, a, b + column, c + column, width, accumulate);
  }
}

// `rows` rows of d channels, `stride` elements apart, widened into consecutive rows.
template <class S>
void load_rows(const S* from, std::int64_t stride, std::int64_t rows, std::int64_t d,
               Arith<S>* to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for_vectors<S>(d, [from = from + r * stride, to = to + r * d](std::int64_t i, auto lanes) {
      store(to + i, load(from + i, lanes), lanes);
    });
  }
}

// A row of d channels into lane `lane` of to[d, width], and a lane back to a row, times `factor`.
template <class S>
void to_lane(const S* row, std::int64_t d, Arith<S>* to, std::int64_t width, int lane) {
  for (std::int64_t c = 0; c < d; ++c) to[c * width + lane] = widen(row[c]);
}
template <class S>
void from_lane(const Arith<S>* from, std::int64_t width, int lane, Arith<S> factor, std::int64_t d,
               S* row) {
  for (std::int64_t c = 0; c < d; ++c) narrow(from[c * width + lane] * factor, row[c]);
}

// Spans index keys, so they are checked before anything is read.
inline void check_spans(const char* op, const std::int32_t* span_begin, std::int64_t rows) {
  for (std::int64_t t = 0; t < rows; ++t) {
    if (span_begin[t] < 0 || span_begin[t] > t) {
      fail("%s: span_begin[%lld] is %lld, wanted 0 to %lld", op, static_cast<long long>(t),
           static_cast<long long>(span_begin[t]), static_cast<long long>(t));
    }
  }
}

// The queries of a tile: lane i sees keys first[i] .. last[i] and writes o[i] and, unless it is
// null, lse[i]. Lanes from `count` on are idle.
template <class S>
struct Queries {
  int count = 0;
  const S* q[kTile];
  S* o[kTile];
  Arith<S>* lse[kTile];
  std::int64_t first[kTile], last[kTile];

  void add(const S* query, S* out, Arith<S>* log_sum, std::int64_t begin, std::int64_t end) {
    q[count] = query;
    o[count] = out;
    lse[count] = log_sum;
    first[count] = begin;
    last[count] = end;
    ++count;
  }
};

// Keys and values of one head, rows `stride` elements apart.
template <class S>
struct KeyValues {
  const S* k;
  const S* v;
  std::int64_t stride;
};

// What one thread needs for a tile of `width` lanes over at most `keys` keys.
template <class T>
struct AttendScratch {
  AttendScratch(Scratch& scratch, std::int64_t d, std::int64_t width, std::int64_t keys)
      : query(scratch.take<T>(d * width)),
        output(scratch.take<T>(d * width)),
        rows(scratch.take<T>(kTile * d)),
        scores(scratch.take<T>(keys * width)) {}
  T* query;   // [d, width]
  T* output;  // [d, width]
  T* rows;    // [kTile, d]: keys, then values
  T* scores;  // [keys, width]
};

// Scores from dot products (engine/ops/attention.cpp).
template <class T>
struct Score {
  T scale, soft_cap;
  template <class Vector>
  [[gnu::always_inline]] Vector of(Vector dot) const {
    const Vector x = dot * scale;
    return soft_cap > 0 ? tanh(x / soft_cap) * soft_cap : x;
  }
  // The factor of the gradient.
  template <class Vector>
  [[gnu::always_inline]] Vector slope(Vector score) const {
    const Vector part = score / soft_cap;
    return 1 - part * part;
  }
};

// Turns row `key` of dot products into scores, masks lanes that do not see it, and folds it into
// `largest`. first and last are relative to the first key of the tile.
template <class T>
[[gnu::always_inline]] inline void mask_and_fold(T* row, std::int64_t key, std::int64_t width,
                                                 const Score<T>& score, bool all_see,
                                                 const T* first, const T* last, T* largest) {
  constexpr int lanes = Simd<T>::lanes;
  const auto position = splat(static_cast<T>(key));
  const auto hidden = splat(-std::numeric_limits<T>::infinity());
  for (std::int64_t i = 0; i < width; i += lanes) {
    auto s = score.of(load(row + i));
    if (!all_see) {
      s = position >= load(first + i) ? s : hidden;
      s = position <= load(last + i) ? s : hidden;
    }
    store(row + i, s);
    const auto m = load(largest + i);
    store(largest + i, s > m ? s : m);
  }
}

template <class S>
void attend(const Queries<S>& lanes_in, const KeyValues<S>& kv, std::int64_t d,
            const Score<Arith<S>>& score, std::int64_t width,
            const AttendScratch<Arith<S>>& scratch) {
  using T = Arith<S>;
  constexpr int lanes = Simd<T>::lanes;
  const int count = lanes_in.count;
  const auto [lowest, most] = std::minmax_element(lanes_in.first, lanes_in.first + count);
  const auto [least, highest] = std::minmax_element(lanes_in.last, lanes_in.last + count);
  const std::int64_t begin = *lowest, keys = *highest + 1 - begin;
  T first[kTile], last[kTile], largest[kTile], sum[kTile];
  std::fill_n(scratch.query, d * width, T{0});
  for (int i = 0; i < width; ++i) {
    first[i] = static_cast<T>(i < count ? lanes_in.first[i] - begin : 1);
    last[i] = static_cast<T>(i < count ? lanes_in.last[i] - begin : 0);
    largest[i] = -std::numeric_limits<T>::infinity();
    sum[i] = 0;
    if (i < count) to_lane(lanes_in.q[i], d, scratch.query, width, i);
  }
  for (std::int64_t j = 0; j < keys; j += kTile) {
    const std::int64_t rows = std::min<std::int64_t>(kTile, keys - j);
    load_rows(kv.k + (begin + j) * kv.stride, kv.stride, rows, d, scratch.rows);
    T* scores = scratch.scores + j * width;
    product<T>(rows, d, {scratch.rows, d, 1}, scratch.query, scores, width);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t key = j + r;
      const bool all_see = count == width && key >= *most - begin && key <= *least - begin;
      mask_and_fold(scores + r * width, key, width, score, all_see, first, last, largest);
    }
  }
  for (int i = count; i < width; ++i) largest[i] = 0;  // idle lanes: exp(-inf) = 0, no NaN
  for (std::int64_t j = 0; j < keys; ++j) {
    for (std::int64_t i = 0; i < width; i += lanes) {
      T* at = scratch.scores + j * width + i;
      const auto p = exp(load(at) - load(largest + i));
      store(at, p);
      store(sum + i, load(sum + i) + p);
    }
  }
  for (std::int64_t j = 0; j < keys; j += kTile) {
    const std::int64_t rows = std::min<std::int64_t>(kTile, keys - j);
    load_rows(kv.v + (begin + j) * kv.stride, kv.stride, rows, d, scratch.rows);
    product<T>(d, rows, {scratch.rows, 1, d}, scratch.scores + j * width, scratch.output, width,
               j > 0);
  }
  for (int i = 0; i < count; ++i) {
    from_lane(scratch.output, width, i, 1 / sum[i], d, lanes_in.o[i]);
    if (lanes_in.lse[i] != nullptr) *lanes_in.lse[i] = largest[i] + std::log(sum[i]);
  }
}

}  // namespace nibble::cpu::NIBBLE_ISA
