#include "tools/alternatives.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "engine/error.h"
#include "tools/finetune_setup.h"

namespace nibble {
namespace {

// `word` as a shell reads it back.
std::string quoted(const std::string& word) {
  const std::string plain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:,+%=@";
  if (!word.empty() && word.find_first_not_of(plain) == std::string::npos) return word;
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? "'\\''" : std::string(1, c);
  return text + "'";
}

std::string command_line(const Recipe& r) {
  std::string line = "nibble finetune";
  const auto add = [&](const std::string& word) { line += " " + quoted(word); };
  const auto add_flag = [&](const char* flag, const std::string& value, const std::string& unset) {
    if (value == unset) return;
    add(flag);
    add(value);
  };
  for (const std::string& word : recipe_flags(to_json(r))) add(word);
  add_flag("--out", r.out, "");
  add_flag("--backend", r.where.name, BackendChoice().name);
  add_flag("--kernels", r.where.kernels, BackendChoice().kernels);
  add_flag("--threads", std::to_string(r.where.threads), "0");
  return line;
}

// Ways to need less, each from the smallest change on.
std::vector<std::vector<Recipe>> variations(const Recipe& asked, const Recipe& resolved) {
  Recipe next = asked;
  next.storage = "auto";
  next.accumulation = 0;
  std::vector<Recipe> same_result = {next};  // microbatches only split a step
  for (std::int64_t rows = resolved.micro_batch > 0 ? resolved.micro_batch : asked.batch;
       rows > 1;) {
    rows = (rows + 1) / 2;
    next.micro_batch = rows;
    same_result.push_back(next);
  }
  std::vector<Recipe> lower_ranks, shorter_rows;
  for (std::int64_t rank = resolved.rank / 2; rank >= 4 && asked.adapter.empty(); rank /= 2) {
    lower_ranks.push_back(next);
    lower_ranks.back().rank = rank;
  }
  for (std::int64_t length = resolved.sequence / 2; length >= 64; length /= 2) {
    shorter_rows.push_back(next);
    shorter_rows.back().sequence = length;
    shorter_rows.back().truncate = !asked.data.empty();
  }
  return {same_result, lower_ranks, shorter_rows};
}

}  // namespace

std::vector<Alternative> alternatives(const Recipe& asked, const Recipe& resolved,
                                      bool plans_only) {
  std::vector<Alternative> found;
  for (const std::vector<Recipe>& way : variations(asked, resolved)) {
    for (const Recipe& recipe : way) {
      std::ostringstream quiet;
      FinetuneSetup setup;
      try {
        setup = set_up(recipe, quiet, plans_only);
      } catch (const Error&) {
        continue;  // a sequence too short for a row, say
      }
      if (!setup.fit.fits()) continue;
      found.push_back({setup.fit, command_line(recipe)});
      break;
    }
  }
  return found;
}

}  // namespace nibble
