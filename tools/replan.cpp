#include "tools/replan.h"

#include <algorithm>
#include <optional>
#include <ostream>
#include <sstream>

#include "engine/error.h"
#include "tools/text.h"

namespace nibble {
namespace {

// The recipe for the second plan. A card says by itself what is free when it is opened again; of
// main memory only the refusal tells, and reading the weights and the threads need some as well.
Recipe lowered(const Recipe& asked, const BackendInfo& info, std::int64_t there) {
  Recipe recipe = asked;
  if (is_cuda(info)) return recipe;
  const std::int64_t cap = device_cap(asked).value_or(there);
  recipe.memory = std::to_string(std::max<std::int64_t>(1, std::min(cap, there / 10 * 8)));
  return recipe;
}

std::string plan_text(const FitReport& fit) {
  return size_text(fit.total_bytes()) + " with storage " + fit.storage;
}

// More than was seen: the next plan may have a few more steps to record.
constexpr std::int64_t kContextMargin = 24 << 20;

}  // namespace

Recipe reserve_or_replan(FinetuneSetup& s, const Recipe& asked, std::ostream& log) {
  Recipe recipe = asked;
  std::string reason;
  std::optional<std::int64_t> context;
  try {
    reserve(s);
    const std::int64_t taken = s.backend->overhead_bytes();
    if (s.fit.context_bytes == 0 || s.fit.excess_bytes() + taken <= s.fit.context_bytes) {
      return asked;
    }
    context = taken + kContextMargin;
    reason = "the device takes " + size_text(taken) + " beside the plan, " +
             size_text(s.fit.context_bytes) + " were set aside";
  } catch (const OutOfMemory& e) {
    if (e.kind == MemoryKind::host) throw;
    recipe = lowered(asked, s.backend->info(), e.budget_bytes);
    reason = e.what();
  }
  const std::string before = plan_text(s.fit);
  s.release();
  std::ostringstream quiet;
  s = set_up(recipe, quiet, /*plans_only=*/false, context);
  s.replanned = true;
  s.recipe.memory = asked.memory;  // what config.json keeps: another start may find more
  log << "re-planned: " << reason << " (" << before << " were planned, now " << plan_text(s.fit)
      << ")\n";
  if (s.fit.fits()) reserve(s);
  return recipe;
}

}  // namespace nibble
