// What the user asked of a finetuning run: every flag of `nibble finetune` and `nibble fit`, their
// defaults, and the config.json that a run directory keeps. Parser, help and config come from the
// one table in recipe.cpp.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "tools/backend.h"

namespace CLI {
class App;
}

namespace nibble {

struct Recipe {
  // what
  std::string model, method = "qlora", adapter;
  std::vector<std::string> data;
  std::string format, train_on = "auto", eval_data, sample_prompts;
  std::string config;  // already turned into flags when the rest is parsed
  std::string eval_split = "2%";
  bool truncate = false, skip_bad = false;
  // where
  BackendChoice where;
  std::string out, compute, memory, host_memory, card, storage = "auto";
  bool resume = false, overwrite = false, dry_run = false, json = false;
  std::string picture;  // of the memory plan; fit only
  // adapter
  std::int64_t rank = 16;
  double alpha = 0, dropout = 0;  // alpha 0: twice the rank
  std::vector<std::string> targets = {"all-linear"};
  std::int64_t block = 64;
  bool no_double_quant = false;
  std::string no_quant, head;
  // optimizer
  double lr = 0, warmup = 0.03, epochs = 0;  // 0: chosen from model size and row count
  std::string schedule = "cosine";
  std::int64_t steps = 0, batch = 16, micro_batch = 0, sequence = 0;  // 0: auto
  std::int64_t accumulation = 0;  // another way to say micro_batch
  bool pack = false, group_by_length = false;
  std::string order = "shuffle";
  std::string optimizer = "adamw";
  double weight_decay = 0, beta2 = 0.999, clip = 1.0;
  std::uint64_t seed = 0;
  // keeping
  std::int64_t eval_every = 0, save_every = 0, keep_checkpoints = 2;  // 0: ten times a run
};

// Adds the flags of `recipe` to a command. `recipe` must outlive the parse. fit has those of
// finetune, without --data being needed, and its own.
void add_recipe_flags(CLI::App& command, Recipe& recipe, bool needs_data = true);
void add_fit_flags(CLI::App& command, Recipe& recipe);

// All flags but --out, --backend, --threads and the switches of a single start.
nlohmann::ordered_json to_json(const Recipe& recipe);

// The member of a run's config.json that is no flag: which rows --data held.
constexpr const char* kDataRead = "data_read";

// The flags that a recipe or a config.json stands for: {"--rank", "16", ...}; those left at
// their defaults are left out.
std::vector<std::string> recipe_flags(const nlohmann::ordered_json& recipe);
std::vector<std::string> config_flags(const std::string& path);

// One line per flag that differs and changes the result: "--lr was 0.0002, is 0.0001". More steps,
// memory, backend and saving may change.
std::vector<std::string> recipe_differences(const nlohmann::ordered_json& before,
                                            const nlohmann::ordered_json& now);

// "24G", "24GiB" (binary), "24GB" (decimal), "512M", plain bytes. Throws Error naming the flag.
std::int64_t parse_size(const std::string& text, const std::string& flag);

}  // namespace nibble
