#include "tools/alternatives.h"

#include <algorithm>
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

// From what changes no result to what changes it most.
std::vector<Recipe> variations(const Recipe& asked, const Recipe& resolved) {
  std::vector<Recipe> all;
  Recipe next = asked;
  next.storage = "auto";
  if (asked.storage != "auto") all.push_back(next);
  // Microbatches only split a step.
  next.accumulation = 0;
  for (std::int64_t rows = std::max<std::int64_t>(resolved.micro_batch, 1); rows > 1;) {
    rows = (rows + 1) / 2;
    next.micro_batch = rows;
    all.push_back(next);
  }
  next.micro_batch = 1;
  if (resolved.micro_batch == 0) all.push_back(next);
  const Recipe smallest = next;
  for (std::int64_t rank = resolved.rank / 2; rank >= 4 && asked.adapter.empty(); rank /= 2) {
    next.rank = rank;
    all.push_back(next);
  }
  next = smallest;
  for (std::int64_t length = resolved.sequence / 2; length >= 64; length /= 2) {
    next.sequence = length;
    next.truncate = !asked.data.empty();
    all.push_back(next);
  }
  return all;
}

}  // namespace

std::vector<Alternative> alternatives(const Recipe& asked, const Recipe& resolved, bool plans_only,
                                      std::size_t most) {
  std::vector<Alternative> found;
  std::int64_t last_sequence = 0, last_rank = 0;
  for (const Recipe& recipe : variations(asked, resolved)) {
    if (found.size() == most) break;
    // One of each kind: what is smaller still fits as well.
    if (!found.empty() && recipe.sequence == last_sequence && recipe.rank == last_rank) continue;
    try {
      std::ostringstream quiet;
      const FinetuneSetup setup = set_up(recipe, quiet, plans_only);
      if (!setup.fit.fits()) continue;
      const bool shorter = recipe.sequence != asked.sequence, lower = recipe.rank != asked.rank;
      const bool have_shorter = std::any_of(found.begin(), found.end(), [&](const Alternative& a) {
        return a.recipe.sequence != asked.sequence;
      });
      const bool have_lower = std::any_of(found.begin(), found.end(), [&](const Alternative& a) {
        return a.recipe.rank != asked.rank;
      });
      if ((shorter && have_shorter) || (lower && have_lower)) continue;
      found.push_back({recipe, setup.fit, command_line(recipe)});
      last_sequence = recipe.sequence;
      last_rank = recipe.rank;
    } catch (const Error&) {
      continue;
    }
  }
  return found;
}

}  // namespace nibble
