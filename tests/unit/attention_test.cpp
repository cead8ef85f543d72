// Properties of attention, the key-value cache, RoPE and embedding that a comparison with the
// reference does not show: bits that must not depend on what runs beside a row, and indices that
// must not be trusted.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "backends/cpu/cpu.h"
#include "engine/autograd.h"
#include "engine/error.h"
#include "engine/philox.h"
#include "engine/runtime.h"

using namespace nibble;

namespace {

using Values = std::vector<double>;
using Feeds = std::map<std::string, Values>;

Values normal(std::string_view name, std::int64_t count) {
  Values values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<double>(philox_normal(1, hash_name(name), i));
  }
  return values;
}

Values slice(const Values& v, std::int64_t begin, std::int64_t count) {
  return {v.begin() + begin, v.begin() + begin + count};
}

// body(backend, compute dtype, label) on every instruction set that this machine has.
using Body = std::function<void(Backend&, DType)>;
void everywhere(const Body& body) {
  for (const cpu::Isa isa : {cpu::Isa::Portable, cpu::Isa::Avx2, cpu::Isa::Avx512}) {
    if (!cpu::is_supported(isa)) continue;
    cpu::CpuOptions options;
    options.threads = 2;
    options.isa = isa;
    const std::unique_ptr<Backend> backend = cpu::make_cpu_backend(options);
    for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
      CAPTURE(cpu::name(isa));
      CAPTURE(name(compute));
      body(*backend, compute);
    }
  }
}

constexpr std::int64_t kHeads = 6, kKvHeads = 2, kDim = 10;
constexpr float kScale = 0.3f;

// o, lse, dq, dk, dv of rows [begin, begin + rows) of the shared values, as one program.
std::vector<Values> attend(Backend& backend, DType compute, std::int64_t begin, std::int64_t rows,
                           const Values& spans) {
  Graph g(compute);
  Feeds feeds;
  const auto leaf = [&](const char* name, std::int64_t channels) {
    feeds[name] = slice(normal(name, 1000 * channels), begin * channels, rows * channels);
    return g.input(name, {compute, {rows, channels}, {}});
  };
  const Tensor q = leaf("q", kHeads * kDim), k = leaf("k", kKvHeads * kDim),
               v = leaf("v", kKvHeads * kDim), dy = leaf("dy", kHeads * kDim);
  const Tensor span = g.input("span_begin", {DType::I32, {rows}, {}});
  feeds["span_begin"] = spans;
  const Tensor o = attention(q, k, v, span, {kDim, kScale}), lse = g.output_of(o, 1);
  const Tensor dq = attention_backward(q, k, v, o, lse, dy, span, {kDim, kScale});
  return eval(backend, g, std::vector{o, lse, dq, g.output_of(dq, 1), g.output_of(dq, 2)}, feeds);
}

}  // namespace

TEST_CASE("a document's attention and gradients are the same bits alone and packed") {
  const std::vector<std::int64_t> lengths = {70, 1, 47, 130};
  Values spans;
  for (const std::int64_t length : lengths) {
    spans.insert(spans.end(), static_cast<std::size_t>(length), static_cast<double>(spans.size()));
  }
  everywhere([&](Backend& backend, DType compute) {
    const auto total = static_cast<std::int64_t>(spans.size());
    const std::vector<Values> packed = attend(backend, compute, 0, total, spans);
    std::int64_t begin = 0;
    for (const std::int64_t length : lengths) {
      const Values from_zero(static_cast<std::size_t>(length), 0.0);
      const std::vector<Values> alone = attend(backend, compute, begin, length, from_zero);
      for (std::size_t i = 0; i < alone.size(); ++i) {
        CAPTURE(i);
        const std::int64_t channels = static_cast<std::int64_t>(packed[i].size()) / total;
        CHECK(slice(packed[i], begin * channels, length * channels) == alone[i]);
      }
      begin += length;
    }
  });
}

TEST_CASE("attention over the cache: the same bits row by row, in chunks and in one document") {
  constexpr std::int64_t rows = 90, context = 100;
  everywhere([](Backend& backend, DType compute) {
    const std::vector<Values> whole = attend(backend, compute, 0, rows, Values(rows, 0.0));
    const Values q = normal("q", 1000 * kHeads * kDim);
    // The cache as kv_append leaves it, appended to in chunks of `chunk` rows.
    for (const std::int64_t chunk : {std::int64_t{1}, std::int64_t{7}, rows}) {
      CAPTURE(chunk);
      const Shape cache{kKvHeads, context, kDim};
      Values k_cache(static_cast<std::size_t>(cache.elements()), 0.0), v_cache = k_cache, out;
      for (std::int64_t t = 0; t < rows; t += chunk) {
        const std::int64_t count = std::min(chunk, rows - t);
        Graph g(compute);
        const Tensor position = g.input("position", {DType::I32, {1}, {}});
        const auto append = [&](const char* state, const char* input) {
          return kv_append(g.state(state, {compute, cache, {}}),
                           g.input(input, {compute, {count, kKvHeads * kDim}, {}}), position, kDim);
        };
        const Tensor k = append("k_cache", "k"), v = append("v_cache", "v");
        const Tensor o = attention_cached(g.input("q", {compute, {count, kHeads * kDim}, {}}), k, v,
                                          position, {kDim, kScale});
        const auto part = [&](const char* name, std::int64_t channels) {
          return slice(normal(name, 1000 * channels), t * channels, count * channels);
        };
        const std::vector<Values> got = eval(backend, g, std::vector{o, k, v},
                                             {{"position", {static_cast<double>(t)}},
                                              {"q", part("q", kHeads * kDim)},
                                              {"k", part("k", kKvHeads * kDim)},
                                              {"v", part("v", kKvHeads * kDim)},
                                              {"k_cache", k_cache},
                                              {"v_cache", v_cache}});
        out.insert(out.end(), got[0].begin(), got[0].end());
        k_cache = got[1];
        v_cache = got[2];
      }
      CHECK(out == whole[0]);
    }
  });
}

TEST_CASE("indices from outside are checked before memory is touched") {
  const std::unique_ptr<Backend> backend = cpu::make_cpu_backend({});
  const auto message = [&](const Tensor& t, const Feeds& feeds) -> std::string {
    try {
      eval(*backend, *t.graph, std::vector{t}, feeds);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  const auto matrix = [](Graph& g, const char* name, std::int64_t rows, std::int64_t cols) {
    return g.input(name, {DType::F32, {rows, cols}, {}});
  };

  Graph g1;
  const Tensor picked =
      embedding(g1.input("ids", {DType::I32, {2}, {}}), matrix(g1, "table", 3, 2));
  CHECK(message(picked, {{"ids", {1, 3}}, {"table", Values(6, 0.0)}}) ==
        "embedding: ids[1] is 3, wanted 0 to 2, the rows of the table");
  CHECK(message(picked, {{"ids", {-1, 0}}, {"table", Values(6, 0.0)}}) ==
        "embedding: ids[0] is -1, wanted 0 to 2, the rows of the table");

  Graph g2;
  const Tensor x = matrix(g2, "x", 2, 4);
  const Tensor o = attention(x, x, x, g2.input("span_begin", {DType::I32, {2}, {}}), {4, 1.0f});
  CHECK(message(o, {{"x", Values(8, 0.0)}, {"span_begin", {0, 2}}}) ==
        "attention: span_begin[1] is 2, wanted 0 to 1");

  Graph g3;
  const Tensor cache = g3.state("cache", {DType::F32, {1, 5, 4}, {}});
  const Tensor full =
      kv_append(cache, matrix(g3, "x", 2, 4), g3.input("position", {DType::I32, {1}, {}}), 4);
  CHECK(message(full, {{"x", Values(8, 0.0)}, {"position", {4}}}) ==
        "kv_append: position is 4 for 2 rows, and the cache has a context of 5");
}

TEST_CASE("a soft cap is a number above 0, or 0") {
  for (const float cap :
       {-1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    Graph g;
    const Tensor x = g.input("x", {DType::F32, {2, 4}, {}});
    const Tensor span = g.input("span_begin", {DType::I32, {2}, {}});
    CHECK_THROWS_AS(attention(x, x, x, span, {4, 1.0f, cap}), ShapeError);
  }
}

TEST_CASE("RoPE: turning forth and back, and no drift at far positions") {
  everywhere([](Backend& backend, DType compute) {
    Graph g(compute);
    const Tensor x = g.input("x", {compute, {4, 12}, {}});
    const Tensor positions = g.input("positions", {DType::I32, {4}, {}});
    const Tensor frequencies = g.input("frequencies", {g.accumulate(), {3}, {}});
    const Tensor y = rope(x, positions, frequencies, 6, RopePairs::half);
    const Tensor back = rope(y, positions, frequencies, 6, RopePairs::half, -1.0f);
    const Values in = normal("x", 48), at = {0, 1, 1000, 1000000}, turn = {1.0, 0.25, 0.0009765625};
    const std::vector<Values> got = eval(backend, g, std::vector{y, back},
                                         {{"x", in}, {"positions", at}, {"frequencies", turn}});
    const double tolerance = compute == DType::BF16 ? 0.03 : compute == DType::F32 ? 2e-6 : 1e-9;
    for (std::size_t t = 0; t < 4; ++t) {
      for (std::size_t i = 0; i < 3; ++i) {
        const double angle = at[t] * turn[i];
        const double a = in[t * 12 + i], b = in[t * 12 + i + 3];
        CHECK(std::abs(got[0][t * 12 + i] - (a * std::cos(angle) - b * std::sin(angle))) <
              tolerance);
        CHECK(std::abs(got[1][t * 12 + i] - a) < tolerance);
      }
    }
  });
}

TEST_CASE("rows picked out of an activation pass their gradient on, in every dtype") {
  everywhere([](Backend& backend, DType compute) {
    Graph g(compute);
    const Tensor w = g.parameter("w", {compute, {3, 2}, {}});
    const Tensor zero = fill(g, {compute, {3, 2}, {}}, 0);
    const Tensor y = embedding(g.input("ids", {DType::I32, {4}, {}}), add(w, zero));
    const Tensor dy = g.input("dy", {compute, {4, 2}, {}});
    const Backward backward = append_backward(g, std::vector{Seed{y, dy}});
    const std::vector<Values> got = eval(
        backend, g, std::vector{y, backward.parameters.at(0).updated},
        {{"w", {1, 2, 3, 4, 5, 6}}, {"ids", {2, 0, 2, 2}}, {"dy", {1, 10, 2, 20, 3, 30, 4, 40}}});
    CHECK(got[0] == Values{5, 6, 1, 2, 5, 6, 5, 6});
    CHECK(got[1] == Values{2, 20, 0, 0, 8, 80});
  });
}
