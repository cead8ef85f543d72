// What to run instead of a finetune that does not fit.
#pragma once

#include <string>
#include <vector>

#include "engine/fit.h"
#include "tools/recipe.h"

namespace nibble {

struct Alternative {
  Recipe recipe;
  FitReport fit;
  std::string command;  // complete, for a shell
};

// At most `most` variations of `asked` that fit, each planned: those that change least first.
// `plans_only` as for set_up(). A variation that cannot be set up is left out.
std::vector<Alternative> alternatives(const Recipe& asked, const Recipe& resolved, bool plans_only,
                                      std::size_t most);

}  // namespace nibble
