#include "tools/recipe.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/os.h"
#include "tools/cards.h"

namespace nibble {

void add_recipe_flags(CLI::App& command, Recipe& r, bool needs_data) {
  const auto what = "What to train";
  command
      .add_option("--model,-m,--model-name", r.model,
                  "Hugging Face directory, .gguf file, or random:CONFIG.json")
      ->group(what)
      ->required();
  command
      .add_option("--data,-d,--dataset", r.data,
                  "training rows, .jsonl or .json (several: -d A -d B)")
      ->take_all()
      ->group(what)
      ->required(needs_data);
  command.add_option("--method", r.method, "qlora: adapter over 4-bit weights | lora | full")
      ->group(what)
      ->check(CLI::IsMember({"qlora", "lora", "full"}))
      ->capture_default_str();
  command
      .add_option("--adapter", r.adapter,
                  "start from this adapter (PEFT or GGUF); its rank, alpha and targets win")
      ->group(what);
  command.add_option("--format", r.format, "row format; detected when left out")
      ->group(what)
      ->check(CLI::IsMember({"alpaca", "completion", "messages", "text"}));
  command.add_option("--train-on", r.train_on, "auto | all | completion | assistant")
      ->group(what)
      ->check(CLI::IsMember({"auto", "all", "completion", "assistant"}))
      ->capture_default_str();
  command.add_option("--eval-data", r.eval_data, "held-out rows")->group(what);
  command
      .add_option("--eval-split,--val-set-size", r.eval_split,
                  "share of the rows (2%) or number of rows to hold out, without --eval-data")
      ->group(what)
      ->capture_default_str();
  command
      .add_option("--sample-prompts", r.sample_prompts,
                  "rows whose answers are shown before and after; default: two held-out rows of at "
                  "most 2,048 tokens")
      ->group(what);
  command.add_flag("--truncate", r.truncate, "cut rows longer than --seq instead of refusing them")
      ->group(what);
  command.add_flag("--skip-bad", r.skip_bad, "count malformed rows and go on")->group(what);

  command
      .add_option("--config", r.config,
                  "flags from a JSON file, such as a run's config.json; flags given here win")
      ->group(what);

  const auto where = "Where it runs";
  command.add_option("--out,-o,--output-dir", r.out, "run directory; default runs/MODEL-DATA-NN")
      ->group(where);
  add_backend_flags(command, r.where, where);
  command.add_option("--compute", r.compute, "f32 | bf16; default f32 on a CPU, bf16 on a GPU")
      ->group(where)
      ->check(CLI::IsMember({"f32", "bf16"}));
  command
      .add_option("--memory,--vram", r.memory,
                  "most bytes on the device, such as 24G; a GPU's context counts")
      ->group(where);
  command
      .add_option("--host-memory", r.host_memory,
                  "most bytes to page-lock beside it; default 60 % of the machine's")
      ->group(where);
  command
      .add_option(
          "--card", r.card,
          "stay within what this card has: " + card_list() + "; fit plans for it on any machine")
      ->group(where)
      ->check(CLI::IsMember(card_names()));
  command
      .add_option(
          "--storage", r.storage,
          "store | cheap | attention | block: what the backward pass keeps and what it "
          "recomputes, or LEAN:N+RUNG for the first N blocks and the rest; behind it "
          "\",offload:inputs\", \":attention\", \":inputs+gate\", \":gate\", \":inputs+gate+up\" "
          "or \":up\": what waits in host memory, "
          "\",stream:N\": blocks whose weights do, \",mlp:N\": rows that an MLP works on at a "
          "time, \",loss:N\": rows whose logits exist at a time; auto: the fastest that fits "
          "--memory")
      ->group(where)
      ->capture_default_str();
  auto* resume =
      command.add_flag("--resume", r.resume, "go on from the newest checkpoint of --out")
          ->group(where);
  command.add_flag("--overwrite", r.overwrite, "replace what --out holds")
      ->group(where)
      ->excludes(resume);
  command.add_flag("--dry-run", r.dry_run, "stop before weights are read")->group(where);
  command.add_flag("--json", r.json, "print the log's rows to stdout and nothing else")
      ->group(where);

  const auto adapter = "Adapter and quantization";
  command.add_option("--rank,--lora-r,-r", r.rank, "rank of the LoRA matrices")
      ->group(adapter)
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command.add_option("--alpha,--lora-alpha", r.alpha, "scale is alpha / rank; default 2 * rank")
      ->group(adapter)
      ->check(CLI::PositiveNumber);
  command.add_option("--dropout,--lora-dropout", r.dropout, "in the adapter's down projection")
      ->group(adapter)
      ->check(CLI::Range(0.0, 0.99))
      ->capture_default_str();
  command
      .add_option("--targets,--target-modules", r.targets,
                  "all-linear, HF or GGUF names (q_proj,attn_v), or a regular expression")
      ->group(adapter)
      ->take_all()
      ->delimiter(',')
      ->capture_default_str();
  command.add_option("--block", r.block, "NF4 quantization block")
      ->group(adapter)
      ->capture_default_str();
  command.add_flag("--no-double-quant", r.no_double_quant, "keep NF4's absmax in F32")
      ->group(adapter);
  command
      .add_option("--no-quant", r.no_quant, "regular expression: matrices that stay as they are")
      ->group(adapter);
  command.add_option("--head", r.head, "storage type of the output matrix")->group(adapter);

  const auto how = "Optimizer and schedule";
  command
      .add_option("--lr,--learning-rate", r.lr,
                  "default 2e-4; 1e-4 from 30B; 2e-5 for --method full")
      ->group(how)
      ->check(CLI::PositiveNumber);
  command
      .add_option("--schedule,--lr-scheduler,--lr-scheduler-type", r.schedule,
                  "cosine | linear | constant")
      ->group(how)
      ->check(CLI::IsMember({"cosine", "linear", "constant"}))
      ->capture_default_str();
  command
      .add_option("--warmup,--warmup-steps,--warmup-ratio", r.warmup,
                  "steps when 1 or more, else share of the run")
      ->group(how)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--epochs,--num-epochs,--num-train-epochs", r.epochs,
                  "default 3 below 10,000 rows, else 1")
      ->group(how)
      ->check(CLI::PositiveNumber);
  command.add_option("--steps,--max-steps", r.steps, "optimizer steps, instead of --epochs")
      ->group(how)
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 40));
  command
      .add_option("--batch,--batch-size", r.batch, "rows (with --pack: packs) per optimizer step")
      ->group(how)
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      .add_option("--micro-batch,--per-device-train-batch-size", r.micro_batch,
                  "rows of --seq tokens that run at once; default: chosen for speed")
      ->group(how)
      ->check(CLI::Range(1, 1 << 20));
  command
      .add_option("--gradient-accumulation-steps", r.accumulation,
                  "microbatches per step: sets --micro-batch to --batch divided by it")
      ->group(how)
      ->check(CLI::Range(1, 1 << 20));
  command
      .add_option("--seq,--max-length,--max-seq-length,--sequence-len", r.sequence,
                  "most tokens of a row; default: the longest row, at most 4096 and the context")
      ->group(how)
      ->check(CLI::Range(2, 1 << 20));
  command
      .add_flag("--pack,!--no-pack", r.pack,
                "fill --seq with several rows, which never see each other")
      ->group(how);
  command.add_flag("--group-by-length", r.group_by_length, "rows of similar length share a step")
      ->group(how);
  command.add_option("--order", r.order, "shuffle | as-is")
      ->group(how)
      ->check(CLI::IsMember({"shuffle", "as-is"}))
      ->capture_default_str();
  command
      .add_option("--optimizer,--optim", r.optimizer,
                  "adamw | adamw8bit: moments in 8 bits, a quarter of their memory")
      ->group(how)
      ->check(CLI::IsMember({"adamw", "adamw8bit"}))
      ->capture_default_str();
  command.add_option("--weight-decay", r.weight_decay, "of matrices")
      ->group(how)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--beta2,--adam-beta2", r.beta2, "of AdamW")
      ->group(how)
      ->check(CLI::Range(0.0, 0.9999999))
      ->capture_default_str();
  command.add_option("--clip,--max-grad-norm", r.clip, "largest gradient norm; 0: no limit")
      ->group(how)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--seed", r.seed, "of adapter, row order and dropout")
      ->group(how)
      ->capture_default_str();

  const auto keep = "What is kept";
  command
      .add_option("--eval-every,--eval-steps", r.eval_every,
                  "steps between held-out losses; default: ten a run")
      ->group(keep)
      ->check(CLI::PositiveNumber);
  command
      .add_option("--save-every,--save-steps", r.save_every,
                  "steps between checkpoints; default: ten a run")
      ->group(keep)
      ->check(CLI::PositiveNumber);
  command
      .add_option("--keep-checkpoints,--save-total-limit", r.keep_checkpoints,
                  "newest checkpoints to keep")
      ->group(keep)
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
}

void add_fit_flags(CLI::App& command, Recipe& r) {
  add_recipe_flags(command, r, /*needs_data=*/false);
  command
      .add_option("--picture", r.picture,
                  "draw who holds which bytes of the arena, step by step, to this PNG")
      ->group("What is kept");
}

nlohmann::ordered_json to_json(const Recipe& r) {
  return {{"model", r.model},
          {"method", r.method},
          {"adapter", r.adapter},
          {"data", r.data},
          {"format", r.format},
          {"train_on", r.train_on},
          {"eval_data", r.eval_data},
          {"eval_split", r.eval_split},
          {"truncate", r.truncate},
          {"skip_bad", r.skip_bad},
          {"compute", r.compute},
          {"rank", r.rank},
          {"alpha", r.alpha},
          {"dropout", r.dropout},
          {"targets", r.targets},
          {"block", r.block},
          {"no_double_quant", r.no_double_quant},
          {"no_quant", r.no_quant},
          {"head", r.head},
          {"lr", r.lr},
          {"schedule", r.schedule},
          {"warmup", r.warmup},
          {"epochs", r.epochs},
          {"batch", r.batch},
          {"micro_batch", r.micro_batch},
          {"seq", r.sequence},
          {"pack", r.pack},
          {"group_by_length", r.group_by_length},
          {"order", r.order},
          {"optimizer", r.optimizer},
          {"weight_decay", r.weight_decay},
          {"beta2", r.beta2},
          {"clip", r.clip},
          {"seed", r.seed},
          {"steps", r.steps},
          {"storage", r.storage},
          {"memory", r.memory},
          {"host_memory", r.host_memory},
          {"card", r.card},
          {"sample_prompts", r.sample_prompts},
          {"eval_every", r.eval_every},
          {"save_every", r.save_every},
          {"keep_checkpoints", r.keep_checkpoints}};
}

std::vector<std::string> recipe_flags(const nlohmann::ordered_json& config) {
  std::vector<std::string> flags;
  const Recipe unset_recipe;
  const nlohmann::ordered_json defaults = to_json(unset_recipe);
  for (const auto& [key, value] : config.items()) {
    if (key == kDataRead) continue;
    const auto unset = defaults.find(key);  // a default such as 0 need not be a value to give
    if (unset != defaults.end() && *unset == value) continue;
    std::string flag = "--" + key;
    std::replace(flag.begin(), flag.end(), '_', '-');
    const auto add = [&](const nlohmann::ordered_json& item) {
      const std::string text = item.is_string() ? item.get<std::string>() : item.dump();
      if (text.empty()) return;
      flags.push_back(flag);
      flags.push_back(text);
    };
    if (value.is_boolean()) {
      if (value.get<bool>()) flags.push_back(flag);
    } else if (value.is_array()) {
      for (const auto& item : value) add(item);
    } else {
      add(value);
    }
  }
  return flags;
}

std::vector<std::string> config_flags(const std::string& path) {
  nlohmann::ordered_json config;
  try {
    config = nlohmann::ordered_json::parse(os::read_file(path));
  } catch (const nlohmann::json::exception& e) {
    throw Error(path + ": " + e.what());
  }
  if (!config.is_object()) throw Error(path + ": not a JSON object of flags");
  return recipe_flags(config);
}

std::vector<std::string> recipe_differences(const nlohmann::ordered_json& before,
                                            const nlohmann::ordered_json& now) {
  // Where a run's values live and what is kept of it do not change its bytes.
  constexpr std::array<std::string_view, 7> free_to_change = {
      "storage", "memory", "host_memory", "card", "eval_every", "save_every", "keep_checkpoints"};
  std::vector<std::string> differences;
  for (const auto& [key, value] : now.items()) {
    if (std::find(free_to_change.begin(), free_to_change.end(), key) != free_to_change.end())
      continue;
    const auto old = before.find(key);
    if (old == before.end() || *old == value) continue;
    if (key == kDataRead) {
      differences.push_back("--data has other rows than when the run was started");
      continue;
    }
    std::string flag = "--" + key;
    std::replace(flag.begin(), flag.end(), '_', '-');
    if (key == "steps" && value >= *old) continue;  // a run may be made longer
    differences.push_back(flag + " was " + old->dump() + ", is " + value.dump());
  }
  return differences;
}

std::int64_t parse_size(const std::string& text, const std::string& flag) {
  std::size_t end = 0;
  double number = 0;
  try {
    number = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  std::string unit = text.substr(end);
  for (char& c : unit) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  const std::string prefixes = "KMGT";
  double factor = 1;
  bool known = end > 0 && number > 0;
  if (!unit.empty() && unit != "B") {
    const std::size_t power = prefixes.find(unit[0]);
    const std::string rest = unit.substr(1);
    known = known && power != std::string::npos && (rest.empty() || rest == "IB" || rest == "B");
    factor = std::pow(rest == "B" ? 1000.0 : 1024.0, static_cast<double>(power + 1));
  }
  if (!known || number * factor > 1e18) {
    throw Error(flag + " " + text +
                " is not a size; write 24G or 24GiB (binary), 24GB (decimal), "
                "512M, or bytes");
  }
  return static_cast<std::int64_t>(number * factor);
}

}  // namespace nibble
