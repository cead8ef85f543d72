// Properties of ops that a comparison with the reference does not show: bits that must not depend
// on how the rows or elements are split, memory that adamw writes besides its output, and the
// numbers that dropout draws.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "backends/cpu/cpu.h"
#include "engine/cost.h"
#include "engine/dropout.h"
#include "engine/error.h"
#include "engine/float16.h"
#include "engine/runtime.h"

using namespace nibble;

namespace {

using Values = std::vector<double>;
using Feeds = std::map<std::string, Values>;

Backend& backend() {
  static const std::unique_ptr<Backend> cpu = [] {
    cpu::CpuOptions options;
    options.threads = 2;
    return cpu::make_cpu_backend(options);
  }();
  return *cpu;
}

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

Values ordinals(std::int64_t begin, std::int64_t count) {
  Values values;
  for (std::int64_t i = 0; i < count; ++i) values.push_back(static_cast<double>(begin + i));
  return values;
}

// The rows [begin, begin + rows) of a step: what a run over a part of a batch sees.
struct Part {
  std::int64_t begin, rows;
};

// Sums into "acc" of one run over `part`, starting from `acc`.
using Update = std::function<Tensor(Graph&, Part)>;
Values update(DType compute, Part part, const Update& build, Feeds feeds, const Values& acc) {
  Graph g(compute);
  const Tensor out = build(g, part);
  feeds["acc"] = acc;
  const Tensor outputs[] = {out};
  return eval(backend(), g, outputs, feeds)[0];
}

constexpr std::int64_t kRows = 1300, kInner = 70, kOuter = 9;

Feeds gradient_feeds(Part part) {
  return {{"x", slice(normal("x", kRows * kInner), part.begin * kInner, part.rows * kInner)},
          {"dy", slice(normal("dy", kRows * kOuter), part.begin * kOuter, part.rows * kOuter)},
          {"dz", slice(normal("dz", kRows * kInner), part.begin * kInner, part.rows * kInner)},
          {"rng", {77, 3}},
          {"ordinal", ordinals(part.begin, part.rows)}};
}

Tensor rows_of(Graph& g, std::string_view name, Part part, std::int64_t cols) {
  return g.input(name, {g.compute(), {part.rows, cols}, {}});
}

LoraDropout dropout_of(Graph& g, std::int64_t rows, float p) {
  return {p, 5, g.input("rng", {DType::I64, {2}, {}}),
          g.input("ordinal", {DType::I32, {rows}, {}})};
}

void check_split(const char* what, const Shape& acc_shape, const Update& build) {
  CAPTURE(what);
  for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
    const Values start = normal("acc", acc_shape.elements());
    const Part all{0, kRows};
    const Values whole = update(compute, all, build, gradient_feeds(all), start);
    Values split = start;
    for (const Part part : {Part{0, 512}, Part{512, 512}, Part{1024, kRows - 1024}}) {
      split = update(compute, part, build, gradient_feeds(part), split);
    }
    CHECK(whole == split);
    CHECK(whole != start);
  }
}

}  // namespace

TEST_CASE("gradients summed over tokens do not depend on splits at multiples of 512 rows") {
  const auto acc = [](Graph& g, const Shape& shape) {
    return g.state("acc", {g.accumulate(), shape, {}});
  };
  check_split("rms_norm_dw", {kInner}, [&](Graph& g, Part p) {
    return rms_norm_dw(acc(g, {kInner}), rows_of(g, "x", p, kInner), rows_of(g, "dz", p, kInner),
                       1e-5f);
  });
  check_split("linear_dw", {kOuter, kInner}, [&](Graph& g, Part p) {
    return linear_dw(acc(g, {kOuter, kInner}), rows_of(g, "x", p, kInner),
                     rows_of(g, "dy", p, kOuter), 0.5f);
  });
  check_split("lora_linear_da", {kOuter, kInner}, [&](Graph& g, Part p) {
    return lora_linear_da(acc(g, {kOuter, kInner}), rows_of(g, "x", p, kInner),
                          rows_of(g, "dy", p, kOuter), dropout_of(g, p.rows, 0.2f));
  });
}

TEST_CASE("a row's result does not depend on the rows beside it") {
  constexpr std::int64_t inner = 70, outer = 33, rank = 4;
  const Feeds weights = {{"w", normal("w", outer * inner)},
                         {"a", normal("a", rank * inner)},
                         {"b", normal("b", outer * rank)},
                         {"f", normal("f", inner)},
                         {"rng", {77, 3}}};
  // y, u, dx and the normalized rows of one run.
  const auto run = [&](DType compute, Part part) {
    Graph g(compute);
    const Tensor x = rows_of(g, "x", part, inner), dy = rows_of(g, "dy", part, outer);
    const Tensor w = g.weight("w", {DType::NF4, {outer, inner}, {}});
    const Tensor a = g.weight("a", {compute, {rank, inner}, {}});
    const Tensor b = g.weight("b", {compute, {outer, rank}, {}});
    const Tensor f = g.weight("f", {DType::F32, {inner}, {}});
    const LoraDropout dropout = dropout_of(g, part.rows, 0.25f);
    const Tensor y = lora_linear(x, w, a, b, 0.5f, dropout);
    const Tensor outputs[] = {y, g.output_of(y, 1),
                              lora_linear_dx(dy, w, linear_dx(dy, b), a, dropout),
                              rms_norm(x, f, 1e-5f), rms_norm_dx(x, f, x, 1e-5f)};
    Feeds feeds = weights;
    feeds["x"] = slice(normal("x", kRows * inner), part.begin * inner, part.rows * inner);
    feeds["dy"] = slice(normal("dy", kRows * outer), part.begin * outer, part.rows * outer);
    feeds["ordinal"] = ordinals(part.begin, part.rows);
    return eval(backend(), g, outputs, feeds);
  };
  for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
    const auto all = run(compute, {0, 600});
    for (const Part part : {Part{0, 1}, Part{3, 40}, Part{599, 1}}) {
      const auto some = run(compute, part);
      for (std::size_t o = 0; o < all.size(); ++o) {
        CAPTURE(o);
        const auto cols = static_cast<std::int64_t>(all[o].size()) / 600;
        CHECK(some[o] == slice(all[o], part.begin * cols, part.rows * cols));
      }
    }
  }
}

TEST_CASE("dropout keeps what engine/dropout.h says, in the share that p says") {
  constexpr std::int64_t rows = 97, cols = 203;
  for (const float p : {0.1f, 0.5f, 0.9f}) {
    // With A the identity, u is drop(x); x is all ones.
    Graph g(DType::F32);
    const Tensor x = rows_of(g, "x", {0, rows}, cols);
    const Tensor a = g.weight("a", {DType::F32, {cols, cols}, {}});
    const Tensor w = g.weight("w", {DType::F32, {1, cols}, {}});
    const Tensor b = g.weight("b", {DType::F32, {1, cols}, {}});
    const Tensor y = lora_linear(x, w, a, b, 1.0f, dropout_of(g, rows, p));
    Values identity(static_cast<std::size_t>(cols * cols));
    for (std::int64_t i = 0; i < cols; ++i) identity[static_cast<std::size_t>(i * cols + i)] = 1;
    const Tensor outputs[] = {g.output_of(y, 1)};
    const Values u = eval(backend(), g, outputs,
                          {{"x", Values(static_cast<std::size_t>(rows * cols), 1.0)},
                           {"a", identity},
                           {"w", Values(static_cast<std::size_t>(cols))},
                           {"b", Values(static_cast<std::size_t>(cols))},
                           {"rng", {-5, 1LL << 33}},
                           {"ordinal", ordinals(1000, rows)}})[0];
    const DropoutKey key{static_cast<std::uint64_t>(-5), 0, 5};
    const double kept_value = static_cast<float>(1 / (1 - static_cast<double>(p)));
    std::int64_t kept = 0, wrong = 0;
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t c = 0; c < cols; ++c) {
        const bool keep = dropout_keeps(key, static_cast<std::uint32_t>(1000 + t), c, p);
        kept += keep;
        wrong += u[static_cast<std::size_t>(t * cols + c)] != (keep ? kept_value : 0);
      }
    }
    CHECK(wrong == 0);
    // Five standard deviations of a binomial distribution.
    const auto n = static_cast<double>(rows * cols), q = 1 - static_cast<double>(p);
    CHECK(std::abs(static_cast<double>(kept) - n * q) < 5 * std::sqrt(n * q * (1 - q)));
  }
}

TEST_CASE("sum_squares does not depend on splits at multiples of 4096 elements") {
  constexpr std::int64_t n = 3 * 4096 + 1234;
  const Values x = normal("gradient", n);
  const auto sum = [&](double start, std::int64_t begin, std::int64_t count) {
    Graph g(DType::F32);
    const Tensor acc = g.state("acc", {DType::F64, {1}, {}});
    const Tensor outputs[] = {sum_squares(acc, g.input("x", {DType::F32, {count}, {}}))};
    return eval(backend(), g, outputs, {{"acc", {start}}, {"x", slice(x, begin, count)}})[0][0];
  };
  const double whole = sum(0.25, 0, n);
  CHECK(whole == sum(sum(0.25, 0, 8192), 8192, n - 8192));
  double wanted = 0.25;
  for (const double v : x) wanted += v * v;
  CHECK(whole == doctest::Approx(wanted).epsilon(1e-12));
}

TEST_CASE("convert rounds to nearest even and keeps what is not finite") {
  const double inf = std::numeric_limits<double>::infinity();
  const Values x = {0.0, -0.0, 1.0 + 0x1p-8, 1.0 + 3 * 0x1p-8, 0x1p-133, 3.4e38, inf, -inf, NAN};
  Graph g(DType::BF16);
  const TensorType to{DType::BF16, {9}, {}}, from{DType::F32, {9}, {}};
  const Tensor outputs[] = {convert(g.state("copy", to), g.input("x", from))};
  const Values y = eval(backend(), g, outputs, {{"x", x}, {"copy", Values(9)}})[0];
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double wanted = to_float(to_bf16(static_cast<float>(x[i])));
    CAPTURE(x[i]);
    CHECK((y[i] == wanted || (std::isnan(y[i]) && std::isnan(wanted))));
    CHECK(std::signbit(y[i]) == std::signbit(x[i]));
  }
}

namespace {

struct AdamwStep {
  double lr, clip, tokens;
};

// PyTorch's loop (torch/optim/adamw.py, single tensor, decoupled decay first) in F64.
struct Adamw {
  Values p, m, v;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  int steps = 0;

  void step(const AdamwStep& s, const Values& grad, const Values& table) {
    ++steps;
    double norm = 0;
    for (const double g : grad) norm += g * g;
    norm = std::sqrt(norm) / s.tokens;
    const double coef = s.clip == 0 ? 1 : std::min(1.0, s.clip / (norm + 1e-6));
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double lr = s.lr * table[i / 4096 * 2], decay = table[i / 4096 * 2 + 1];
      const double g = grad[i] / s.tokens * coef;
      p[i] *= 1 - lr * decay;
      m[i] += (g - m[i]) * (1 - beta1);
      v[i] = v[i] * beta2 + g * g * (1 - beta2);
      const double denominator = std::sqrt(v[i] / (1 - std::pow(beta2, steps))) + eps;
      p[i] -= lr / (1 - std::pow(beta1, steps)) * m[i] / denominator;
    }
  }
};

template <class T>
void check_close(const Runtime& runtime, const char* name, const Values& wanted, double bound) {
  std::vector<T> got(wanted.size());
  runtime.read(name, std::as_writable_bytes(std::span(got)));
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(got[i]) - wanted[i]));
  }
  CAPTURE(name);
  CHECK(worst < bound);
}

template <class T>
void check_adamw(DType compute, double bound) {
  constexpr std::int64_t n = 3 * 4096;
  auto graph = std::make_unique<Graph>(compute);
  const TensorType flat{graph->accumulate(), {n}, {}};
  const Tensor master = graph->state("master", flat), grad = graph->state("grad", flat);
  const Tensor norm = sum_squares(graph->state("norm", {DType::F64, {1}, {}}), grad);
  adamw(master, graph->state("m", flat), graph->state("v", flat), grad,
        graph->input("table", {flat.dtype, {3, 2}, {}}),
        graph->input("scalars", {flat.dtype, {8}, {}}), norm);
  Runtime runtime(backend());
  runtime.add(std::move(graph));
  runtime.allocate();

  Adamw oracle{normal("master", n), Values(n), Values(n)};
  const auto write = [&](const char* name, const Values& values) {
    const std::vector<T> rounded(values.begin(), values.end());
    runtime.write(name, std::span<const T>(rounded));
  };
  const Values table = {1, 0.1, 0.5, 0, 2, 0.01};
  write("master", oracle.p);
  write("table", table);
  // Clipped, below the clip norm, not clipped at all.
  for (const AdamwStep& s : {AdamwStep{1e-2, 0.01, 100}, {2e-2, 1e3, 7}, {5e-3, 0, 50}}) {
    const Values g = normal("grad" + std::to_string(oracle.steps), n);
    oracle.step(s, g, table);
    write("grad", g);
    const double zero = 0;
    runtime.write("norm", std::span<const double>(&zero, 1));
    write("scalars",
          {s.lr, oracle.beta1, oracle.beta2, oracle.eps, 1 - std::pow(oracle.beta1, oracle.steps),
           1 - std::pow(oracle.beta2, oracle.steps), 1 / s.tokens, s.clip});
    runtime.run(0);
    check_close<T>(runtime, "master", oracle.p, bound);
    check_close<T>(runtime, "m", oracle.m, bound);
    check_close<T>(runtime, "v", oracle.v, bound);
    check_close<T>(runtime, "grad", Values(n), std::numeric_limits<double>::min());
  }
}

}  // namespace

TEST_CASE("adamw follows PyTorch's loop, moments included, and clears the gradient") {
  check_adamw<double>(DType::F64, 1e-12);
  // Three steps; p is up to 5 in size, and the update is good to the digits of 1 - beta2 in F32.
  check_adamw<float>(DType::F32, 5e-6);
  check_adamw<float>(DType::BF16, 5e-6);
}

TEST_CASE("the optimizer's steps cost what they read and write") {
  constexpr std::int64_t n = 2 * 4096;
  const std::int64_t small = 2 * kMomentBlockBytes, others = 4 * 4 + 8 * 4 + 8;
  for (const bool in_8_bits : {false, true}) {
    Graph g(DType::BF16);
    const TensorType flat{DType::F32, {n}, {}};
    const TensorType moment = in_8_bits ? TensorType{DType::U8, {small}, {}} : flat;
    const Tensor stepped = (in_8_bits ? adamw8bit : adamw)(
        g.state("master", flat), g.state("m", moment), g.state("v", moment), g.state("grad", flat),
        g.input("table", {DType::F32, {2, 2}, {}}), g.input("scalars", {DType::F32, {8}, {}}),
        g.input("norm", {DType::F64, {1}, {}}));
    // Master, gradient and two moments, each read once and written once.
    const std::int64_t moved = 2 * (2 * 4 * n + 2 * bytes(moment)) + others;
    CHECK(op_cost(describe(g, stepped.node), 1).bytes == static_cast<double>(moved));
  }
}

TEST_CASE("shape errors say what was found and what was wanted") {
  Graph g(DType::BF16);
  const Tensor x = g.input("x", {DType::BF16, {4, 6}, {}});
  const Tensor w = g.weight("w", {DType::F32, {3, 5}, {}});
  CHECK_THROWS_WITH_AS(linear(x, w),
                       "linear: w is F32[3, 5], wanted [3, 6], [out, in] with in = the channels of "
                       "x",
                       ShapeError);
  CHECK_THROWS_AS(linear({}, w), ShapeError);
  CHECK_THROWS_AS(rms_norm(x, g.weight("f", {DType::F32, {6}, {}}), NAN), ShapeError);
  const Tensor a = g.weight("a", {DType::F32, {2, 6}, {}});
  const Tensor v = g.weight("v", {DType::F32, {3, 6}, {}});
  const Tensor b = g.weight("b", {DType::F32, {3, 2}, {}});
  CHECK_THROWS_AS(lora_linear(x, v, a, b, 1, dropout_of(g, 4, 1.0f)), ShapeError);
  CHECK_THROWS_AS(lora_linear(x, v, a, b, 1, dropout_of(g, 4, NAN)), ShapeError);
  CHECK_THROWS_AS(fill(g, {DType::I32, {2}, {}}, 0), ShapeError);
}
