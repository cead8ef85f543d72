// The programs of a run and what they cost, in bytes and seconds.
#include <cmath>
#include <optional>
#include <ostream>

#include "engine/error.h"
#include "engine/os.h"
#include "tools/cards.h"
#include "tools/choose_policy.h"
#include "tools/finetune_setup.h"
#include "tools/text.h"

namespace nibble {
namespace {

constexpr double kSavedPerSecond = 1e9;  // bytes, on a common SSD

// What the run may take on the device, and how much of that the device's own context is.
struct Budget {
  std::int64_t bytes, context_bytes;
};

Budget budget(const FinetuneSetup& s) {
  const BackendInfo info = s.backend->info();
  const std::optional<std::int64_t> cap = device_cap(s.recipe);
  // Main memory is shared with everything else.
  if (!is_cuda(info)) return {cap.value_or(info.memory_bytes / 10 * 8), 0};
  // A card's is what was free, which was read when the context was there.
  const std::int64_t context = s.measured_context_bytes.value_or(
      kContextBytes + kRecordedStepBytes * s.trainer->recorded_steps());
  if (cap && *cap - context <= info.memory_bytes) return {*cap, context};
  return {info.memory_bytes, 0};
}

void predict_speed(FinetuneSetup& s) {
  const DeviceRates rates = device_rates(s.backend->info());
  if (!rates.known() || s.without_adapter) return;
  FitReport& fit = s.fit;
  fit.step_seconds = s.trainer->estimate_step(rates, s.work.average_span, s.work.rows_per_step);
  fit.tokens_per_s = s.work.tokens_per_step / fit.step_seconds;
  const auto steps = static_cast<double>(s.recipe.steps);
  double seconds = steps * fit.step_seconds;
  if (s.work.evaluated_rows > 0 && s.recipe.eval_every > 0) {
    const double evaluations = 1 + std::ceil(steps / static_cast<double>(s.recipe.eval_every));
    seconds += evaluations *
               s.trainer->estimate_evaluation(rates, s.work.average_span, s.work.evaluated_rows);
  }
  if (s.recipe.save_every > 0) {
    const double moments = s.recipe.optimizer == "adamw8bit" ? 2 : 8;  // bytes an element
    const double saved = (4 + moments) * static_cast<double>(s.trainer->parameters().elements());
    seconds +=
        std::ceil(steps / static_cast<double>(s.recipe.save_every)) * saved / kSavedPerSecond;
  }
  fit.hours = seconds / 3600;
}

}  // namespace

void plan_policy(FinetuneSetup& s, const Policy& policy, std::int64_t sample_context, Plans plans) {
  const Recipe& r = s.recipe;
  TrainerOptions options;
  options.compute = compute_dtype(r.compute);
  options.optimizer = r.optimizer == "adamw8bit" ? Optimizer::adamw8bit : Optimizer::adamw;
  options.storage = policy.storage;
  options.paged_elements = policy.paged;
  options.buckets = s.buckets;
  options.evaluates = s.evaluates;
  options.training = !s.without_adapter;
  options.beta2 = r.beta2;
  options.clip = r.clip;
  options.seed = r.seed;
  options.draft = plans == Plans::draft;
  const Llama* llama = s.llama.get();
  ParameterTable table = llama->parameters();
  table.set_weight_decay(static_cast<float>(r.weight_decay));
  s.decoder.reset();
  s.loaded->place(policy.embedding_on_host, policy.storage);
  s.trainer = std::make_unique<Trainer>(
      *s.backend, std::move(table),
      [llama](Graph& graph, const LossInputs& in) { return llama->build_loss(graph, in); },
      options);
  if (sample_context > 0) {
    s.decoder =
        std::make_unique<Decoder>(s.trainer->runtime(), *llama, options.compute, sample_context,
                                  s.loaded->config().vocab, SampleOptions(), policy.storage);
  }
  s.loaded->promise_pages(s.trainer->runtime());
  s.fit = s.trainer->fit();
  s.fit.device.insert(s.fit.device.begin(), {"weights", s.loaded->weight_bytes()});
  if (s.loaded->embedding_bytes() > 0)
    s.fit.pinned.push_back({"input embedding", s.loaded->embedding_bytes()});
  if (s.loaded->streamed_bytes() > 0)
    s.fit.pinned.push_back({"streamed weights", s.loaded->streamed_bytes()});
  if (s.loaded->mapped_bytes() > 0)
    s.fit.host.push_back({"weights mapped", s.loaded->mapped_bytes()});
  s.fit.pinned_budget_bytes = host_budget(r);
  // A limit that nobody set matters where it is exceeded.
  if (device_cap(r) || s.fit.total_bytes() > s.backend->info().memory_bytes) {
    const Budget most = budget(s);
    s.fit.budget_bytes = most.bytes;
    s.fit.context_bytes = most.context_bytes;
  }
  if (plans == Plans::all) predict_speed(s);
}

std::int64_t excess(const FinetuneSetup& s) {
  const Budget most = budget(s);
  return s.fit.total_bytes() + most.context_bytes - most.bytes;
}

std::optional<std::int64_t> device_cap(const Recipe& recipe) {
  if (!recipe.memory.empty()) return parse_size(recipe.memory, "--memory");
  if (!recipe.card.empty()) return find_card(recipe.card).memory_bytes;
  return {};
}

std::int64_t host_budget(const Recipe& recipe) {
  if (!recipe.host_memory.empty()) return parse_size(recipe.host_memory, "--host-memory");
  return os::memory_bytes() / 10 * 6;
}

void plan_model(FinetuneSetup& s, std::int64_t sample_context) {
  Recipe& r = s.recipe;
  std::optional<LoraSpec> lora;
  if (r.method != "full" && !s.without_adapter)
    lora = LoraSpec{r.rank, r.alpha, r.dropout, r.targets};
  s.llama =
      std::make_unique<Llama>(s.loaded->config(), s.loaded->types(), lora, r.method == "full");
  std::optional<StoragePolicy> forced;
  if (r.storage != "auto") {
    forced = StoragePolicy::parse(r.storage);
    const std::int64_t layers = s.loaded->config().layers;
    if (!forced || forced->split > layers || forced->streamed > layers ||
        forced->offload_split > layers) {
      throw Error("--storage " + r.storage +
                  ": write auto, store, cheap, attention or block, or LEANER:N+RUNG with a leaner "
                  "one of these for the first N of the " +
                  std::to_string(s.loaded->config().layers) +
                  " blocks; \",offload:inputs\", \":attention\", \":inputs+gate\", \":gate\", "
                  "\":inputs+gate+up\" or \":up\" may follow, then "
                  "\",stream:N\", then \",mlp:N\" and \",loss:N\" with multiples of 512");
    }
  }
  choose_policy(s, sample_context, forced);
  r.storage = s.fit.storage;
}

void print_fit(const FitReport& fit, std::ostream& out) {
  out << "memory     " << size_text(fit.total_bytes()) << " allocated:";
  for (const FitReport::Line& line : fit.device) {
    if (line.bytes > 0) out << " " << line.name << " " << size_text(line.bytes) << ",";
  }
  out << " storage " << fit.storage << "\n";
  for (const FitReport::Line& line : fit.pinned) {
    out << "           " << line.name << " " << size_text(line.bytes) << " on the host, of "
        << size_text(fit.pinned_budget_bytes) << "\n";
  }
  for (const FitReport::Line& line : fit.host) {
    out << "           " << line.name << " " << size_text(line.bytes) << " (not allocated)\n";
  }
  if (fit.budget_bytes > 0) {
    out << "           of " << size_text(fit.budget_bytes);
    if (fit.context_bytes > 0)
      out << " with " << size_text(fit.context_bytes) << " for the device's context";
    const std::int64_t excess = fit.excess_bytes();
    out << ": "
        << (excess <= 0 ? "fits, " + size_text(-excess) + " to spare\n"
                        : "does not fit, " + size_text(excess) + " too much\n");
  }
  if (fit.tokens_per_s > 0) {
    out << format("speed      %.0f tokens/s predicted", fit.tokens_per_s);
    if (fit.hours > 0) out << ", " << time_text(fit.hours * 3600) << " in all";
    out << "\n";
  }
}

}  // namespace nibble
