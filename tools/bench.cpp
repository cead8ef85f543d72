#include "tools/bench.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>

#include "engine/error.h"
#include "engine/ops.h"
#include "engine/os.h"
#include "engine/philox.h"
#include "tools/finetune_setup.h"
#include "tools/text.h"
#include "tools/tiny_model.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<float> uniform_values(std::int64_t count, std::uint64_t stream) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const PhiloxBlock r = philox(stream, {static_cast<std::uint32_t>(i), 0, 0, 0});
    values[i] = 2 * uniform(r[0]) - 1;
  }
  return values;
}

// OpenBLAS's single-precision product, when the system has the library.
class OpenBlas {
 public:
  OpenBlas() : library_({"libopenblas.so.0", "libopenblas.so"}) {
    sgemm_ = reinterpret_cast<Sgemm>(library_.symbol("cblas_sgemm"));
    set_threads_ = reinterpret_cast<SetThreads>(library_.symbol("openblas_set_num_threads"));
  }
  bool available() const { return sgemm_ != nullptr && set_threads_ != nullptr; }
  void set_threads(int threads) const { set_threads_(threads); }
  // y[m, n] = x[m, k] w[n, k]^T
  void multiply(int m, int n, int k, const float* x, const float* w, float* y) const {
    constexpr int row_major = 101, plain = 111, transposed = 112;
    sgemm_(row_major, plain, transposed, m, n, k, 1.0f, x, k, w, k, 0.0f, y, n);
  }

 private:
  using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int,
                         float, float*, int);
  using SetThreads = void (*)(int);
  os::Library library_;
  Sgemm sgemm_ = nullptr;
  SetThreads set_threads_ = nullptr;
};

// One op as a program of its own, run on random data.
class OpBench {
 public:
  using Build = Tensor (*)(Graph&, const TensorType& x, const TensorType& w);
  OpBench(Backend& backend, DType compute, const TensorType& x, const TensorType& w, Build build)
      : runtime_(backend) {
    auto graph = std::make_unique<Graph>(compute);
    graph->keep(build(*graph, x, w));
    program_ = runtime_.add(std::move(graph));
    const auto values = [](const TensorType& type, std::uint64_t stream) {
      const std::vector<float> v = uniform_values(type.elements(), stream);
      return encode(type, std::vector<double>(v.begin(), v.end()));
    };
    weight_ = backend.allocate(bytes(w), "weight");
    backend.upload(weight_->data(), values(w, 1));
    runtime_.bind("w", weight_->data());
    runtime_.allocate();
    runtime_.write("x", values(x, 2));
  }
  double seconds() {
    const double begin = os::seconds();
    runtime_.run(program_);
    return os::seconds() - begin;
  }

 private:
  Runtime runtime_;
  int program_;
  std::unique_ptr<Buffer> weight_;
};

Tensor build_linear(Graph& graph, const TensorType& x, const TensorType& w) {
  return linear(graph.input("x", x), graph.weight("w", w));
}
Tensor build_linear_dx(Graph& graph, const TensorType& x, const TensorType& w) {
  return linear_dx(graph.input("x", x), graph.weight("w", w));
}

struct GemmShape {
  std::int64_t rows, out, in;
};

// Products with weights of each storage type against OpenBLAS on the same shape, interleaved so
// that both see the same machine.
void bench_gemm(const BenchRequest& r, Backend& backend, const GemmShape& shape,
                std::ostream& out) {
  const DType compute = compute_dtype(r.compute);
  const OpenBlas blas;
  const double flops = 2.0 * static_cast<double>(shape.rows * shape.out * shape.in);
  struct Case {
    std::string label;
    std::unique_ptr<OpBench> bench;
    std::vector<double> seconds;
  };
  std::vector<Case> cases;
  for (const DType type : {DType::F32, DType::BF16, DType::NF4, DType::Q8_0, DType::Q4_1}) {
    const TensorType w{type, {shape.out, shape.in}, {}};
    cases.push_back(
        {"linear " + std::string(name(type)),
         std::make_unique<OpBench>(
             backend, compute, TensorType{compute, {shape.rows, shape.in}, {}}, w, build_linear),
         {}});
  }
  cases.push_back({"linear_dx NF4",
                   std::make_unique<OpBench>(
                       backend, compute, TensorType{compute, {shape.rows, shape.out}, {}},
                       TensorType{DType::NF4, {shape.out, shape.in}, {}}, build_linear_dx),
                   {}});
  const std::vector<float> x = uniform_values(shape.rows * shape.in, 3);
  const std::vector<float> w = uniform_values(shape.out * shape.in, 4);
  std::vector<float> y(static_cast<std::size_t>(shape.rows * shape.out));
  std::vector<double> blas_seconds;
  for (int round = 0; round < 9; ++round) {
    if (blas.available()) {
      const double begin = os::seconds();
      blas.multiply(static_cast<int>(shape.rows), static_cast<int>(shape.out),
                    static_cast<int>(shape.in), x.data(), w.data(), y.data());
      blas_seconds.push_back(os::seconds() - begin);
    }
    for (Case& c : cases) c.seconds.push_back(c.bench->seconds());
  }
  const std::string size =
      format("%lld x %lld x %lld", static_cast<long long>(shape.rows),
             static_cast<long long>(shape.out), static_cast<long long>(shape.in));
  const double blas_rate = blas.available() ? flops / median(blas_seconds) : 0;
  const auto row = [&](const std::string& label, double rate) {
    if (r.json) {
      out << Json{{"op", label},
                  {"shape", size},
                  {"flops_per_s", rate},
                  {"openblas_share", blas_rate > 0 ? Json(rate / blas_rate) : Json()}}
                 .dump()
          << "\n";
      return;
    }
    out << format("%-20s %-20s %8.1f GFLOP/s", size.c_str(), label.c_str(), rate / 1e9);
    if (blas_rate > 0) out << format("  %5.1f %% of OpenBLAS", 100 * rate / blas_rate);
    out << "\n" << std::flush;
  };
  if (blas.available()) row("OpenBLAS sgemm", blas_rate);
  for (const Case& c : cases) row(c.label, flops / median(c.seconds));
}

int bench_ops(const BenchRequest& r, std::ostream& out, std::ostream& log) {
  const int threads = r.threads > 0 ? r.threads : os::physical_cores();
  const auto backend = open_backend(r.backend, threads, 0);
  const OpenBlas blas;
  if (blas.available()) {
    blas.set_threads(threads);
  } else {
    log << "libopenblas is not installed: no comparison\n";
  }
  log << backend->info().description << ", " << r.compute << ", medians of 9\n";
  for (const GemmShape& shape : {GemmShape{512, 2048, 2048}, GemmShape{1024, 2048, 2048},
                                 GemmShape{512, 4096, 4096}, GemmShape{1024, 1536, 576}}) {
    bench_gemm(r, *backend, shape, out);
  }
  return 0;
}

// The F32 product at the size of the steps' largest linear: what the step's FLOP rate is held
// against when OpenBLAS is not installed.
double gemm_rate(Backend& backend, const BenchRequest& r, std::int64_t rows, std::string& what) {
  const GemmShape shape{std::min<std::int64_t>(rows, 1024), 2048, 2048};
  const double flops = 2.0 * static_cast<double>(shape.rows * shape.out * shape.in);
  const OpenBlas blas;
  std::vector<double> seconds;
  if (blas.available()) {
    what = "OpenBLAS sgemm";
    blas.set_threads(r.threads > 0 ? r.threads : os::physical_cores());
    const std::vector<float> x = uniform_values(shape.rows * shape.in, 3);
    const std::vector<float> w = uniform_values(shape.out * shape.in, 4);
    std::vector<float> y(static_cast<std::size_t>(shape.rows * shape.out));
    for (int i = 0; i < 9; ++i) {
      const double begin = os::seconds();
      blas.multiply(static_cast<int>(shape.rows), static_cast<int>(shape.out),
                    static_cast<int>(shape.in), x.data(), w.data(), y.data());
      seconds.push_back(os::seconds() - begin);
    }
  } else {
    what = "linear F32";
    OpBench bench(backend, DType::F32, {DType::F32, {shape.rows, shape.in}, {}},
                  {DType::F32, {shape.out, shape.in}, {}}, build_linear);
    for (int i = 0; i < 9; ++i) seconds.push_back(bench.seconds());
  }
  return flops / median(seconds);
}

// 4 FLOP per frozen weight and token (forward, gradient of the input), 6 per trained one, 2 more
// for what block recompute repeats: the linears of the blocks but ffn_down, whose result no
// gradient reads. Embedding rows are looked up, not multiplied; the head counts.
double step_flops(const FinetuneSetup& s, std::int64_t tokens) {
  double sum = 0;
  const auto count = [&](const std::string& name, std::int64_t elements, double flops) {
    const bool repeated = s.fit.storage == "block" && name.starts_with("blk.") &&
                          name.find(".ffn_down.") == std::string::npos;
    sum += (repeated ? flops + 2 : flops) * static_cast<double>(elements);
  };
  for (const auto& [name, type] : s.loaded->types()) {
    if (type.shape.rank() < 2) continue;
    if (name == "token_embd.weight" && !s.loaded->config().tied_embeddings) continue;
    count(name, type.elements(), s.trains_weights() ? 6 : 4);
  }
  if (!s.trains_weights()) {
    for (const ParameterSegment& p : s.trainer->parameters().segments()) {
      count(p.name, p.elements(), 6);
    }
  }
  return static_cast<double>(tokens) * sum;
}

int bench_train(const BenchRequest& r, std::ostream& out, std::ostream& log) {
  FinetuneSetup s;
  s.recipe.model = r.model;
  s.recipe.method = r.method;
  s.recipe.rank = r.rank;
  s.recipe.alpha = 2 * static_cast<double>(r.rank);
  s.recipe.storage = r.storage;
  s.recipe.compute = r.compute;
  s.recipe.threads = r.threads > 0 ? r.threads : os::physical_cores();
  s.recipe.backend = r.backend;
  open_setup_model(s);
  const std::int64_t rows = round_up(r.batch * r.sequence, 256);
  s.buckets = {rows};
  plan_model(s, 0);
  reserve_and_read(s, {});
  if (!s.trains_weights()) initialize_adapter(*s.trainer, 0);
  Microbatch batch;
  for (std::int64_t i = 0; i < rows; ++i) {
    const PhiloxBlock random = philox(7, {static_cast<std::uint32_t>(i), 0, 0, 0});
    const auto vocab = static_cast<std::uint32_t>(s.loaded->config().vocab);
    batch.tokens.push_back(static_cast<std::int32_t>(random[0] % vocab));
    batch.labels.push_back(static_cast<std::int32_t>(random[1] % vocab));
    batch.positions.push_back(static_cast<std::int32_t>(i % r.sequence));
    batch.span_begin.push_back(static_cast<std::int32_t>(i / r.sequence * r.sequence));
    batch.ordinal.push_back(static_cast<std::int32_t>(i));
  }
  std::vector<double> seconds;
  std::map<std::string, std::pair<double, int>> by_op;  // seconds and calls of one micro
  const auto count = [&](std::int32_t, const OpCall& call, double time) {
    auto& [sum, calls] = by_op[std::string(op_def(call.node->op).name)];
    sum += time;
    ++calls;
  };
  std::string what;
  double peak = 0;
  for (std::int64_t step = 0; step < r.steps + 1; ++step) {
    const double begin = os::seconds();
    const bool last = step == r.steps;
    s.trainer->micro(batch, last && r.ops ? Executable::Hook(count) : Executable::Hook());
    s.trainer->apply(1e-4);
    if (step > 0) seconds.push_back(os::seconds() - begin);
    log << "." << std::flush;
  }
  peak = gemm_rate(*s.backend, r, rows, what);
  log << "\n";
  const double time = median(seconds), flops = step_flops(s, rows);
  const Json row = {{"tokens_per_s", static_cast<double>(rows) / time},
                    {"seconds", time},
                    {"peak_bytes", s.backend->allocated_bytes()},
                    {"flops", flops},
                    {"flops_per_s", flops / time},
                    {"peak_share", flops / time / peak}};
  if (r.json) {
    out << row.dump() << "\n";
    return 0;
  }
  out << format("%s, %lld x %lld, rank %lld, %s, %s\n", r.model.c_str(),
                static_cast<long long>(r.batch), static_cast<long long>(r.sequence),
                static_cast<long long>(r.rank), s.fit.storage.c_str(),
                s.backend->info().description.c_str());
  out << format("%.0f tokens/s, %.3f s a step (median of %lld), %s allocated, process peak %s\n",
                static_cast<double>(rows) / time, time, static_cast<long long>(r.steps),
                size_text(s.backend->allocated_bytes()).c_str(),
                size_text(os::peak_resident_bytes()).c_str());
  for (const auto& [name, sum] : by_op) {
    out << format("  %-28s %4d calls %9.1f ms %5.1f %%\n", name.c_str(), sum.second,
                  1e3 * sum.first, 100 * sum.first / time);
  }
  out << format("%.1f GFLOP/s, %.1f %% of %s in this run (%.1f GFLOP/s)\n", flops / time / 1e9,
                100 * flops / time / peak, what.c_str(), peak / 1e9);
  return 0;
}

int bench_decode(const BenchRequest& r, std::ostream& out, std::ostream&) {
  FinetuneSetup s;
  s.recipe.model = r.model;
  s.recipe.method = r.method;
  s.recipe.compute = r.compute;
  s.recipe.threads = r.threads > 0 ? r.threads : os::physical_cores();
  s.recipe.backend = r.backend;
  s.recipe.alpha = 32;
  s.recipe.storage = "store";
  open_setup_model(s);
  plan_model(s, r.prompt + r.tokens);
  reserve_and_read(s, {});
  std::vector<std::int32_t> prompt;
  for (std::int64_t i = 0; i < r.prompt; ++i) {
    prompt.push_back(static_cast<std::int32_t>(i % s.loaded->config().vocab));
  }
  double begin = os::seconds();
  s.decoder->append(prompt);
  const double prompt_seconds = os::seconds() - begin;
  std::vector<double> seconds;
  for (std::int64_t i = 0; i < r.tokens; ++i) {
    begin = os::seconds();
    s.decoder->append({prompt.data(), 1});
    seconds.push_back(os::seconds() - begin);
  }
  const double prompt_rate = static_cast<double>(r.prompt) / prompt_seconds;
  const double rate = 1 / median(seconds);
  if (r.json) {
    out << Json{{"prompt_tokens_per_s", prompt_rate},
                {"tokens_per_s", rate},
                {"seconds", median(seconds)},
                {"peak_bytes", s.backend->allocated_bytes()}}
               .dump()
        << "\n";
  } else {
    out << format("prompt %.0f tokens/s, decode %.1f tokens/s (median of %lld)\n", prompt_rate,
                  rate, static_cast<long long>(r.tokens));
  }
  return 0;
}

}  // namespace

void add_bench_flags(CLI::App& command, BenchRequest& r) {
  command.add_option("WHAT", r.what, "ops | train | decode")
      ->required()
      ->check(CLI::IsMember({"ops", "train", "decode"}));
  command.add_option("--model,-m", r.model,
                     "model for train and decode; random:CONFIG.json will do");
  command.add_option("--method", r.method)
      ->check(CLI::IsMember({"qlora", "lora", "full"}))
      ->capture_default_str();
  command.add_option("--batch", r.batch, "rows of --seq tokens a step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--seq", r.sequence)->check(CLI::Range(2, 1 << 20))->capture_default_str();
  command.add_option("--rank", r.rank)->check(CLI::Range(1, 4096))->capture_default_str();
  command.add_option("--steps", r.steps, "steps to time")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--storage", r.storage)
      ->check(CLI::IsMember({"store", "cheap", "block"}))
      ->capture_default_str();
  command.add_option("--compute", r.compute)
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  command.add_option("--backend,--device", r.backend)->capture_default_str();
  command.add_option("--prompt", r.prompt, "prompt tokens of decode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--tokens", r.tokens, "tokens to decode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--threads,-t", r.threads, "CPU threads; default: all cores");
  command.add_flag("--ops", r.ops, "train: time per op of the last step");
  command.add_flag("--json", r.json, "JSON lines");
}

int bench_command(const BenchRequest& r, std::ostream& out, std::ostream& log) {
  if (r.what == "ops") return bench_ops(r, out, log);
  if (r.model.empty()) throw Error("bench " + r.what + " needs --model");
  return r.what == "train" ? bench_train(r, out, log) : bench_decode(r, out, log);
}

}  // namespace nibble
