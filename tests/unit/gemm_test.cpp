// The CPU backend's products: against plain F64 sums with the rounding-error bound, and bitwise
// against themselves for every thread count, row count and split that gemm.h promises.
#include "backends/cpu/gemm.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "engine/error.h"
#include "engine/float16.h"
#include "engine/quantize.h"

using namespace nibble;
using namespace nibble::cpu;

namespace {

constexpr unsigned char kGuard = 0xa5;

std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::Portable, Isa::Avx2, Isa::Avx512}) {
    if (is_supported(isa)) {
      found.push_back(isa);
    } else {
      MESSAGE("skipped: this machine has no ", std::string(name(isa)));
    }
  }
  return found;
}

// A dense row-major matrix whose rows are `pad` elements apart more than needed; the gaps hold
// guard bytes.
struct Dense {
  Dense(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t pad = 0)
      : dtype(dtype), rows(rows), cols(cols), stride(cols + pad) {
    bytes.assign(static_cast<std::size_t>(rows * stride * info(dtype).block_bytes),
                 std::byte{kGuard});
  }
  static Dense random(DType dtype, std::int64_t rows, std::int64_t cols, unsigned seed,
                      std::int64_t pad = 0) {
    Dense m(dtype, rows, cols, pad);
    std::mt19937 engine(seed);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; ++j) m.set(i, j, static_cast<double>(uniform(engine)));
    }
    return m;
  }
  void set(std::int64_t i, std::int64_t j, double value) {
    std::byte* p = at(i, j);
    const auto narrow = static_cast<float>(value);
    const bf16 rounded = to_bf16(narrow);
    if (dtype == DType::F64) std::memcpy(p, &value, 8);
    if (dtype == DType::F32) std::memcpy(p, &narrow, 4);
    if (dtype == DType::BF16) std::memcpy(p, &rounded, 2);
  }
  double get(std::int64_t i, std::int64_t j) const {
    const std::byte* p = const_cast<Dense*>(this)->at(i, j);
    double wide;
    float single;
    bf16 half;
    if (dtype == DType::F64) return std::memcpy(&wide, p, 8), wide;
    if (dtype == DType::F32) return std::memcpy(&single, p, 4), static_cast<double>(single);
    return std::memcpy(&half, p, 2), static_cast<double>(to_float(half));
  }
  std::byte* at(std::int64_t i, std::int64_t j) {
    return bytes.data() + (i * stride + j) * info(dtype).block_bytes;
  }
  bool gaps_intact() const {
    const std::int64_t size = info(dtype).block_bytes;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t b = (i * stride + cols) * size; b < (i + 1) * stride * size; ++b) {
        if (bytes[static_cast<std::size_t>(b)] != std::byte{kGuard}) return false;
      }
    }
    return true;
  }
  ConstMatrix view(std::int64_t first_row = 0) { return {at(first_row, 0), dtype, stride}; }
  Matrix output(std::int64_t first_row = 0) { return {at(first_row, 0), dtype, stride}; }

  DType dtype;
  std::int64_t rows, cols, stride;
  std::vector<std::byte> bytes;
};

// A stored weight with its values by the reference decoder.
struct Weight {
  Weight(TensorType type, unsigned seed) : type(type), memory(bytes(type) + 32) {
    data = memory.data();
    while (reinterpret_cast<std::uintptr_t>(data) % 32 != 0) ++data;
    std::mt19937 engine(seed);
    std::uniform_real_distribution<float> uniform(-1, 1);
    const auto count = static_cast<std::size_t>(type.elements());
    values.resize(count);
    if (can_quantize(type.dtype)) {
      for (float& v : values) v = uniform(engine);
      quantize(type, values, {data, static_cast<std::size_t>(bytes(type))});
    } else if (type.dtype == DType::F64) {
      for (std::size_t i = 0; i < count; ++i) {
        const auto value = static_cast<double>(uniform(engine)) * 1.1;  // not an F32 value
        std::memcpy(data + 8 * i, &value, 8);
      }
    } else {
      fill_blocks(engine);
    }
    dequantize(type, data, 0, values);
  }
  // Random codes and scales; only the halves must not be NaN or huge.
  void fill_blocks(std::mt19937& engine) {
    static const std::vector<std::pair<DType, std::vector<int>>> halves = {
        {DType::Q4_0, {0}},    {DType::Q4_1, {0, 2}},   {DType::Q5_0, {0}},   {DType::Q5_1, {0, 2}},
        {DType::Q8_0, {0}},    {DType::Q2_K, {80, 82}}, {DType::Q3_K, {108}}, {DType::Q4_K, {0, 2}},
        {DType::Q5_K, {0, 2}}, {DType::Q6_K, {208}}};
    const std::int64_t size = bytes(type), block = info(type.dtype).block_bytes;
    for (std::int64_t i = 0; i < size; ++i) data[i] = static_cast<std::byte>(engine() & 255);
    const auto found = std::find_if(halves.begin(), halves.end(),
                                    [&](const auto& h) { return h.first == type.dtype; });
    REQUIRE(found != halves.end());
    std::uniform_real_distribution<float> uniform(-0.01f, 0.01f);
    for (std::int64_t at = 0; at < size; at += block) {
      for (const int offset : found->second) {
        const f16 half = to_f16(uniform(engine));
        std::memcpy(data + at + offset, &half, 2);
      }
    }
  }
  StoredMatrix view() const { return stored_matrix(type, data); }
  double get(std::int64_t n, std::int64_t k) const {
    return static_cast<double>(values[static_cast<std::size_t>(n * type.shape.cols() + k)]);
  }

  TensorType type;
  std::vector<std::byte> memory;
  std::byte* data;
  std::vector<float> values;
};

// Scratch of exactly the promised size, poisoned, with guards behind it.
class Scratch {
 public:
  explicit Scratch(std::int64_t size)
      : size_(static_cast<std::size_t>(size)),
        memory_(static_cast<std::byte*>(std::aligned_alloc(64, (size_ / 64 + 2) * 64)), std::free) {
    std::memset(memory_.get(), 0xff, size_);  // NaN as any float type
    std::memset(memory_.get() + size_, kGuard, 64);
  }
  ~Scratch() {
    for (int i = 0; i < 64; ++i) CHECK(memory_.get()[size_ + i] == std::byte{kGuard});
  }
  std::span<std::byte> span() { return {memory_.get(), size_}; }

 private:
  std::size_t size_;
  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
};

std::int64_t inner_of(WeightUse use, const StoredMatrix& w) {
  return use == WeightUse::Transposed ? w.cols : w.rows;
}

void run_multiply(Isa isa, ThreadPool& pool, WeightUse use, std::int64_t rows,
                  const std::vector<Term>& terms, Matrix y, Output output = Output::Overwrite) {
  std::int64_t inner = 0;
  for (const Term& term : terms) inner += inner_of(use, term.weight);
  const StoredMatrix& w = terms[0].weight;
  Scratch scratch(multiply_scratch_bytes(terms[0].x.dtype, y.dtype, rows,
                                         use == WeightUse::Transposed ? w.rows : w.cols, inner));
  multiply({isa, pool, scratch.span()}, use, rows, terms, y, output);
}

void run_gradient(Isa isa, ThreadPool& pool, std::int64_t rows, std::int64_t n, std::int64_t k,
                  ConstMatrix dy, ConstMatrix x, double alpha, Matrix dw) {
  Scratch scratch(gradient_scratch_bytes(dw.dtype, rows, n, k));
  accumulate_gradient({isa, pool, scratch.span()}, rows, n, k, dy, x, alpha, dw);
}

double unit_roundoff(DType dtype) {
  return dtype == DType::F64 ? 0x1p-53 : dtype == DType::BF16 ? 0x1p-8 : 0x1p-24;
}

// y against sum over terms of alpha * x * op(W). An F32 chain of n multiply-adds, each at worst
// two roundings (portable), and one for alpha, is within (2 n + 2) u * sum |alpha x w| of the sum.
void check_product(WeightUse use, const std::vector<const Dense*>& x,
                   const std::vector<const Weight*>& w, const std::vector<double>& alpha,
                   const Dense& y, const Dense* before = nullptr) {
  const double u = unit_roundoff(x[0]->dtype == DType::F64 ? DType::F64 : DType::F32);
  std::int64_t bad = 0;
  double worst = 0;
  for (std::int64_t t = 0; t < y.rows; ++t) {
    for (std::int64_t j = 0; j < y.cols; ++j) {
      double sum = before != nullptr ? before->get(t, j) : 0, size = std::fabs(sum);
      std::int64_t length = 1;
      for (std::size_t i = 0; i < x.size(); ++i) {
        for (std::int64_t k = 0; k < x[i]->cols; ++k) {
          const double weight = use == WeightUse::Transposed ? w[i]->get(j, k) : w[i]->get(k, j);
          const double product = alpha[i] * x[i]->get(t, k) * weight;
          sum += product;
          size += std::fabs(product);
        }
        length += x[i]->cols;
      }
      double bound = static_cast<double>(2 * length + 2) * u * size;
      if (y.dtype == DType::BF16) bound = bound * 1.01 + std::fabs(sum) * unit_roundoff(y.dtype);
      const double error = std::fabs(y.get(t, j) - sum);
      if (!(error <= bound)) ++bad;
      worst = std::max(worst, bound > 0 ? error / bound : 0.0);
    }
  }
  CHECK_MESSAGE(bad == 0, bad, " of ", y.rows * y.cols, " elements are off; worst ", worst);
  CHECK(y.gaps_intact());
}

std::vector<TensorType> weight_types(std::int64_t rows) {
  std::vector<TensorType> types;
  for (const DType d : {DType::F64, DType::F32, DType::F16, DType::BF16}) {
    types.push_back({d, {rows, 75}, {}});
  }
  types.push_back({DType::NF4, {rows, 576}, {64, true, false}});
  types.push_back({DType::NF4, {rows, 160}, {32, false, false}});
  types.push_back({DType::NF4, {rows, 77}, {64, true, false}});  // blocks straddle, odd rows
  types.push_back({DType::NF4, {rows, 100}, {4096, true, false}});
  for (const DType d : {DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1}) {
    types.push_back({d, {rows, 416}, {}});
  }
  for (const DType d : {DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K}) {
    types.push_back({d, {rows, 256}, {}});
  }
  return types;
}

std::vector<unsigned char> copy_of(const Dense& m) {
  std::vector<unsigned char> copy(m.bytes.size());
  std::memcpy(copy.data(), m.bytes.data(), copy.size());
  return copy;
}

}  // namespace

TEST_CASE("decoders give the reference decoder's bits") {
  std::vector<TensorType> types = weight_types(5);
  types.push_back({DType::NF4, {3, 256}, {128, true, true}});
  types.push_back({DType::NF4, {1, 1}, {64, true, false}});
  types.push_back({DType::FP4, {5, 192}, {64, true, false}});
  std::mt19937 engine(7);
  for (const TensorType& type : types) {
    if (is_plane(type.dtype) && !can_quantize(type.dtype)) continue;
    CAPTURE(type.str());
    const Weight w(type, 11);
    const StoredMatrix m = w.view();
    const std::int64_t cols = type.shape.cols();
    const std::int64_t unit = is_block(type.dtype) ? 32 : 1;
    for (const Isa isa : isas()) {
      CAPTURE(name(isa));
      for (int trial = 0; trial < 60; ++trial) {
        const auto pick = [&](std::int64_t below) {
          return static_cast<std::int64_t>(engine() % static_cast<unsigned>(below));
        };
        const std::int64_t row = pick(m.rows), col = pick(cols / unit) * unit;
        const std::int64_t count =
            trial == 0 ? cols - col : (pick((cols - col + unit - 1) / unit) + 1) * unit;
        std::vector<float> got(static_cast<std::size_t>(count)), want(got.size());
        std::vector<double> wide(got.size());
        decode_row(isa, m, row, col, count, got.data());
        decode_row(isa, m, row, col, count, wide.data());
        dequantize(type, w.data, row * cols + col, want);
        CHECK(std::memcmp(got.data(), want.data(), 4 * got.size()) == 0);
        if (type.dtype == DType::F64) {
          const double* exact = reinterpret_cast<const double*>(w.data) + row * cols + col;
          CHECK(std::memcmp(wide.data(), exact, 8 * wide.size()) == 0);
        } else {
          CHECK(std::equal(wide.begin(), wide.end(), want.begin(),
                           [](double a, float b) { return a == static_cast<double>(b); }));
        }
      }
    }
  }
}

// Multiplying by the identity must return the weight exactly, which shows the transposed decoders
// bit for bit (up to the sign of zero).
TEST_CASE("the identity times a weight is the weight") {
  ThreadPool pool(2);
  for (const TensorType& type : weight_types(37)) {
    const Weight w(type, 3);
    const std::int64_t n = type.shape.rows(), k = type.shape.cols();
    for (const WeightUse use : {WeightUse::Transposed, WeightUse::Plain}) {
      const std::int64_t inner = use == WeightUse::Transposed ? k : n;
      const std::int64_t outputs = use == WeightUse::Transposed ? n : k;
      Dense x(DType::F32, inner, inner);
      for (std::int64_t i = 0; i < inner; ++i) {
        for (std::int64_t j = 0; j < inner; ++j) x.set(i, j, i == j ? 1 : 0);
      }
      for (const Isa isa : isas()) {
        CAPTURE(type.str());
        CAPTURE(name(isa));
        for (const std::int64_t rows : {std::min<std::int64_t>(inner, 20), inner}) {
          Dense y(DType::F32, rows, outputs);
          run_multiply(isa, pool, use, rows, {{x.view(), w.view(), 1}}, y.output());
          std::int64_t bad = 0;
          for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < outputs; ++j) {
              bad += y.get(i, j) != (use == WeightUse::Transposed ? w.get(j, i) : w.get(i, j));
            }
          }
          CHECK(bad == 0);
        }
      }
    }
  }
}

TEST_CASE("products of every weight type agree with F64 sums") {
  ThreadPool pool(2);
  unsigned seed = 100;
  for (const TensorType& type : weight_types(43)) {
    const Weight w(type, ++seed);
    for (const WeightUse use : {WeightUse::Transposed, WeightUse::Plain}) {
      const std::int64_t inner = inner_of(use, w.view());
      const std::int64_t outputs =
          use == WeightUse::Transposed ? type.shape.rows() : type.shape.cols();
      for (const std::int64_t rows : {1, 3, 64}) {
        Dense x = Dense::random(DType::F32, rows, inner, ++seed, 3);
        for (const Isa isa : isas()) {
          CAPTURE(type.str());
          CAPTURE(name(isa));
          CAPTURE(rows);
          Dense y(DType::F32, rows, outputs, 5);
          run_multiply(isa, pool, use, rows, {{x.view(), w.view(), 1}}, y.output());
          check_product(use, {&x}, {&w}, {1}, y);
        }
      }
    }
  }
}

TEST_CASE("row counts, dtypes, two terms and accumulation agree with F64 sums") {
  ThreadPool pool(3);
  unsigned seed = 500;
  // Transposed: K = 448 spans two reduction passes.
  const Weight base({DType::NF4, {70, 448}, {64, true, false}}, 1);
  const Weight down({DType::F32, {70, 9}, {}}, 2);
  const Weight up({DType::F32, {9, 448}, {}}, 3);
  struct Types {
    DType x, y;
  };
  for (const auto& [x_type, y_type] :
       {Types{DType::F32, DType::F32}, Types{DType::F32, DType::BF16},
        Types{DType::BF16, DType::BF16}, Types{DType::BF16, DType::F32},
        Types{DType::F64, DType::F64}}) {
    for (const std::int64_t rows : {1, 2, 3, 7, 32, 33, 64, 513, 1025}) {
      if (rows > 64 && x_type != DType::BF16) continue;
      for (const WeightUse use : {WeightUse::Transposed, WeightUse::Plain}) {
        const bool forward = use == WeightUse::Transposed;
        const Weight& second = forward ? down : up;
        const std::int64_t outputs = forward ? 70 : 448;
        Dense x = Dense::random(x_type, rows, forward ? 448 : 70, ++seed);
        Dense u = Dense::random(x_type, rows, 9, ++seed, 2);
        for (const Isa isa : isas()) {
          CAPTURE(name(isa));
          CAPTURE(rows);
          CAPTURE(forward);
          CAPTURE(name(x_type));
          CAPTURE(name(y_type));
          Dense y(y_type, rows, outputs, 1);
          const std::vector<Term> terms = {{x.view(), base.view(), 0.75},
                                           {u.view(), second.view(), 2}};
          run_multiply(isa, pool, use, rows, terms, y.output());
          check_product(use, {&x, &u}, {&base, &second}, {0.75, 2}, y);
          if (y_type == DType::BF16 || rows > 64) continue;
          const Dense before = y;
          run_multiply(isa, pool, use, rows, terms, y.output(), Output::Accumulate);
          check_product(use, {&x, &u}, {&base, &second}, {0.75, 2}, y, &before);
        }
      }
    }
  }
}

TEST_CASE("a row's bits do not depend on the rows beside it, nor bits on the threads") {
  const Weight w({DType::NF4, {600, 896}, {64, true, false}}, 1);
  const Weight b({DType::BF16, {600, 8}, {}}, 2);
  const std::int64_t rows = 257;
  Dense x = Dense::random(DType::F32, rows, 896, 3), u = Dense::random(DType::F32, rows, 8, 4);
  Dense dy = Dense::random(DType::F32, rows, 600, 5);
  for (const Isa isa : isas()) {
    CAPTURE(name(isa));
    for (const DType y_type : {DType::F32, DType::BF16}) {
      Dense whole(y_type, rows, 600), back(y_type, rows, 896);
      for (const int threads : {1, 2, 3, 5}) {
        ThreadPool pool(threads);
        Dense y(y_type, rows, 600), dx(y_type, rows, 896);
        run_multiply(isa, pool, WeightUse::Transposed, rows,
                     {{x.view(), w.view(), 1}, {u.view(), b.view(), 0.5}}, y.output());
        run_multiply(isa, pool, WeightUse::Plain, rows, {{dy.view(), w.view(), 1}}, dx.output());
        if (threads == 1) {
          whole = y;
          back = dx;
        }
        CHECK(copy_of(y) == copy_of(whole));
        CHECK(copy_of(dx) == copy_of(back));
      }
      ThreadPool pool(2);
      for (const std::int64_t count : {1, 2, 5, 31, 32, 33, 100}) {
        const std::int64_t first = rows - count - 7;
        Dense y(y_type, count, 600), dx(y_type, count, 896);
        run_multiply(isa, pool, WeightUse::Transposed, count,
                     {{x.view(first), w.view(), 1}, {u.view(first), b.view(), 0.5}}, y.output());
        run_multiply(isa, pool, WeightUse::Plain, count, {{dy.view(first), w.view(), 1}},
                     dx.output());
        CAPTURE(count);
        CHECK(std::memcmp(y.bytes.data(), whole.at(first, 0), y.bytes.size()) == 0);
        CHECK(std::memcmp(dx.bytes.data(), back.at(first, 0), dx.bytes.size()) == 0);
      }
    }
  }
}

// More columns than one pass takes, and a weight that is part of a larger one.
TEST_CASE("wide results and row ranges are the parts of the whole") {
  ThreadPool pool(2);
  const Weight w({DType::NF4, {4300, 64}, {64, true, false}}, 1);
  Dense x = Dense::random(DType::F32, 40, 64, 2);
  for (const Isa isa : isas()) {
    for (const DType y_type : {DType::F32, DType::BF16}) {
      Dense whole(y_type, 40, 4300);
      run_multiply(isa, pool, WeightUse::Transposed, 40, {{x.view(), w.view(), 1}}, whole.output());
      check_product(WeightUse::Transposed, {&x}, {&w}, {1}, whole);
      Dense part(y_type, 40, 301);
      run_multiply(isa, pool, WeightUse::Transposed, 40,
                   {{x.view(), row_range(w.view(), 1234, 301), 1}}, part.output());
      std::int64_t bad = 0;
      for (std::int64_t i = 0; i < 40; ++i) {
        for (std::int64_t j = 0; j < 301; ++j) bad += part.get(i, j) != whole.get(i, 1234 + j);
      }
      CHECK(bad == 0);
    }
  }
  CHECK_THROWS_AS(row_range(w.view(), 4299, 2), ShapeError);
}

TEST_CASE("weight gradients agree with F64 sums and add up in tiles of 512 rows") {
  struct Case {
    std::int64_t rows, n, k;
    DType dy, x, dw;
  };
  const DType f32 = DType::F32, b16 = DType::BF16, f64 = DType::F64;
  for (const Case& c : {Case{1, 3, 5, f32, f32, f32}, Case{7, 70, 8, b16, b16, f32},
                        Case{513, 16, 90, f32, b16, f32}, Case{1025, 150, 16, b16, f32, f32},
                        Case{1300, 33, 47, f32, f32, f32}, Case{700, 40, 9, f64, f64, f64},
                        Case{600, 5, 2100, f32, f32, f32}}) {
    Dense dy = Dense::random(c.dy, c.rows, c.n, 1, 2), x = Dense::random(c.x, c.rows, c.k, 2, 1);
    const Dense before = Dense::random(c.dw, c.n, c.k, 3, 4);
    for (const Isa isa : isas()) {
      CAPTURE(name(isa));
      CAPTURE(c.rows);
      CAPTURE(c.n);
      Dense first = before;
      for (const int threads : {1, 2, 3, 5}) {
        ThreadPool pool(threads);
        Dense dw = before;
        run_gradient(isa, pool, c.rows, c.n, c.k, dy.view(), x.view(), 0.3, dw.output());
        if (threads == 1) first = dw;
        CHECK(copy_of(dw) == copy_of(first));
        Dense split = before;
        for (std::int64_t row = 0; row < c.rows; row += 512) {
          run_gradient(isa, pool, std::min<std::int64_t>(512, c.rows - row), c.n, c.k, dy.view(row),
                       x.view(row), 0.3, split.output());
        }
        CHECK(copy_of(split) == copy_of(first));
      }
      CHECK(first.gaps_intact());
      const double u = unit_roundoff(c.dw);
      std::int64_t bad = 0;
      for (std::int64_t i = 0; i < c.n; ++i) {
        for (std::int64_t j = 0; j < c.k; ++j) {
          const double start = before.get(i, j);
          double sum = start, size = std::fabs(start);
          for (std::int64_t t = 0; t < c.rows; ++t) {
            const double product = 0.3 * dy.get(t, i) * x.get(t, j);
            sum += product;
            size += std::fabs(product);
          }
          // A tile's chain, the tiles, and 0.3 as F32: at most 2 * 512 + 2 + tiles roundings.
          const auto roundings = static_cast<double>(2 * std::min<std::int64_t>(c.rows, 512) + 8);
          bad += !(std::fabs(first.get(i, j) - sum) <= roundings * u * size);
        }
      }
      CHECK(bad == 0);
    }
  }
}

TEST_CASE("what cannot be done is said") {
  ThreadPool pool(1);
  const Weight w({DType::F32, {4, 4}, {}}, 1);
  Dense x(DType::F32, 2, 4), y(DType::F32, 2, 4), wide(DType::F64, 2, 4);
  Dense half(DType::BF16, 2, 4);
  Scratch scratch(multiply_scratch_bytes(DType::F32, DType::F32, 2, 4, 4));
  const GemmContext context{Isa::Portable, pool, scratch.span()};
  const Term term{x.view(), w.view(), 1};
  const auto run = [&](const Term& t, Matrix to, Output output) {
    multiply(context, WeightUse::Transposed, 2, std::vector<Term>{t}, to, output);
  };
  CHECK_THROWS_AS(run(term, wide.output(), Output::Overwrite), Unsupported);
  CHECK_THROWS_AS(run(term, half.output(), Output::Accumulate), Unsupported);
  const GemmContext poor{Isa::Portable, pool, scratch.span().first(16)};
  CHECK_THROWS_AS(multiply(poor, WeightUse::Transposed, 2, std::vector<Term>{term}, y.output()),
                  Error);
  CHECK_THROWS_AS(stored_matrix({DType::I32, {2, 2}, {}}, w.data), Unsupported);
}

TEST_CASE("the thread pool runs every task once and passes exceptions on") {
  CHECK_THROWS_AS(ThreadPool(0), Error);
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (int round = 0; round < 300; ++round) {
      const std::int64_t tasks = round % 23;
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      std::vector<std::atomic<int>> busy(static_cast<std::size_t>(threads));
      std::atomic<int> shared = 0;
      pool.parallel_for(tasks, [&](std::int64_t task, int thread) {
        if (busy[static_cast<std::size_t>(thread)].fetch_add(1) != 0) ++shared;
        ++runs[static_cast<std::size_t>(task)];
        busy[static_cast<std::size_t>(thread)].fetch_sub(1);
      });
      CHECK(shared == 0);
      CHECK(std::all_of(runs.begin(), runs.end(), [](const auto& count) { return count == 1; }));
    }
    const auto fail = [](std::int64_t task, int) {
      if (task == 3) throw Error("task 3 fails");
    };
    CHECK_THROWS_WITH_AS(pool.parallel_for(50, fail), "task 3 fails", Error);
    std::atomic<int> after = 0;
    pool.parallel_for(4, [&](std::int64_t, int) { ++after; });
    CHECK(after == 4);
  }
}

TEST_CASE("scratch for many rows is enough for fewer") {
  for (const DType dtype : {DType::F64, DType::F32, DType::BF16}) {
    for (const std::int64_t inner : {64, 384, 49152}) {
      std::int64_t before = 0;
      for (std::int64_t rows = 1; rows <= 600; ++rows) {
        const std::int64_t now = cpu::multiply_scratch_bytes(dtype, dtype, rows, 576, inner);
        CHECK(now >= before);
        before = now;
      }
    }
  }
}
