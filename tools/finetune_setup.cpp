#include "tools/finetune_setup.h"

#include <algorithm>
#include <cmath>
#include <ostream>
#include <regex>

#include "engine/error.h"
#include "engine/os.h"
#include "engine/philox.h"
#include "gguf-convert/adapter.h"
#include "gguf-convert/convert.h"
#include "gguf-convert/names.h"
#include "tools/cards.h"
#include "tools/text.h"
#include "tools/tiny_model.h"

namespace nibble {
namespace {

constexpr std::size_t kSamples = 2;           // rows shown where the user names none
constexpr std::int64_t kSampleTokens = 2048;  // of the longest of them: a cache costs memory
constexpr std::int64_t kAnswerTokens = 64;    // of the answers shown before and after
// Tokens that amortize decoding the weights: on a GPU a whole matrix is decoded for each product.
constexpr std::int64_t kAutoMicroRows = 1024, kAutoMicroRowsCuda = 8192;
constexpr std::int64_t kMaxAutoSequence = 4096;

void load_data(FinetuneSetup& s, std::ostream& log) {
  Recipe& r = s.recipe;
  DatasetOptions options;
  options.format = r.format;
  options.train_on = train_on_from_name(r.train_on);
  options.skip_bad = r.skip_bad;
  s.dataset = load_dataset(r.data, *s.tokenizer, options);
  check_ids(s.dataset.rows, s.loaded->config().vocab);
  if (r.sequence == 0) {
    r.sequence = std::min({s.dataset.longest, kMaxAutoSequence, s.loaded->config().context});
  }
  if (r.sequence > s.loaded->config().context) {
    throw Error(format("--seq %lld is longer than the model's context of %lld tokens",
                       static_cast<long long>(r.sequence),
                       static_cast<long long>(s.loaded->config().context)));
  }
  limit_length(s.dataset, r.sequence, r.truncate, *s.tokenizer);
  r.format = s.dataset.format;
  Dataset& d = s.dataset;
  s.data_read = {static_cast<std::int64_t>(d.rows.size()), d.total_tokens, fingerprint(d.rows)};
  log << "data       " << d.format
      << " rows: " << count_text(static_cast<std::int64_t>(d.rows.size())) << ", "
      << count_text(d.total_tokens) << " tokens, " << count_text(d.trained_tokens)
      << " trained, longest " << count_text(d.longest);
  if (d.truncated > 0) log << ", " << count_text(d.truncated) << " truncated";
  if (d.dropped > 0) log << ", " << count_text(d.dropped) << " dropped (nothing left to train)";
  if (d.skipped > 0) log << ", " << count_text(d.skipped) << " bad rows skipped";
  log << "\n";
  if (d.skipped > 0) log << "           first bad row: " << d.first_bad << "\n";
  if (d.rows.empty()) throw Error(r.data.front() + ": no row is left to train on");
  log << "row 1      "
      << render(d.rows.front(), *s.tokenizer,
                os::is_terminal(2) ? Marks::terminal : Marks::guillemets)
      << "\n";
  const auto rows = static_cast<std::int64_t>(d.rows.size());
  log << "           EOS is trained: "
      << (d.eos_trained == rows ? "yes"
          : d.eos_trained == 0
              ? "no"
              : "in " + count_text(d.eos_trained) + " of " + count_text(rows) + " rows")
      << "\n";
}

double held_out_share(const std::string& text, std::size_t rows) {
  std::size_t end = 0;
  double number = -1;
  try {
    number = std::stod(text, &end);
  } catch (const std::exception&) {
  }
  const std::string unit = text.substr(end);
  if (number >= 0 && unit == "%" && number < 100) return number / 100;
  if (number >= 0 && unit.empty() && number < 1) return number;
  if (number >= 1 && unit.empty() && number < static_cast<double>(rows)) {
    return number / static_cast<double>(rows);
  }
  throw Error("--eval-split " + text + ": write a share (2%, 0.02) or a number of rows below " +
              std::to_string(rows));
}

void split_data(FinetuneSetup& s, std::ostream& log) {
  Recipe& r = s.recipe;
  DatasetOptions options;
  options.format = r.format;
  options.train_on = train_on_from_name(r.train_on);
  options.skip_bad = r.skip_bad;
  if (!r.eval_data.empty()) {
    Dataset eval = load_dataset({r.eval_data}, *s.tokenizer, options);
    check_ids(eval.rows, s.loaded->config().vocab);
    limit_length(eval, r.sequence, r.truncate, *s.tokenizer);
    s.held_out = std::move(eval.rows);
    s.train = std::move(s.dataset.rows);
  } else {
    const double share = held_out_share(r.eval_split, s.dataset.rows.size());
    std::tie(s.train, s.held_out) = split_rows(std::move(s.dataset.rows), share, r.seed);
  }
  s.dataset.rows.clear();
  if (s.train.empty()) throw Error("no row is left to train on after --eval-split " + r.eval_split);
  if (!r.sample_prompts.empty()) {
    options.format.clear();
    Dataset samples = load_dataset({r.sample_prompts}, *s.tokenizer, options);
    check_ids(samples.rows, s.loaded->config().vocab);
    s.samples = std::move(samples.rows);
  } else {
    const std::vector<Row>& from = s.held_out.empty() ? s.train : s.held_out;
    for (const Row& row : from) {
      if (s.samples.size() < kSamples && std::ssize(row.ids) <= kSampleTokens) {
        s.samples.push_back(row);
      }
    }
  }
  log << "split      " << count_text(std::ssize(s.train)) << " rows to train, "
      << count_text(std::ssize(s.held_out)) << " held out\n";
}

void make_schedule(FinetuneSetup& s) {
  Recipe& r = s.recipe;
  std::vector<std::int64_t> lengths;
  for (const Row& row : s.train) lengths.push_back(program_rows(row));
  if (r.epochs == 0) r.epochs = s.train.size() < 10000 ? 3 : 1;
  ScheduleOptions options;
  options.batch = r.batch;
  options.sequence = r.sequence;
  options.pack = r.pack;
  options.shuffle = r.order == "shuffle";
  options.group_by_length = r.group_by_length;
  options.epochs = r.epochs;
  options.steps = r.steps;
  options.seed = r.seed;
  s.schedule = std::make_unique<Schedule>(lengths, options);
  r.steps = s.schedule->steps();
}

// Microbatches are filled up to a capacity; the buckets are the sizes that the fills of the first
// steps have.
void make_buckets(FinetuneSetup& s) {
  Recipe& r = s.recipe;
  if (r.micro_batch == 0 && r.accumulation > 0) {
    r.micro_batch = (r.batch + r.accumulation - 1) / r.accumulation;
  }
  std::vector<std::int64_t> totals, fills;
  for (std::int64_t step = 0; step < std::min<std::int64_t>(s.schedule->steps(), 200); ++step) {
    std::int64_t total = 0;
    for (const std::int32_t row : s.schedule->rows(step)) {
      total += program_rows(s.train[static_cast<std::size_t>(row)]);
    }
    totals.push_back(total);
  }
  const std::int64_t automatic = is_cuda(s.backend->info()) ? kAutoMicroRowsCuda : kAutoMicroRows;
  const std::int64_t wanted = r.micro_batch > 0 ? r.micro_batch * r.sequence : automatic;
  const std::int64_t most = *std::max_element(totals.begin(), totals.end());
  const std::int64_t capacity = std::max(r.sequence, std::min(wanted, most));
  for (std::int64_t total : totals) {
    s.work.tokens_per_step += static_cast<double>(total);
    for (; total > 0; total -= capacity) fills.push_back(std::min(total, capacity));
  }
  s.buckets = choose_buckets(fills, capacity);
  for (const std::int64_t fill : fills) {
    s.work.rows_per_step +=
        static_cast<double>(*std::lower_bound(s.buckets.begin(), s.buckets.end(), fill));
  }
  const auto steps = static_cast<double>(totals.size());
  s.work.tokens_per_step /= steps;
  s.work.rows_per_step /= steps;
  double rows = 0, squares = 0;
  for (const Row& row : s.train) {
    const auto n = static_cast<double>(program_rows(row));
    rows += n;
    squares += n * n;
  }
  s.work.average_span = squares / rows;
  for (const Row& row : s.held_out) {
    s.work.evaluated_rows += static_cast<double>(program_rows(row));
  }
}

// Without data: every row has --seq tokens.
void assume_full_rows(FinetuneSetup& s) {
  Recipe& r = s.recipe;
  if (r.sequence == 0 || r.steps == 0) {
    throw Error("without --data, fit needs --seq and --steps: what would be trained on");
  }
  if (r.micro_batch == 0 && r.accumulation > 0) {
    r.micro_batch = (r.batch + r.accumulation - 1) / r.accumulation;
  }
  if (r.micro_batch == 0) {
    const std::int64_t automatic = is_cuda(s.backend->info()) ? kAutoMicroRowsCuda : kAutoMicroRows;
    r.micro_batch = std::clamp<std::int64_t>(automatic / r.sequence, 1, r.batch);
  }
  s.buckets = {round_up(r.micro_batch * r.sequence, 256)};
  s.evaluates = !r.eval_data.empty();
  s.work.tokens_per_step = static_cast<double>(r.batch * r.sequence);
  s.work.rows_per_step =
      static_cast<double>((r.batch + r.micro_batch - 1) / r.micro_batch * s.buckets.back());
  s.work.average_span = static_cast<double>(r.sequence);
}

void print_plan(const FinetuneSetup& s, std::ostream& log) {
  log << "trains     " << count_text(s.trainer->parameters().trainable()) << " parameters ("
      << s.recipe.method;
  if (!s.trains_weights())
    log << format(", rank %lld, alpha %g", static_cast<long long>(s.recipe.rank), s.recipe.alpha);
  log << "), storage " << s.fit.storage << ", microbatches of";
  for (const std::int64_t b : s.buckets) log << " " << b;
  log << " tokens, " << s.backend->info().description << ", " << s.recipe.compute << "\n";
}

void resolve_optimizer(FinetuneSetup& s) {
  Recipe& r = s.recipe;
  if (r.lr == 0) {
    r.lr = r.method == "full" ? 2e-5 : s.total_parameters >= 30'000'000'000 ? 1e-4 : 2e-4;
  }
  if (r.alpha == 0) r.alpha = 2 * static_cast<double>(r.rank);
  const std::int64_t tenth = std::max<std::int64_t>(1, (r.steps + 9) / 10);
  if (r.eval_every == 0) r.eval_every = tenth;
  if (r.save_every == 0) r.save_every = tenth;
}

// An adapter to start from decides rank, alpha and targets.
void take_adapter_shape(Recipe& r, const ModelConfig& config) {
  if (r.adapter.empty()) return;
  if (r.method == "full") throw Error("--adapter needs --method qlora or lora, not full");
  const AdapterFile adapter = read_adapter(r.adapter, config);
  if (adapter.tensors.empty()) throw Error(r.adapter + " has no LoRA tensors");
  r.rank = adapter.tensors.front().rank;
  r.alpha = adapter.scale(adapter.tensors.front()) * static_cast<double>(r.rank);
  r.targets.clear();
  for (const AdapterTensor& t : adapter.tensors) {
    if (!is_decoder_linear(t.name)) {
      throw Unsupported(r.adapter + " changes " + t.name +
                        "; training goes on from adapters of the blocks' linears only");
    }
    if (t.rank != r.rank || adapter.scale(t) * static_cast<double>(t.rank) != r.alpha) {
      throw Unsupported(r.adapter + ": " + t.name +
                        " has another rank or alpha than the rest; "
                        "training goes on from adapters with one rank and alpha");
    }
    const std::string linear = t.name.substr(t.name.find('.', 4) + 1);
    const std::string target = linear.substr(0, linear.find('.'));
    if (std::find(r.targets.begin(), r.targets.end(), target) == r.targets.end()) {
      r.targets.push_back(target);
    }
  }
  const auto wanted = static_cast<std::int64_t>(r.targets.size()) * config.layers;
  if (std::ssize(adapter.tensors) != wanted) {
    throw Unsupported(r.adapter + " has " + std::to_string(adapter.tensors.size()) + " of the " +
                      std::to_string(wanted) +
                      " matrix pairs that its targets have over all blocks; training goes on from "
                      "adapters of every block only");
  }
}

LoadOptions load_options(const Recipe& r) {
  LoadOptions options;
  options.method = r.method == "full"   ? Method::full
                   : r.method == "lora" ? Method::lora
                                        : Method::qlora;
  options.compute = compute_dtype(r.compute);
  options.quant.block = static_cast<std::int32_t>(r.block);
  options.quant.double_quant = !r.no_double_quant;
  if (!r.no_quant.empty()) options.no_quant = name_pattern(r.no_quant);
  if (!r.head.empty()) options.head = output_type(r.head);
  options.threads = r.where.threads;
  return options;
}

void print_model(const FinetuneSetup& s, std::ostream& log) {
  const ModelConfig& c = s.loaded->config();
  log << "model      " << s.recipe.model << ": " << c.architecture << ", "
      << format("%.1fM", static_cast<double>(s.total_parameters) / 1e6) << " parameters, "
      << c.layers << " blocks, context " << c.context << "\n";
  if (s.loaded->converted() > 0) {
    log << "           " << s.loaded->converted() << " matrices become NF4 while loading\n";
  }
}

}  // namespace

std::vector<std::string> resolve_targets(const std::vector<std::string>& targets) {
  const auto short_hf_name = [](const std::string& linear) {
    const std::string path = hf_name("blk.0." + linear).value();
    return path.substr(path.rfind('.') + 1);
  };
  std::vector<std::string> found;
  for (const std::string& target : targets) {
    bool matched = false;
    for (const std::string& linear : llama_linears()) {
      bool match = target == "all-linear" || target == linear || target == short_hf_name(linear);
      if (!match) match = std::regex_match(short_hf_name(linear), name_pattern(target));
      if (!match) match = std::regex_match(linear, name_pattern(target));
      if (!match) continue;
      matched = true;
      if (std::find(found.begin(), found.end(), linear) == found.end()) found.push_back(linear);
    }
    if (!matched) {
      throw Error("--targets " + target +
                  " matches no linear; there are q_proj, k_proj, v_proj, "
                  "o_proj, gate_proj, up_proj, down_proj and all-linear");
    }
  }
  return found;
}

void open_setup_model(FinetuneSetup& s) {
  Recipe& r = s.recipe;
  if (r.where.threads <= 0) r.where.threads = os::physical_cores();
  if (s.plans_only && !r.card.empty()) {
    s.backend = open_planning_backend(r.where, find_card(r.card));
  } else {
    s.backend = open_backend(r.where, device_cap(r).value_or(0), host_budget(r));
  }
  r.compute = resolve_compute(r.compute, s.backend->info());
  LoadOptions load = load_options(r);
  load.repeat_first_block = s.repeat_first_block;
  s.loaded =
      std::make_unique<LoadedModel>(open_model_source(r.model, r.seed), s.backend->info(), load);
  for (const auto& [name, type] : s.loaded->types()) s.total_parameters += type.elements();
  take_adapter_shape(r, s.loaded->config());
  r.targets = r.method == "full" ? std::vector<std::string>{} : resolve_targets(r.targets);
}

void FinetuneSetup::release() {
  decoder.reset();
  trainer.reset();
  loaded.reset();
  backend.reset();
}

void reserve(FinetuneSetup& s) {
  s.loaded->reserve(s.trainer->runtime(), *s.llama);
  s.trainer->allocate();
  if (is_cuda(s.backend->info())) {
    if (s.decoder) s.decoder->warm_up();
    s.trainer->warm_up();
  }
}

void read_weights(FinetuneSetup& s, const LoadedModel::Progress& progress) {
  s.loaded->read(*s.backend, progress);
  if (s.trains_weights()) s.loaded->load_parameters(*s.trainer, progress);
}

FinetuneSetup set_up(const Recipe& recipe, std::ostream& log, bool plans_only,
                     std::optional<std::int64_t> measured_context_bytes) {
  FinetuneSetup s;
  s.measured_context_bytes = measured_context_bytes;
  s.recipe = recipe;
  s.plans_only = plans_only;
  s.repeat_first_block = plans_only && recipe.model.starts_with("random:");
  open_setup_model(s);
  print_model(s, log);
  if (recipe.data.empty()) {
    assume_full_rows(s);
    resolve_optimizer(s);
    plan_model(s, 0);
    print_plan(s, log);
    return s;
  }
  s.tokenizer = std::make_unique<Tokenizer>(s.loaded->checkpoint().tokenizer());
  load_data(s, log);
  split_data(s, log);
  make_schedule(s);
  make_buckets(s);
  resolve_optimizer(s);
  std::int64_t longest_prompt = 0;
  for (const Row& row : s.samples)
    longest_prompt = std::max<std::int64_t>(longest_prompt, std::ssize(row.ids));
  plan_model(s, std::min(s.loaded->config().context, longest_prompt + kAnswerTokens));
  log << "steps      " << count_text(s.recipe.steps)
      << format(" of %lld %s (%.2f epochs), lr %g %s, warmup %g",
                static_cast<long long>(s.recipe.batch), s.recipe.pack ? "packs" : "rows",
                s.schedule->epochs(), s.recipe.lr, s.recipe.schedule.c_str(), s.recipe.warmup)
      << "\n";
  print_plan(s, log);
  return s;
}

void initialize_adapter(Trainer& trainer, std::uint64_t seed) {
  for (const ParameterSegment& s : trainer.parameters().segments()) {
    std::vector<float> values(static_cast<std::size_t>(s.elements()));
    if (s.name.ends_with(".lora_a")) {
      const float bound = 1.0f / std::sqrt(static_cast<float>(s.cols));
      const std::uint64_t stream = hash_name(s.name);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const PhiloxBlock r =
            philox(seed, {static_cast<std::uint32_t>(i / 4), 0, static_cast<std::uint32_t>(stream),
                          static_cast<std::uint32_t>(stream >> 32)});
        values[i] = (2 * uniform(r[i % 4]) - 1) * bound;
      }
    }
    trainer.set_parameter(s.name, values);
  }
}

}  // namespace nibble
