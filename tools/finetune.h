// `nibble finetune`: the whole run, from headers to exported adapter. `nibble fit`: its first half.
#pragma once

#include <iosfwd>

#include "tools/recipe.h"

namespace nibble {

// Return the exit code: 0 done, 1 does not fit, 130 interrupted after a checkpoint. Throw Error.
int finetune(const Recipe& recipe, std::ostream& out, std::ostream& log);
int fit(const Recipe& recipe, std::ostream& out, std::ostream& log);

}  // namespace nibble
