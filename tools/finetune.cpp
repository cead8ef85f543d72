#include "tools/finetune.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <ostream>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/adapter.h"
#include "models/chat.h"
#include "tools/alternatives.h"
#include "tools/export.h"
#include "tools/finetune_setup.h"
#include "tools/plan_picture.h"
#include "tools/plot.h"
#include "tools/replan.h"
#include "tools/run_directory.h"
#include "tools/text.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

// Sum of the losses and number of labels of each held-out row.
struct RowLoss {
  double sum = 0;
  std::int64_t tokens = 0;
  double mean() const { return sum / static_cast<double>(std::max<std::int64_t>(tokens, 1)); }
};

double mean_loss(const std::vector<RowLoss>& rows) {
  RowLoss all;
  for (const RowLoss& row : rows) {
    all.sum += row.sum;
    all.tokens += row.tokens;
  }
  return all.mean();
}

// Learning rate of step `step` (from 0) of `steps`.
double learning_rate(const Recipe& r, std::int64_t step, std::int64_t steps) {
  const double warmup = std::ceil(r.warmup >= 1 ? r.warmup : r.warmup * static_cast<double>(steps));
  const auto at = static_cast<double>(step);
  if (at < warmup) return r.lr * (at + 1) / warmup;
  const double left = std::max(1.0, static_cast<double>(steps) - warmup);
  const double progress = (at - warmup) / left;
  if (r.schedule == "linear") return r.lr * (1 - progress);
  if (r.schedule == "cosine") return r.lr * 0.5 * (1 + std::cos(3.141592653589793 * progress));
  return r.lr;
}

std::string trimmed(const std::string& text) {
  const std::size_t begin = text.find_first_not_of(" \n\t\r");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \n\t\r") - begin + 1);
}

// A run whose memory is reserved.
class Run {
 public:
  Run(FinetuneSetup setup, RunDirectory directory, std::ostream& out, std::ostream& log)
      : s_(std::move(setup)),
        r_(s_.recipe),
        directory_(std::move(directory)),
        out_(out),
        log_(log),
        terminal_(os::is_terminal(2)) {}

  int execute() {
    load();
    const bool resumed = restore();
    if (!resumed) {
      directory_.cut_log(-1);
      log_row({{"type", "config"}, {"step", 0}, {"buckets", s_.buckets}, {"config", to_json(r_)}});
    }
    before();
    train_until(r_.steps);
    if (interrupted_) return 130;
    after();
    return 0;
  }

 private:
  void load() {
    const auto progress = [&](std::int64_t done, std::int64_t all) {
      if (!terminal_) return;
      log_ << format("\rloading    %3.0f %%",
                     100.0 * static_cast<double>(done) /
                         static_cast<double>(std::max<std::int64_t>(all, 1)))
           << std::flush;
    };
    overhead_at_start_ = s_.backend->overhead_bytes();
    read_weights(s_, progress);
    if (!s_.trains_weights()) {
      if (r_.adapter.empty()) {
        initialize_adapter(*s_.trainer, r_.seed);
      } else {
        set_adapter(*s_.trainer, read_adapter(r_.adapter, s_.loaded->config()));
      }
    }
    if (terminal_) log_ << "\r                  \r";
  }

  bool restore() {
    if (!r_.resume) return false;
    const auto checkpoint = directory_.newest_checkpoint();
    if (!checkpoint) {
      log_ << "resume     " << directory_.path() << " has no checkpoint: starting at step 0\n";
      return false;
    }
    load_checkpoint(*checkpoint, *s_.trainer);
    directory_.cut_log(s_.trainer->step());
    log_ << "resume     at step " << s_.trainer->step() << " from " << *checkpoint << "\n";
    return true;
  }

  std::vector<RowLoss> held_out_losses() {
    std::vector<const Row*> rows;
    for (const Row& row : s_.held_out) rows.push_back(&row);
    std::vector<RowLoss> losses(rows.size());
    for (const PackedBatch& packed : make_microbatches(rows, s_.buckets)) {
      const std::vector<float> values = s_.trainer->evaluate(packed.batch);
      std::size_t next = 0;
      for (const std::int32_t member : packed.members) {
        RowLoss& loss = losses[static_cast<std::size_t>(member)];
        const Row& row = *rows[static_cast<std::size_t>(member)];
        for (std::size_t i = 1; i < row.trained.size(); ++i) {
          if (row.trained[i] == 0) continue;
          loss.sum += values[next++];
          ++loss.tokens;
        }
      }
    }
    return losses;
  }

  double evaluate_and_log() {
    last_losses_ = held_out_losses();
    const double loss = mean_loss(last_losses_);
    log_row({{"type", "eval"}, {"step", s_.trainer->step()}, {"eval_loss", loss}});
    return loss;
  }

  struct Answer {
    std::string prompt, wanted, got;
  };

  // Valid UTF-8 even where the ids begin or end inside a character.
  std::string text_of(std::span<const std::int32_t> ids, DecodeOptions options) const {
    StreamDecoder decoder(*s_.tokenizer, options);
    std::string text;
    for (const std::int32_t id : ids) text += decoder.push(id);
    return text + decoder.finish();
  }

  // What the model answers to the prompt of each sample row; a chat is asked its first question.
  std::vector<Answer> answers() {
    std::vector<Answer> result;
    for (const Row& row : s_.samples) {
      const auto first = std::find(row.trained.begin(), row.trained.end(), 1) - row.trained.begin();
      // Rows that are trained from their start are continued from their first quarter.
      const auto cut = static_cast<std::size_t>(
          first > 1 ? first : std::max<std::ptrdiff_t>(1, std::ssize(row.ids) / 4));
      const auto answered = row.trained.begin() + static_cast<std::ptrdiff_t>(cut);
      const auto length =
          static_cast<std::size_t>(std::find(answered, row.trained.end(), 0) - answered);
      const auto ids = std::span<const std::int32_t>(row.ids);
      if (static_cast<std::int64_t>(cut) >= s_.decoder->context()) continue;
      const std::int64_t room = s_.decoder->context() - static_cast<std::int64_t>(cut);
      const Generation g = generate(*s_.decoder, *s_.tokenizer, ids.first(cut), room);
      result.push_back({text_of(ids.first(cut), {}),
                        text_of(ids.subspan(cut, length), {.special = false, .continues = true}),
                        g.text});
    }
    return result;
  }

  // The state before training is measured in a fresh run and read back from the log in a resumed
  // one.
  void before() {
    if (s_.trainer->step() > 0) {
      for (const Json& row : directory_.read_log()) {
        if (row.value("type", "") != "before") continue;
        for (const Json& loss : row["rows"]) first_losses_.push_back({loss[0], loss[1]});
        for (const Json& answer : row["answers"]) {
          first_answers_.push_back({answer["prompt"], answer["wanted"], answer["got"]});
        }
      }
      return;
    }
    if (!s_.held_out.empty()) {
      const double loss = evaluate_and_log();
      first_losses_ = last_losses_;
      log_ << format("held out   loss %.4f before training\n", loss);
    }
    first_answers_ = answers();
    Json rows = Json::array(), texts = Json::array();
    for (const RowLoss& loss : first_losses_) rows.push_back({loss.sum, loss.tokens});
    for (const Answer& a : first_answers_) {
      texts.push_back({{"prompt", a.prompt}, {"wanted", a.wanted}, {"got", a.got}});
    }
    log_row({{"type", "before"}, {"step", 0}, {"rows", rows}, {"answers", texts}});
  }

  StepResult train_step(double lr) {
    std::vector<const Row*> rows;
    for (const std::int32_t row : s_.schedule->rows(s_.trainer->step())) {
      rows.push_back(&s_.train[static_cast<std::size_t>(row)]);
    }
    for (const Row* row : rows) tokens_done_ += program_rows(*row);
    for (const PackedBatch& packed : make_microbatches(rows, s_.buckets)) {
      s_.trainer->micro(packed.batch);
    }
    return s_.trainer->apply(lr);
  }

  void train_until(std::int64_t steps) {
    const double begin = os::seconds();
    const std::int64_t first = s_.trainer->step();
    while (s_.trainer->step() < steps) {
      const double step_begin = os::seconds();
      const double lr = learning_rate(r_, s_.trainer->step(), r_.steps);
      tokens_done_ = 0;
      const StepResult result = train_step(lr);
      const double seconds = os::seconds() - step_begin;
      const std::int64_t step = s_.trainer->step();
      if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
        throw Error(
            format("the loss became %g at step %lld; the last checkpoint is intact, a lower "
                   "--lr or --clip may help",
                   result.loss, static_cast<long long>(step)));
      }
      log_step(result, lr, seconds);
      progress(result, lr, seconds, (os::seconds() - begin) / static_cast<double>(step - first));
      const bool stop = os::interrupted();
      if (!s_.held_out.empty() && (step % r_.eval_every == 0 || step == steps) && !stop) {
        const double loss = evaluate_and_log();
        log_ << (terminal_ ? "\r\033[K" : "")
             << format("step %lld: held-out loss %.4f\n", static_cast<long long>(step), loss);
        plot();
      }
      if (step % r_.save_every == 0 || step == steps || stop) {
        save_checkpoint();
      }
      if (stop) {
        log_ << (terminal_ ? "\r\033[K" : "")
             << format("interrupted: checkpoint of step %lld saved; --resume goes on from it\n",
                       static_cast<long long>(step));
        interrupted_ = true;
        return;
      }
    }
    train_seconds_ = os::seconds() - begin;
  }

  void log_step(const StepResult& result, double lr, double seconds) {
    Json row = {{"type", "step"},
                {"step", s_.trainer->step()},
                {"loss", result.loss},
                {"lr", lr},
                {"grad_norm", result.grad_norm},
                {"tokens", result.tokens},
                {"tokens_per_s", static_cast<double>(tokens_done_) / seconds},
                {"peak_bytes", s_.backend->allocated_bytes()},
                {"seconds", seconds}};
    if (result.copied_bytes > 0) row["copied_bytes"] = result.copied_bytes;
    if (result.apply_copied_bytes > 0) {  // where the copies decide
      row["apply_copied_bytes"] = result.apply_copied_bytes;
      row["apply_copy_bytes_per_s"] =
          static_cast<double>(result.apply_copied_bytes) / result.apply_seconds;
    }
    log_row(row);
  }

  void save_checkpoint() {
    const std::string path = directory_.save_checkpoint(*s_.trainer, r_.keep_checkpoints);
    log_row({{"type", "checkpoint"}, {"step", s_.trainer->step()}, {"path", path}});
  }

  void progress(const StepResult& result, double lr, double seconds, double mean_seconds) {
    const std::int64_t step = s_.trainer->step();
    const std::string line =
        format("step %lld/%lld  loss %.4f  lr %.2e  %.0f tokens/s  ETA %s  %s",
               static_cast<long long>(step), static_cast<long long>(r_.steps), result.loss, lr,
               static_cast<double>(tokens_done_) / seconds,
               time_text(static_cast<double>(r_.steps - step) * mean_seconds).c_str(),
               size_text(s_.backend->allocated_bytes()).c_str());
    if (terminal_) {
      // A line that wraps could not be written over.
      const int columns = std::max(2, os::terminal_columns(2));
      log_ << "\r" << line.substr(0, static_cast<std::size_t>(columns - 1)) << "\033[K"
           << std::flush;
      if (step == r_.steps) log_ << "\n";
    } else if (step == 1 || step == r_.steps ||
               step % std::max<std::int64_t>(1, r_.steps / 20) == 0) {
      log_ << line << "\n" << std::flush;
    }
  }

  void log_row(const Json& row) {
    directory_.log(row);
    if (r_.json) out_ << json_text(row) << "\n" << std::flush;
  }

  void plot() {
    LossPlot plot;
    plot.title = std::filesystem::path(directory_.path()).filename().string();
    for (const Json& row : directory_.read_log()) {
      const std::string type = row.value("type", "");
      if (type == "step")
        plot.train.push_back({row["step"].get<double>(), row["loss"].get<double>()});
      if (type == "eval" && row["eval_loss"].is_number())  // null: not finite
        plot.held_out.push_back({row["step"].get<double>(), row["eval_loss"].get<double>()});
    }
    write_loss_plot(plot, directory_.file("loss.png"));
  }

  void after() {
    // A run that is resumed at its last step has not measured anything yet.
    if (last_losses_.empty()) last_losses_ = held_out_losses();
    plot();
    std::ostream& text = r_.json ? log_ : out_;
    const std::vector<std::string> exported = s_.trains_weights()
                                                  ? export_model(s_, directory_.path())
                                                  : export_adapter(s_, directory_.path());
    print_losses(text);
    print_answers(text);
    const std::int64_t predicted = s_.fit.total_bytes();
    text << "memory     planned " << size_text(predicted) << ", allocated "
         << size_text(s_.backend->allocated_bytes())
         << (predicted == s_.backend->allocated_bytes() &&
                     s_.fit.pinned_bytes() == s_.backend->host_allocated_bytes()
                 ? " (equal to the byte)"
                 : " (NOT equal)");
    if (s_.fit.pinned_bytes() > 0) {
      text << ", and " << size_text(s_.backend->host_allocated_bytes()) << " on the host";
    }
    const std::int64_t beside = s_.backend->overhead_bytes();
    if (beside > 0) {
      text << "; the device took " << size_text(beside) << " beside them, "
           << (beside == overhead_at_start_
                   ? "unchanged since the start"
                   : size_text(beside - overhead_at_start_) + " more than at the start");
    }
    text << "; process peak " << size_text(os::peak_resident_bytes()) << " resident, "
         << size_text(s_.loaded->mapped_bytes()) << " of it mapped weights at most\n";
    text << "time       " << time_text(train_seconds_) << " training\n";
    text << "loss curve " << directory_.file("loss.png") << "\n";
    for (const std::string& path : exported) text << "saved      " << path << "\n";
    print_next(text);
    log_row({{"type", "done"},
             {"step", s_.trainer->step()},
             {"peak_bytes", s_.backend->allocated_bytes()},
             {"planned_bytes", predicted},
             {"host_bytes", s_.backend->host_allocated_bytes()},
             {"overhead_bytes", beside},
             {"overhead_grew_bytes", beside - overhead_at_start_},
             {"seconds", train_seconds_}});
  }

  void print_losses(std::ostream& text) {
    if (first_losses_.empty() || first_losses_.size() != last_losses_.size()) return;
    double sum = 0, squares = 0;
    const auto n = static_cast<double>(first_losses_.size());
    for (std::size_t i = 0; i < first_losses_.size(); ++i) {
      const double difference = first_losses_[i].mean() - last_losses_[i].mean();
      sum += difference;
      squares += difference * difference;
    }
    const double mean = sum / n;
    const double error = n > 1 ? std::sqrt(std::max(0.0, squares / n - mean * mean) / (n - 1)) : 0;
    text << format("held out   loss %.4f before, %.4f after", mean_loss(first_losses_),
                   mean_loss(last_losses_));
    text << format("; row means fell by %.4f", mean);
    if (n > 1)
      text << format(" (standard error %.4f, %lld rows)", error, static_cast<long long>(n));
    text << "\n";
  }

  void print_answers(std::ostream& text) {
    const std::vector<Answer> now = answers();
    const std::size_t count = std::min(now.size(), first_answers_.size());
    for (std::size_t i = 0; i < std::min<std::size_t>(count, 3); ++i) {
      text << "prompt     " << one_line(now[i].prompt, 300) << "\n"
           << "  wanted   " << one_line(now[i].wanted, 200) << "\n"
           << "  before   " << one_line(first_answers_[i].got, 200) << "\n"
           << "  after    " << one_line(now[i].got, 200) << "\n";
    }
    if (r_.sample_prompts.empty()) return;
    const auto exact = [&](const std::vector<Answer>& answers) {
      return std::count_if(answers.begin(), answers.end(),
                           [](const Answer& a) { return trimmed(a.got) == trimmed(a.wanted); });
    };
    text << "exact      " << exact(first_answers_) << " of " << count << " answers before, "
         << exact(now) << " of " << count << " after (" << r_.sample_prompts << ")\n";
  }

  bool speaks_chatml() const {
    try {
      ChatTemplate{*s_.tokenizer};
      return true;
    } catch (const Unsupported&) {
      return false;
    }
  }

  // Whether other programs read the base as it is: a GGUF without Nibble's NF4 planes.
  bool is_stock_gguf(const std::string& base) const {
    const auto& tensors = s_.loaded->checkpoint().tensors();
    return base.ends_with(".gguf") &&
           std::none_of(tensors.begin(), tensors.end(),
                        [](const Checkpoint::Tensor& t) { return is_plane(t.type.dtype); });
  }

  void print_next(std::ostream& text) {
    const std::string result = s_.trains_weights()
                                   ? directory_.file("model.gguf")
                                   : r_.model + " --adapter " + directory_.file("adapter") +
                                         (s_.loaded->converted() > 0 ? " --method qlora" : "");
    if (speaks_chatml()) {
      text << "chat       nibble chat -m " << result << "\n";
    } else {
      text << "ask        nibble generate -m " << result << " --prompt TEXT\n";
    }
    // The embedded model as other programs find it, in the source tree.
    const std::string base = r_.model == "tiny" ? "models/tiny/model.gguf" : r_.model;
    if (s_.trains_weights()) {
      text << "serve      llama-server -m " << result << "\n";
    } else if (is_stock_gguf(base)) {
      text << "serve      llama-server -m " << base << " --lora " << directory_.file("adapter.gguf")
           << "\n";
    } else {
      text << "serve      gguf-convert " << base << " merged.gguf --type q8_0 --adapter "
           << directory_.file("adapter") << " && llama-server -m merged.gguf\n";
    }
  }

  FinetuneSetup s_;
  Recipe& r_;
  RunDirectory directory_;
  std::ostream& out_;
  std::ostream& log_;
  bool terminal_;
  bool interrupted_ = false;
  std::int64_t overhead_at_start_ = 0;
  std::int64_t tokens_done_ = 0;  // by the current step, padding aside
  double train_seconds_ = 0;
  std::vector<RowLoss> first_losses_, last_losses_;
  std::vector<Answer> first_answers_;
};

// What config.json keeps: the flags, and which rows --data held. As it reads back, so that it can
// be compared: file names need not be UTF-8.
Json run_config(const FinetuneSetup& s) {
  Json config = to_json(s.recipe);
  config[kDataRead] = {
      {"rows", s.data_read.rows},
      {"tokens", s.data_read.tokens},
      {"fnv1a", format("%016llx", static_cast<unsigned long long>(s.data_read.fingerprint))}};
  return Json::parse(json_text(config));
}

// A resumed run must be the run that was started: names each recipe flag that differs.
void check_same_recipe(const RunDirectory& directory, const Json& config) {
  const auto before = directory.config();
  if (!before) return;
  const auto differences = recipe_differences(*before, config);
  if (differences.empty()) return;
  std::string message = directory.path() + " was started with another recipe:";
  for (const std::string& difference : differences) message += " " + difference + ";";
  throw Error(message + " give the old values, or another --out for a new run");
}

// --overwrite must not delete what the run starts from.
void check_overwrite(const Recipe& r) {
  std::vector<std::string> inputs = r.data;
  inputs.insert(inputs.end(), {r.model, r.adapter, r.eval_data, r.sample_prompts});
  for (const std::string& input : inputs) {
    if (input.empty() || !would_overwrite(r.out, input)) continue;
    throw Error("--overwrite would delete " + input +
                ", which this run reads; choose another --out");
  }
}

// A prediction, or null where the device's figures are not known.
Json known(double value) { return value > 0 ? Json(value) : Json(); }

// Says what the run needs, which is the least of all plans unless --storage named one, and what to
// run instead.
int refuse(const FinetuneSetup& s, const Recipe& asked, std::ostream& log) {
  const FitReport& fit = s.fit;
  if (fit.pinned_budget_bytes > 0 && fit.pinned_bytes() > fit.pinned_budget_bytes) {
    log << "nibble: the run page-locks " << size_text(fit.pinned_bytes())
        << " of host memory, --host-memory allows " << size_text(fit.pinned_budget_bytes);
  } else {
    const bool chosen = asked.storage == "auto";
    const std::string source = s.replanned             ? "there are now"
                               : !asked.memory.empty() ? "--memory allows"
                               : !asked.card.empty()   ? "--card " + asked.card + " has"
                                                       : "this machine has";
    log << "nibble: the run needs " << (chosen ? "at least " : "")
        << size_text(fit.total_bytes() + fit.context_bytes) << ", " << source << " "
        << size_text(fit.budget_bytes);
    const std::int64_t host_room = fit.pinned_budget_bytes - fit.pinned_bytes();
    if (chosen && fit.excess_bytes() > host_room) {
      log << ", and of the host, which is full, --host-memory allows "
          << size_text(fit.pinned_budget_bytes);
    }
  }
  const std::vector<Alternative> instead = alternatives(asked, s.recipe, s.plans_only);
  log << (instead.empty() ? "; no --micro-batch, --rank or --seq makes it fit\n"
                          : "; this fits:\n");
  for (const Alternative& a : instead) {
    log << "  " << a.command << "\n    " << size_text(a.fit.total_bytes()) << ", storage "
        << a.fit.storage;
    if (a.fit.tokens_per_s > 0) log << format(", %.0f tokens/s predicted", a.fit.tokens_per_s);
    log << "\n";
  }
  return 1;
}

void draw_plan(const FinetuneSetup& s, const std::string& path) {
  std::filesystem::path model(s.recipe.model);
  if (!model.has_filename()) model = model.parent_path();  // it ended with a slash
  const PictureText words = {
      "memory of " + model.filename().string() + ", storage " + s.fit.storage,
      count_text(s.buckets.back()) + " tokens at once"};
  write_plan_picture(words, s.trainer->training_plan(), s.trainer->training_loss(), path);
}

}  // namespace

int finetune(const Recipe& recipe, std::ostream& out, std::ostream& log) {
  if (recipe.resume && recipe.out.empty()) {
    throw Error("--resume needs --out DIR, the directory of the run to go on with");
  }
  FinetuneSetup setup = set_up(recipe, log);
  print_fit(setup.fit, log);
  if (!setup.fit.fits()) return refuse(setup, recipe, log);
  if (recipe.dry_run) {
    log << "dry run    nothing was read or written\n";
    return 0;
  }
  // Before the run directory is touched: an earlier run in it stays what it is when this fails.
  const Recipe planned = reserve_or_replan(setup, recipe, log);
  if (!setup.fit.fits()) {
    print_fit(setup.fit, log);
    return refuse(setup, planned, log);
  }
  if (setup.recipe.out.empty()) {
    setup.recipe.out = default_run_directory(setup.recipe.model, setup.recipe.data.front());
  }
  const auto open = recipe.resume      ? RunDirectory::Open::resume
                    : recipe.overwrite ? RunDirectory::Open::overwrite
                                       : RunDirectory::Open::fresh;
  if (open == RunDirectory::Open::overwrite) check_overwrite(setup.recipe);
  RunDirectory directory(setup.recipe.out, open);
  const Json config = run_config(setup);
  if (recipe.resume) check_same_recipe(directory, config);
  directory.write_config(config);
  log << "run        " << directory.path() << "\n";
  return Run(std::move(setup), std::move(directory), out, log).execute();
}

int fit(const Recipe& recipe, std::ostream& out, std::ostream& log) {
  const FinetuneSetup setup = set_up(recipe, log, true);
  if (recipe.json) {
    Json lines = Json::object(), pinned = Json::object(), host = Json::object();
    for (const FitReport::Line& line : setup.fit.device) lines[line.name] = line.bytes;
    for (const FitReport::Line& line : setup.fit.pinned) pinned[line.name] = line.bytes;
    for (const FitReport::Line& line : setup.fit.host) host[line.name] = line.bytes;
    out << Json{{"fits", setup.fit.fits()},
                {"total_bytes", setup.fit.total_bytes()},
                {"budget_bytes", setup.fit.budget_bytes},
                {"lines", lines},
                {"context_bytes", setup.fit.context_bytes},
                {"pinned_lines", pinned},
                {"pinned_budget_bytes", setup.fit.pinned_budget_bytes},
                {"host_lines", host},
                {"storage", setup.fit.storage},
                {"steps", setup.recipe.steps},
                {"tokens_per_s", known(setup.fit.tokens_per_s)},
                {"hours", known(setup.fit.hours)}}
               .dump()
        << "\n";
  } else {
    print_fit(setup.fit, out);
  }
  if (!recipe.picture.empty()) {
    draw_plan(setup, recipe.picture);
    (recipe.json ? log : out) << "picture    " << recipe.picture << "\n";
  }
  return setup.fit.fits() ? 0 : refuse(setup, recipe, log);
}

}  // namespace nibble
