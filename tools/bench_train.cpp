// `nibble bench train` and `nibble bench decode`.
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>

#include "backends/cuda/load.h"
#include "engine/cost.h"
#include "engine/error.h"
#include "tools/bench.h"
#include "tools/bench_parts.h"
#include "tools/finetune_setup.h"
#include "tools/text.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

// 4 FLOP per frozen weight and token (forward, gradient of the input), 6 per trained one, 2 more
// for what block recompute repeats: the linears of the blocks but ffn_down, whose result no
// gradient reads. Embedding rows are looked up, not multiplied; the head counts.
double step_flops(const FinetuneSetup& s, std::int64_t tokens) {
  double sum = 0;
  const StoragePolicy storage = StoragePolicy::parse(s.fit.storage).value();
  const auto count = [&](const std::string& name, std::int64_t elements, double flops) {
    const bool repeated = name.starts_with("blk.") &&
                          storage.of(std::stoll(name.substr(4))) == Rung::block &&
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

Microbatch random_batch(std::int64_t rows, std::int64_t sequence, std::int64_t vocab) {
  Microbatch batch;
  for (std::int64_t i = 0; i < rows; ++i) {
    const PhiloxBlock random = philox(7, {static_cast<std::uint32_t>(i), 0, 0, 0});
    const auto entries = static_cast<std::uint32_t>(vocab);
    batch.tokens.push_back(static_cast<std::int32_t>(random[0] % entries));
    batch.labels.push_back(static_cast<std::int32_t>(random[1] % entries));
    batch.positions.push_back(static_cast<std::int32_t>(i % sequence));
    batch.span_begin.push_back(static_cast<std::int32_t>(i / sequence * sequence));
    batch.ordinal.push_back(static_cast<std::int32_t>(i));
  }
  return batch;
}

// What one step spent on one kind of call: the same op with the same weight and width.
struct KernelLine {
  int calls = 0;
  double seconds = 0;
  OpCost cost;
};

class KernelTable {
 public:
  explicit KernelTable(double average_span) : average_span_(average_span) {}

  Executable::Hook hook() {
    return [this](std::int32_t, const OpCall& call, double seconds) {
      // Steps that run as one kernel come one after the other, the time with the last.
      const OpCost cost = op_cost(call, average_span_);
      group_.flops += cost.flops;
      group_.bytes += cost.bytes;
      if (seconds == 0) {
        group_label_ += std::string(op_def(call.node->op).name) + " + ";
        return;
      }
      KernelLine& line = lines_[group_label_ + label(call)];
      ++line.calls;
      line.seconds += seconds;
      line.cost.flops += group_.flops;
      line.cost.bytes += group_.bytes;
      group_ = {};
      group_label_.clear();
    };
  }

  double seconds() const {
    double sum = 0;
    for (const auto& [name, line] : lines_) sum += line.seconds;
    return sum;
  }

  // The time in which the machine could do it, as a share of what it took.
  static double share(const KernelLine& line, const MachineRates& peak) {
    return std::max(line.cost.flops / peak.flops_per_s, line.cost.bytes / peak.bytes_per_s) /
           line.seconds;
  }

  std::vector<std::pair<std::string, KernelLine>> by_time() const {
    std::vector<std::pair<std::string, KernelLine>> sorted(lines_.begin(), lines_.end());
    std::sort(sorted.begin(), sorted.end(),
              [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
    return sorted;
  }

  void print(const MachineRates& peak, std::ostream& out) const {
    out << format("  %-44s %5s %9s %6s %8s %8s %8s %7s\n", "kernel", "calls", "ms", "share", "GB",
                  "GB/s", "TFLOP/s", "of peak");
    const double all = seconds();
    for (const auto& [name, line] : by_time()) {
      out << format("  %-44s %5d %9.3f %5.1f%% %8.2f %8.0f %8.1f %6.1f%%\n", name.c_str(),
                    line.calls, 1e3 * line.seconds, 100 * line.seconds / all,
                    1e-9 * line.cost.bytes, 1e-9 * line.cost.bytes / line.seconds,
                    1e-12 * line.cost.flops / line.seconds, 100 * share(line, peak));
    }
  }

  Json json(const MachineRates& peak) const {
    Json rows = Json::array();
    for (const auto& [name, line] : by_time()) {
      rows.push_back({{"kernel", name},
                      {"calls", line.calls},
                      {"seconds", line.seconds},
                      {"bytes", line.cost.bytes},
                      {"flops", line.cost.flops},
                      {"peak_share", share(line, peak)}});
    }
    return rows;
  }

 private:
  static std::string label(const OpCall& call) {
    std::string text(op_def(call.node->op).name);
    for (int i = 0; i < call.n_inputs; ++i) {
      const TensorType& type = call.in_types[static_cast<std::size_t>(i)];
      if (i == 1 && type.shape.rank() == 2 && text.starts_with("l")) return text + " " + type.str();
    }
    if (call.n_outputs > 0) text += " " + call.out_types[0].str();
    return text;
  }
  double average_span_;
  std::map<std::string, KernelLine> lines_;
  OpCost group_;  // of the steps since the last one with a time
  std::string group_label_;
};

FinetuneSetup bench_setup(const BenchRequest& r, std::int64_t rank) {
  FinetuneSetup s;
  s.recipe.model = r.model;
  s.recipe.method = r.method;
  s.recipe.rank = std::max<std::int64_t>(rank, 1);
  s.recipe.alpha = 2 * static_cast<double>(s.recipe.rank);
  s.without_adapter = rank == 0;
  s.recipe.dropout = r.dropout;
  s.recipe.storage = r.storage;
  s.recipe.compute = r.compute;
  s.recipe.memory = r.memory;
  s.recipe.host_memory = r.host_memory;
  s.recipe.card = r.card;
  s.recipe.where = r.where;
  s.repeat_first_block = r.model.starts_with("random:");
  s.evaluates = false;
  open_setup_model(s);
  return s;
}

// The rates are measured on an empty machine, right after what was timed.
MachineRates peak_after(FinetuneSetup& s, const BenchRequest& r, std::int64_t rows) {
  s.release();
  const int threads = r.where.threads > 0 ? r.where.threads : os::physical_cores();
  return machine_rates(*open_backend(r.where, 0), threads, rows, r.peak_seconds);
}

}  // namespace

int bench_train(const BenchRequest& r, std::ostream& out, std::ostream& log) {
  const double start = os::seconds();
  const std::int64_t rank = r.rank >= 0 ? r.rank : 16;
  if (rank == 0) throw Error("bench train needs an adapter: --rank 1 or more");
  FinetuneSetup s = bench_setup(r, rank);
  const std::int64_t rows = round_up(r.batch * r.sequence, 256);
  const std::int64_t step_rows = rows * r.micro_batches;
  s.buckets = {rows};
  s.work.rows_per_step = s.work.tokens_per_step = static_cast<double>(step_rows);
  s.work.average_span = static_cast<double>(r.sequence);
  plan_model(s, 0);
  if (!s.fit.fits()) {
    print_fit(s.fit, log);
    throw Error("the step does not fit");
  }
  const double planned = os::seconds();
  reserve(s);
  read_weights(s, {});
  if (!s.trains_weights()) initialize_adapter(*s.trainer, 0);
  const double loaded = os::seconds();
  const Microbatch batch = random_batch(rows, r.sequence, s.loaded->config().vocab);
  const bool cuda = is_cuda(s.backend->info());
  const int device = device_number(s.backend->info());
  KernelTable table(static_cast<double>(r.sequence));
  std::vector<double> seconds, apply_seconds;
  StepResult result;
  const auto step = [&](const Executable::Hook& hook) {
    const double begin = os::seconds();
    for (std::int64_t i = 0; i < r.micro_batches; ++i) s.trainer->micro(batch, hook);
    result = s.trainer->apply(1e-4, hook);
    if (!std::isfinite(result.loss)) throw Error("the loss is not a number");
    return os::seconds() - begin;
  };
  step({});
  const double first_loss = os::seconds();
  if (cuda) step({});  // records the programs
  const cuda::Counters before = cuda ? cuda::read_cuda_counters(device) : cuda::Counters{};
  const double begin = os::seconds();
  for (std::int64_t i = 0; i < r.steps; ++i) {
    seconds.push_back(step({}));
    apply_seconds.push_back(result.apply_seconds);
  }
  const StepResult last = result;
  const double elapsed = os::seconds() - begin;
  const cuda::Counters after = cuda ? cuda::read_cuda_counters(device) : cuda::Counters{};
  if (r.ops) step(table.hook());
  const std::int64_t overhead = s.backend->overhead_bytes(), steps = s.trainer->runtime().steps();
  const std::int64_t allocated = s.backend->allocated_bytes();
  const std::string description = s.backend->info().description, storage = s.fit.storage;
  const double time = median(seconds),
               flops = step_flops(s, rows) * static_cast<double>(r.micro_batches);
  const FitReport fit = s.fit;
  const std::int64_t pinned = s.backend->host_allocated_bytes();
  const MachineRates peak = peak_after(s, r, rows);
  const double tokens_per_s = static_cast<double>(step_rows) / time;
  const double joules =
      before.joules < 0 || after.joules < 0
          ? -1
          : (after.joules - before.joules) / static_cast<double>(step_rows * r.steps) * 1000;
  Json row = {{"model", r.model},
              {"batch", r.batch},
              {"seq", r.sequence},
              {"rank", rank},
              {"storage", storage},
              {"device", description},
              {"tokens_per_s", tokens_per_s},
              {"seconds", time},
              {"mean_seconds", elapsed / static_cast<double>(r.steps)},
              {"peak_bytes", allocated},
              {"planned_bytes", fit.total_bytes()},
              {"pinned_bytes", pinned},
              {"planned_pinned_bytes", fit.pinned_bytes()},
              {"copied_bytes", last.copied_bytes},
              {"apply_copied_bytes", last.apply_copied_bytes},
              {"apply_seconds", median(apply_seconds)},
              {"micro_batches", r.micro_batches},
              {"flops", flops},
              {"flops_per_s", flops / time},
              {"peak_share", flops / time / peak.flops_per_s},
              {"peak_flops_per_s", peak.flops_per_s},
              {"copy_bytes_per_s", peak.bytes_per_s},
              {"plan_seconds", planned - start},
              {"load_seconds", loaded - planned},
              {"first_loss_seconds", first_loss - start}};
  if (cuda) {
    row["device_used_bytes"] = after.device_used_bytes;
    row["overhead_bytes"] = overhead;
    row["recorded_steps"] = steps;
    row["host_in_bytes_per_s"] = peak.host_in_bytes_per_s;
    row["host_out_bytes_per_s"] = peak.host_out_bytes_per_s;
    row["host_both_bytes_per_s"] = peak.host_both_bytes_per_s;
  }
  if (fit.tokens_per_s > 0) row["predicted_tokens_per_s"] = fit.tokens_per_s;
  if (joules >= 0) row["joules_per_1000_tokens"] = joules;
  if (r.ops) row["kernels"] = table.json(peak);
  if (r.json) {
    out << row.dump() << "\n";
    return 0;
  }
  out << format("%s, %lld x %lld, rank %lld, %s, %s\n", r.model.c_str(),
                static_cast<long long>(r.batch), static_cast<long long>(r.sequence),
                static_cast<long long>(rank), storage.c_str(), description.c_str());
  out << format("%.0f tokens/s, %.4f s a step (median of %lld), %s allocated", tokens_per_s, time,
                static_cast<long long>(r.steps), size_text(allocated).c_str());
  if (cuda) {
    out << ", " << size_text(after.device_used_bytes) << " of the card in use";
  } else {
    out << ", process peak " << size_text(os::peak_resident_bytes());
  }
  if (pinned > 0) out << ", " << size_text(pinned) << " on the host";
  if (joules >= 0) out << format(", %.1f J per 1,000 tokens", joules);
  out << "\n";
  if (fit.tokens_per_s > 0) out << format("%.0f tokens/s were predicted\n", fit.tokens_per_s);
  if (last.copied_bytes > 0) {
    const double apply = median(apply_seconds);
    out << format(
        "host       %s copied a step, %s of it in the optimizer's %.1f ms: %.1f GB/s (alone %.1f "
        "in, %.1f out, %.1f both ways)\n",
        size_text(last.copied_bytes).c_str(), size_text(last.apply_copied_bytes).c_str(),
        1e3 * apply, 1e-9 * static_cast<double>(last.apply_copied_bytes) / apply,
        1e-9 * peak.host_in_bytes_per_s, 1e-9 * peak.host_out_bytes_per_s,
        1e-9 * peak.host_both_bytes_per_s);
  }
  if (r.ops) table.print(peak, out);
  out << format("%.1f GFLOP/s, %.1f %% of %s in this run (%.1f GFLOP/s; copy %.0f GB/s)\n",
                flops / time / 1e9, 100 * flops / time / peak.flops_per_s, peak.what.c_str(),
                peak.flops_per_s / 1e9, peak.bytes_per_s / 1e9);
  out << format("plan %.1f s, load %.1f s, first loss after %.1f s\n", planned - start,
                loaded - planned, first_loss - start);
  return 0;
}

int bench_decode(const BenchRequest& r, std::ostream& out, std::ostream&) {
  FinetuneSetup s = bench_setup(r, std::max<std::int64_t>(r.rank, 0));
  s.buckets = {};
  plan_model(s, r.prompt + r.tokens + 1);
  reserve(s);
  read_weights(s, {});
  if (!s.trains_weights()) initialize_adapter(*s.trainer, 0);
  std::vector<std::int32_t> prompt;
  for (std::int64_t i = 0; i < r.prompt; ++i) {
    prompt.push_back(static_cast<std::int32_t>(i % s.loaded->config().vocab));
  }
  for (int i = 0; i < 2; ++i) {  // a GPU runs its programs, then records them
    s.decoder->choose({prompt.data(), 1}, 0);
    s.decoder->reset();
    s.decoder->choose(prompt, 0);
    s.decoder->reset();
  }
  double begin = os::seconds();
  s.decoder->choose(prompt, 0);
  const double prompt_seconds = os::seconds() - begin;
  std::vector<double> seconds;
  for (std::int64_t i = 0; i < r.tokens; ++i) {
    begin = os::seconds();
    s.decoder->choose({prompt.data(), 1}, static_cast<std::uint64_t>(i));
    seconds.push_back(os::seconds() - begin);
  }
  const double prompt_rate = static_cast<double>(r.prompt) / prompt_seconds;
  const double rate = 1 / median(seconds);
  const std::int64_t allocated = s.backend->allocated_bytes();
  const std::string description = s.backend->info().description;
  KernelTable token_table(static_cast<double>(r.prompt)), prompt_table(token_table);
  MachineRates peak;
  if (r.ops) {
    s.decoder->reset();
    s.decoder->choose(prompt, 0, prompt_table.hook());
    s.decoder->choose({prompt.data(), 1}, 0, token_table.hook());
    peak = peak_after(s, r, r.prompt);
  }
  if (r.json) {
    Json row = {
        {"model", r.model},     {"device", description},      {"prompt_tokens_per_s", prompt_rate},
        {"tokens_per_s", rate}, {"seconds", median(seconds)}, {"peak_bytes", allocated}};
    if (r.ops) row["kernels"] = token_table.json(peak);
    out << row.dump() << "\n";
  } else {
    out << format("prompt %.0f tokens/s, decode %.1f tokens/s (median of %lld), %s, %s\n",
                  prompt_rate, rate, static_cast<long long>(r.tokens), size_text(allocated).c_str(),
                  description.c_str());
    if (r.ops) {
      out << "a token:\n";
      token_table.print(peak, out);
      out << "the prompt:\n";
      prompt_table.print(peak, out);
    }
  }
  return 0;
}

}  // namespace nibble
