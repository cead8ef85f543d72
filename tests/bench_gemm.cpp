// Rates of the CPU backend's products against OpenBLAS sgemm, in one run: the candidates take turns
// round by round and the medians are compared, so that a busy machine slows all alike.
//
//   bench-gemm [threads...]     default 1 and 2; prints GFLOP/s and the share of OpenBLAS's
//
// Columns: y = x W^T from each storage format, dx = dy W from NF4, and dW += dy^T x.
#include <cblas.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/gemm.h"
#include "engine/quantize.h"

using namespace nibble;
using namespace nibble::cpu;

namespace {

using Memory = std::unique_ptr<std::byte, decltype(&std::free)>;

Memory allocate(std::int64_t size) {
  return {static_cast<std::byte*>(
              std::aligned_alloc(64, static_cast<std::size_t>(round_up(size + 64, 64)))),
          std::free};
}

struct Candidate {
  std::string name;
  std::function<void()> run;
  std::vector<double> seconds;
  double median() {
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }
};

double seconds_on(int threads) {
  if (threads == 1) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

void fill(float* values, std::int64_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (std::int64_t i = 0; i < count; ++i) values[i] = uniform(engine);
}

void compare(std::int64_t rows, std::int64_t n, std::int64_t k, int threads) {
  std::vector<float> x(static_cast<std::size_t>(rows * k)), y(static_cast<std::size_t>(rows * n));
  std::vector<float> dense(static_cast<std::size_t>(n * k)), dw(dense.size()), dx(x.size());
  fill(x.data(), rows * k, 1);
  fill(dense.data(), n * k, 2);
  fill(y.data(), rows * n, 3);
  std::vector<float> dy = y;
  ThreadPool pool(threads);
  openblas_set_num_threads(threads);
  const Isa isa = best_isa();
  const std::int64_t scratch_bytes =
      std::max({multiply_scratch_bytes(DType::F32, DType::F32, rows, n, k),
                multiply_scratch_bytes(DType::F32, DType::F32, rows, k, n),
                gradient_scratch_bytes(DType::F32, rows, n, k)});
  const Memory scratch = allocate(scratch_bytes);
  const GemmContext context{isa, pool, {scratch.get(), static_cast<std::size_t>(scratch_bytes)}};

  std::vector<Candidate> candidates;
  const auto m = static_cast<blasint>(rows), bn = static_cast<blasint>(n),
             bk = static_cast<blasint>(k);
  candidates.push_back({"sgemm",
                        [&] {
                          cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, bn, bk, 1,
                                      x.data(), bk, dense.data(), bk, 0, y.data(), bn);
                        },
                        {}});
  std::vector<Memory> weights;
  const auto forward = [&](DType dtype) {
    const TensorType type{dtype, {n, k}, {}};
    weights.push_back(allocate(bytes(type)));
    std::byte* data = weights.back().get();
    if (can_quantize(dtype)) {
      quantize(type, dense, {data, static_cast<std::size_t>(bytes(type))});
    } else {
      std::fill_n(data, bytes(type), std::byte{0x11});
    }
    const StoredMatrix w = stored_matrix(type, data);
    candidates.push_back(
        {std::string(name(dtype)),
         [&, w] {
           const Term term{{x.data(), DType::F32, k}, w, 1};
           multiply(context, WeightUse::Transposed, rows, {&term, 1}, {y.data(), DType::F32, n});
         },
         {}});
    return w;
  };
  forward(DType::F32);
  const StoredMatrix nf4 = forward(DType::NF4);
  if (k % 32 == 0) {
    forward(DType::Q8_0);
    forward(DType::Q4_1);
  }
  candidates.push_back(
      {"NF4 dx",
       [&] {
         const Term term{{dy.data(), DType::F32, n}, nf4, 1};
         multiply(context, WeightUse::Plain, rows, {&term, 1}, {dx.data(), DType::F32, k});
       },
       {}});
  candidates.push_back({"dW",
                        [&] {
                          accumulate_gradient(context, rows, n, k, {dy.data(), DType::F32, n},
                                              {x.data(), DType::F32, k}, 1,
                                              {dw.data(), DType::F32, k});
                        },
                        {}});

  const double flop = 2.0 * static_cast<double>(rows * n) * static_cast<double>(k);
  const int rounds = flop > 1e9 ? 15 : 41;
  for (int round = 0; round <= rounds; ++round) {
    for (Candidate& c : candidates) {
      const double start = seconds_on(threads);
      c.run();
      const double took = seconds_on(threads) - start;
      if (round > 0) c.seconds.push_back(took);  // the first round warms up
    }
  }
  std::printf("%5ld x %5ld x %5ld, %d threads, %s:", static_cast<long>(rows), static_cast<long>(n),
              static_cast<long>(k), threads, name(isa));
  const double base = candidates[0].median();
  for (Candidate& c : candidates) {
    std::printf("  %s %.1f (%.0f%%)", c.name.c_str(), flop / c.median() * 1e-9,
                100 * base / c.median());
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<int> threads;
  for (int i = 1; i < count; ++i) threads.push_back(std::max(std::atoi(arguments[i]), 1));
  if (threads.empty()) threads = {1, 2};
  for (const int t : threads) {
    compare(512, 2048, 2048, t);
    compare(1024, 2048, 2048, t);
    compare(1024, 576, 1536, t);
    compare(1024, 16, 2048, t);
    compare(1024, 2048, 16, t);
    compare(1, 2048, 2048, t);
  }
}
