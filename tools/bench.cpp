#include "tools/bench.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <ostream>

#include "engine/error.h"
#include "engine/os.h"
#include "tools/bench_parts.h"
#include "tools/cards.h"
#include "tools/open_blas.h"
#include "tools/text.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

struct GemmShape {
  std::int64_t rows, out, in;
};

// Products with weights of each storage type against a dense one of the same shape, interleaved so
// that all see the same machine: OpenBLAS on a CPU, weights in BF16 on a GPU.
void bench_gemm(const BenchRequest& r, Backend& backend, const GemmShape& shape,
                std::ostream& out) {
  const bool cuda = is_cuda(backend.info());
  const DType compute = compute_dtype(resolve_compute(r.compute, backend.info()));
  const OpenBlas blas;
  const double flops = 2.0 * static_cast<double>(shape.rows * shape.out * shape.in);
  struct Case {
    std::string label;
    std::unique_ptr<OpBench> bench;
    std::vector<double> seconds;
  };
  std::vector<Case> cases;
  const auto add = [&](const std::string& label, DType type, std::int64_t channels,
                       OpBench::Build build) {
    cases.push_back({label + " " + std::string(name(type)),
                     std::make_unique<OpBench>(backend, compute,
                                               TensorType{compute, {shape.rows, channels}, {}},
                                               TensorType{type, {shape.out, shape.in}, {}}, build),
                     {}});
  };
  for (const DType type : {DType::F32, DType::BF16, DType::NF4, DType::Q8_0, DType::Q4_1}) {
    if (cuda && type == DType::F32) continue;
    add("linear", type, shape.in, build_linear);
  }
  if (cuda) add("linear_dx", DType::BF16, shape.out, build_linear_dx);
  add("linear_dx", DType::NF4, shape.out, build_linear_dx);
  const std::vector<float> x = uniform_values(cuda ? 0 : shape.rows * shape.in, 3);
  const std::vector<float> w = uniform_values(cuda ? 0 : shape.out * shape.in, 4);
  std::vector<float> y(cuda ? 0 : static_cast<std::size_t>(shape.rows * shape.out));
  std::vector<double> dense_seconds;
  for (int round = 0; round < 9; ++round) {
    if (!cuda && blas.available()) {
      const double begin = os::seconds();
      blas.multiply(static_cast<int>(shape.rows), static_cast<int>(shape.out),
                    static_cast<int>(shape.in), x.data(), w.data(), y.data());
      dense_seconds.push_back(os::seconds() - begin);
    }
    for (Case& c : cases) c.seconds.push_back(c.bench->seconds(cuda ? 20 : 1));
  }
  if (cuda) dense_seconds = cases.front().seconds;
  const std::string dense = cuda ? "linear BF16" : "OpenBLAS";
  const std::string size =
      format("%lld x %lld x %lld", static_cast<long long>(shape.rows),
             static_cast<long long>(shape.out), static_cast<long long>(shape.in));
  const double dense_rate = dense_seconds.empty() ? 0 : flops / median(dense_seconds);
  const auto row = [&](const std::string& label, double rate) {
    if (r.json) {
      out << Json{{"op", label},
                  {"shape", size},
                  {"flops_per_s", rate},
                  {cuda ? "dense_share" : "openblas_share",
                   dense_rate > 0 ? Json(rate / dense_rate) : Json()}}
                 .dump()
          << "\n";
      return;
    }
    out << format("%-20s %-20s %8.1f GFLOP/s", size.c_str(), label.c_str(), rate / 1e9);
    if (dense_rate > 0) out << format("  %5.1f %% of %s", 100 * rate / dense_rate, dense.c_str());
    out << "\n" << std::flush;
  };
  if (!cuda && blas.available()) row("OpenBLAS sgemm", dense_rate);
  for (const Case& c : cases) row(c.label, flops / median(c.seconds));
}

int bench_ops(const BenchRequest& r, std::ostream& out, std::ostream& log) {
  const auto backend = open_backend(r.where, 0);
  const OpenBlas blas;
  const bool cuda = is_cuda(backend->info());
  if (!cuda && blas.available()) {
    blas.set_threads(r.where.threads > 0 ? r.where.threads : os::physical_cores());
  } else if (!cuda) {
    log << "libopenblas is not installed: no comparison\n";
  }
  log << backend->info().description << ", " << resolve_compute(r.compute, backend->info())
      << ", medians of 9\n";
  std::vector<GemmShape> shapes = {
      {512, 2048, 2048}, {1024, 2048, 2048}, {512, 4096, 4096}, {1024, 1536, 576}};
  if (cuda) {
    shapes = {{1, 4096, 4096},    {1, 11008, 4096},    {512, 4096, 4096},
              {4096, 4096, 4096}, {4096, 14336, 4096}, {4096, 4096, 14336}};
  }
  for (const GemmShape& shape : shapes) bench_gemm(r, *backend, shape, out);
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
  command.add_option("--rank", r.rank, "of the adapter; default 16 for train, none for decode")
      ->check(CLI::Range(0, 4096));
  command.add_option("--steps", r.steps, "steps to time")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--storage", r.storage, "as for finetune")->capture_default_str();
  command.add_option("--compute", r.compute, "f32 | bf16; default f32 on a CPU, bf16 on a GPU")
      ->check(CLI::IsMember({"f32", "bf16"}));
  add_backend_flags(command, r.where);
  command.add_option("--memory,--vram", r.memory,
                     "most bytes that train may take, as for finetune");
  command.add_option("--host-memory", r.host_memory, "most bytes that it may page-lock");
  command.add_option("--card", r.card, "as for finetune: " + card_list())
      ->check(CLI::IsMember(card_names()));
  command.add_option("--micro-batches", r.micro_batches, "of --batch rows, a step")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--dropout", r.dropout)->check(CLI::Range(0.0, 0.99))->capture_default_str();
  command
      .add_option("--peak-seconds", r.peak_seconds,
                  "how long the product runs that train's share of the peak is held against (GPU)")
      ->check(CLI::Range(0.0, 600.0))
      ->capture_default_str();
  command.add_option("--prompt", r.prompt, "prompt tokens of decode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_option("--tokens", r.tokens, "tokens to decode")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command.add_flag("--ops", r.ops,
                   "every kernel of a step, or of a token and the prompt: time, bytes, FLOP/s, "
                   "share of the peak");
  command.add_flag("--json", r.json, "JSON lines");
}

int bench_command(const BenchRequest& r, std::ostream& out, std::ostream& log) {
  if (r.what == "ops") return bench_ops(r, out, log);
  if (r.model.empty()) throw Error("bench " + r.what + " needs --model");
  return r.what == "train" ? bench_train(r, out, log) : bench_decode(r, out, log);
}

}  // namespace nibble
