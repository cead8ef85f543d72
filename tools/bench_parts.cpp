#include "tools/bench_parts.h"

#include "engine/ops.h"
#include "tools/backend.h"
#include "tools/open_blas.h"

namespace nibble {

std::vector<float> uniform_values(std::int64_t count, std::uint64_t stream) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const PhiloxBlock r = philox(stream, {static_cast<std::uint32_t>(i), 0, 0, 0});
    values[i] = 2 * uniform(r[0]) - 1;
  }
  return values;
}

OpBench::OpBench(Backend& backend, DType compute, const TensorType& x, const TensorType& w,
                 Build build)
    : runtime_(backend) {
  auto graph = std::make_unique<Graph>(compute);
  const Tensor result = build(*graph, x, w);
  graph->keep(result);
  result_ = {result.node, result.output};
  program_ = runtime_.add(std::move(graph));
  const auto values = [](const TensorType& type, std::uint64_t stream) {
    const std::vector<float> v = uniform_values(type.elements(), stream);
    return encode(type, std::vector<double>(v.begin(), v.end()));
  };
  if (w.elements() > 0) {
    weight_ = backend.allocate(bytes(w), "weight");
    backend.upload(weight_->data(), values(w, 1));
    runtime_.bind("w", weight_->data());
  }
  runtime_.allocate();
  runtime_.write("x", values(x, 2));
  for (int i = 0; i < 2; ++i) runtime_.run(program_);  // a GPU records the program meanwhile
}

double OpBench::seconds(int repeats) {
  std::array<std::byte, 2> first;
  runtime_.read(program_, result_, first);
  const double begin = os::seconds();
  for (int i = 0; i < repeats; ++i) runtime_.run(program_);
  runtime_.read(program_, result_, first);
  return (os::seconds() - begin) / repeats;
}

Tensor build_linear(Graph& graph, const TensorType& x, const TensorType& w) {
  return linear(graph.input("x", x), graph.weight("w", w));
}
Tensor build_linear_dx(Graph& graph, const TensorType& x, const TensorType& w) {
  return linear_dx(graph.input("x", x), graph.weight("w", w));
}

namespace {

Tensor build_copy(Graph& graph, const TensorType& x, const TensorType&) {
  return scale(graph.input("x", x), fill(graph, {DType::F32, {1}, {}}, 1.0));
}

// Bytes a second of copies from and to host memory that run side by side: `in` and `out` of them.
double host_copy_rate(Backend& backend, int in, int out) {
  const TensorType page{DType::F32, {16 << 20}, {}};
  auto graph = std::make_unique<Graph>(DType::F32);
  const Tensor x = fill(*graph, page, 1.0);
  for (int i = 0; i < std::max(in, out); ++i) {
    const std::string number = std::to_string(i);
    if (i < out) page_out(graph->page("out." + number, page), x);
    if (i < in) graph->keep(page_in(graph->page("in." + number, page)));
  }
  Runtime runtime(backend);
  const int program = runtime.add(std::move(graph));
  runtime.allocate();
  runtime.prepare();
  std::vector<double> seconds;
  for (int i = 0; i < 7; ++i) {
    runtime.run(program);
    seconds.push_back(runtime.seconds(program));
  }
  return static_cast<double>(runtime.plan(program).copied_bytes) / median(seconds);
}

MachineRates gpu_rates(Backend& backend, double seconds) {
  constexpr std::int64_t kSide = 8192;
  constexpr double kFlops = 2.0 * kSide * kSide * kSide;
  MachineRates rates;
  rates.what = "a BF16 product of 8192^3";
  {
    OpBench product(backend, DType::BF16, {DType::BF16, {kSide, kSide}, {}},
                    {DType::BF16, {kSide, kSide}, {}}, build_linear);
    const double begin = os::seconds();
    do {
      rates.flops_per_s = kFlops / product.seconds(50);
    } while (os::seconds() - begin < seconds);
  }
  const TensorType half_gib{DType::BF16, {16384, 16384}, {}};
  OpBench copy(backend, DType::BF16, half_gib, {DType::BF16, {0}, {}}, build_copy);
  rates.bytes_per_s = 2.0 * static_cast<double>(bytes(half_gib)) / copy.seconds(20);
  constexpr int kCopies = 24;  // of 64 MiB: what starts and ends them does not count
  rates.host_in_bytes_per_s = host_copy_rate(backend, kCopies, 0);
  rates.host_out_bytes_per_s = host_copy_rate(backend, 0, kCopies);
  rates.host_both_bytes_per_s = host_copy_rate(backend, kCopies, kCopies);
  return rates;
}

MachineRates cpu_rates(Backend& backend, int threads, std::int64_t rows) {
  const std::int64_t m = std::min<std::int64_t>(rows, 1024), n = 2048, k = 2048;
  const double flops = 2.0 * static_cast<double>(m * n * k);
  MachineRates rates;
  const OpenBlas blas;
  std::vector<double> seconds;
  if (blas.available()) {
    rates.what = "OpenBLAS sgemm";
    blas.set_threads(threads);
    const std::vector<float> x = uniform_values(m * k, 3), w = uniform_values(n * k, 4);
    std::vector<float> y(static_cast<std::size_t>(m * n));
    for (int i = 0; i < 9; ++i) {
      const double begin = os::seconds();
      blas.multiply(static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), x.data(),
                    w.data(), y.data());
      seconds.push_back(os::seconds() - begin);
    }
  } else {
    rates.what = "linear F32";
    OpBench bench(backend, DType::F32, {DType::F32, {m, k}, {}}, {DType::F32, {n, k}, {}},
                  build_linear);
    for (int i = 0; i < 9; ++i) seconds.push_back(bench.seconds(1));
  }
  rates.flops_per_s = flops / median(seconds);
  const TensorType x{DType::F32, {4096, 8192}, {}};
  OpBench copy(backend, DType::F32, x, {DType::F32, {0}, {}}, build_copy);
  rates.bytes_per_s = 2.0 * static_cast<double>(bytes(x)) / copy.seconds(3);
  return rates;
}

}  // namespace

MachineRates machine_rates(Backend& backend, int threads, std::int64_t rows, double seconds) {
  if (is_cuda(backend.info())) return gpu_rates(backend, seconds);
  return cpu_rates(backend, threads, rows);
}

}  // namespace nibble
