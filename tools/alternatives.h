// What to run instead of a finetune that does not fit.
#pragma once

#include <string>
#include <vector>

#include "engine/fit.h"
#include "tools/recipe.h"

namespace nibble {

struct Alternative {
  FitReport fit;
  std::string command;  // complete, for a shell
};

// Variations of `asked` that fit, each planned: one with smaller microbatches, which give the same
// result, one with a lower rank, one with shorter rows. `plans_only` as for set_up().
std::vector<Alternative> alternatives(const Recipe& asked, const Recipe& resolved, bool plans_only);

}  // namespace nibble
