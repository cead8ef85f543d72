// Which storage policy and how much paging a run gets, and what that costs.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <ostream>

#include "engine/error.h"
#include "engine/os.h"
#include "tools/cards.h"
#include "tools/finetune_setup.h"
#include "tools/text.h"

namespace nibble {
namespace {

constexpr int kMostSplits = 6;  // depths to try
constexpr std::int64_t kMargin = 4 << 20;
constexpr std::int64_t kPagedArrays = 3;  // masters and two moments, each rounded up
// What more traffic has to save to be worth it.
constexpr double kWorthwhile = 0.99;
// Parts of the rows that an MLP works on in turn, where it does; it may from so many rows on, and
// where nothing fits without.
constexpr std::int64_t kMlpParts = 8, kLongRows = 16384;
constexpr std::int64_t kStreamedInArena = kStreamedAhead + 1;  // blocks, the one in use among them

// How a step runs: what its blocks keep, and how many of the optimizer's elements are on the host.
struct Policy {
  StoragePolicy storage;
  std::int64_t paged = 0;
  bool embedding_on_host = false;
};

enum class Plans { draft, all };
// What may leave for the host beside activations, each with those before it.
enum class Leaving { none, optimizer, weights };

// What the run may take on the device, and how much of that the device's own context is.
struct Budget {
  std::int64_t bytes, context_bytes;
};

Budget budget(const FinetuneSetup& s) {
  const BackendInfo info = s.backend->info();
  const std::optional<std::int64_t> cap = device_cap(s.recipe);
  // Main memory is shared with everything else.
  if (!is_cuda(info)) return {cap.value_or(info.memory_bytes / 10 * 8), 0};
  // A card's is what was free, which was read when the context was there.
  const std::int64_t context = s.measured_context_bytes.value_or(
      kContextBytes + kRecordedStepBytes * s.trainer->recorded_steps());
  if (cap && *cap - context <= info.memory_bytes) return {*cap, context};
  return {info.memory_bytes, 0};
}

// Bytes too many, of the last plan.
std::int64_t excess(const FinetuneSetup& s) {
  const Budget most = budget(s);
  return s.fit.total_bytes() + most.context_bytes - most.bytes;
}

void predict_speed(FinetuneSetup& s) {
  const DeviceRates rates = device_rates(s.backend->info());
  if (!rates.known() || s.without_adapter) return;
  FitReport& fit = s.fit;
  fit.step_seconds = s.trainer->estimate_step(rates, s.work.average_span, s.work.rows_per_step);
  fit.tokens_per_s = s.work.tokens_per_step / fit.step_seconds;
  const auto steps = static_cast<double>(s.recipe.steps);
  fit.hours = steps * fit.step_seconds / 3600;
  if (s.work.evaluated_rows > 0 && s.recipe.eval_every > 0) {
    const double evaluations = 1 + std::ceil(steps / static_cast<double>(s.recipe.eval_every));
    fit.hours += evaluations *
                 s.trainer->estimate_evaluation(rates, s.work.average_span, s.work.evaluated_rows) /
                 3600;
  }
}

// Programs for one policy, and what they cost.
void plan_policy(FinetuneSetup& s, const Policy& policy, std::int64_t sample_context, Plans plans) {
  const Recipe& r = s.recipe;
  TrainerOptions options;
  options.compute = compute_dtype(r.compute);
  options.optimizer = r.optimizer == "adamw8bit" ? Optimizer::adamw8bit : Optimizer::adamw;
  options.storage = policy.storage;
  options.paged_elements = policy.paged;
  options.buckets = s.buckets;
  options.evaluates = s.evaluates;
  options.training = !s.without_adapter;
  options.beta2 = r.beta2;
  options.clip = r.clip;
  options.seed = r.seed;
  options.draft = plans == Plans::draft;
  const Llama* llama = s.llama.get();
  ParameterTable table = llama->parameters();
  table.set_weight_decay(static_cast<float>(r.weight_decay));
  s.decoder.reset();
  s.loaded->place(policy.embedding_on_host, policy.storage);
  s.trainer = std::make_unique<Trainer>(
      *s.backend, std::move(table),
      [llama](Graph& graph, const LossInputs& in) { return llama->build_loss(graph, in); },
      options);
  if (sample_context > 0) {
    s.decoder =
        std::make_unique<Decoder>(s.trainer->runtime(), *llama, options.compute, sample_context,
                                  s.loaded->config().vocab, SampleOptions(), policy.storage);
  }
  s.loaded->promise_pages(s.trainer->runtime());
  s.fit = s.trainer->fit();
  s.fit.device.insert(s.fit.device.begin(), {"weights", s.loaded->weight_bytes()});
  if (s.loaded->embedding_bytes() > 0)
    s.fit.pinned.push_back({"input embedding", s.loaded->embedding_bytes()});
  if (s.loaded->streamed_bytes() > 0)
    s.fit.pinned.push_back({"streamed weights", s.loaded->streamed_bytes()});
  if (s.loaded->mapped_bytes() > 0)
    s.fit.host.push_back({"weights mapped", s.loaded->mapped_bytes()});
  s.fit.pinned_budget_bytes = host_budget(r);
  // A limit that nobody set matters where it is exceeded.
  if (device_cap(r) || s.fit.total_bytes() > s.backend->info().memory_bytes) {
    const Budget most = budget(s);
    s.fit.budget_bytes = most.bytes;
    s.fit.context_bytes = most.context_bytes;
  }
  predict_speed(s);
}

class Chooser {
 public:
  Chooser(FinetuneSetup& setup, std::int64_t sample_context)
      : s_(setup), sample_context_(sample_context) {}

  // Drafts decide; where the real layout then needs more than a draft's, it is decided again.
  void run(const std::optional<StoragePolicy>& forced) {
    for (int tries = 0; tries < 3; ++tries) {
      const Policy policy = forced ? with_storage(*forced) : fastest();
      const bool draft_fits = excess_ <= 0;
      plan_policy(s_, policy, sample_context_, Plans::all);
      if (!draft_fits || excess(s_) <= 0) return;
      margin_ += 2 * excess(s_) + kMargin;  // another policy, another layout
    }
  }

 private:
  // This storage, with as much paging as it needs.
  Policy with_storage(const StoragePolicy& storage) {
    Policy policy{.storage = storage};
    plan(policy);
    if (excess_ <= 0) return policy;
    policy.embedding_on_host = embedding_may_leave(policy);
    if (!policy.embedding_on_host) plan(policy);
    page(policy);
    return policy;
  }

  // The fastest policy that fits; the leanest when none does. Where everything cannot stay, the
  // embedding table leaves first, of which a step reads a few rows. What may leave next are
  // activations, the optimizer's arrays, which cross the bus once a step, and weights, which do so
  // in every pass; the blocks then keep as much as there is room for.
  Policy fastest() {
    known_.clear();
    Policy best;
    plan(best);
    if (excess_ <= 0) return best;
    best.embedding_on_host = embedding_may_leave(best);
    if (!best.embedding_on_host) plan(best);
    if (excess_ <= 0 || s_.without_adapter) return best;
    known_[best.storage.str()] = {excess_, host_room()};
    std::int64_t best_excess = excess_;
    double best_seconds = seconds();
    Leaving best_leaving = Leaving::none;
    const auto consider = [&](Policy policy, Leaving leaving) {
      search(policy, leaving);
      for (int tries = 0; tries < 3 && offload_less(policy); ++tries) search(policy, leaving);
      const double needed = seconds();
      const bool better = best_excess > 0 ? excess_ < best_excess
                                          : excess_ <= 0 && needed < kWorthwhile * best_seconds;
      if (!pinned_fits() || !better) return;
      best = policy;
      best_excess = excess_;
      best_seconds = needed;
      best_leaving = leaving;
    };
    Policy from;
    from.embedding_on_host = best.embedding_on_host;
    const auto consider_all = [&](std::initializer_list<Leaving> what) {
      from.storage.offload_split = 0;
      for (const Offload offload : {Offload::none, Offload::inputs, Offload::attention,
                                    Offload::inputs_gate, Offload::gate}) {
        from.storage.offload = offload;
        for (const Leaving leaving : what) {
          // Pages alone do not help where more was too many with nothing leaving.
          if (leaving == Leaving::optimizer && excess_ > pageable()) continue;
          consider(from, leaving);
        }
      }
    };
    consider_all({Leaving::none, Leaving::optimizer, Leaving::weights});
    // Where wide values of many rows are what takes most, fewer rows at a time leave room for the
    // blocks; the weights are then decoded as often as there are parts.
    const std::int64_t rows = s_.buckets.back();
    from.storage.mlp_rows = round_up((rows + kMlpParts - 1) / kMlpParts, kRowTile);
    if (best_excess > 0 && from.storage.mlp_rows < rows) {
      consider_all({Leaving::weights});
    } else if (rows >= kLongRows) {
      from.storage.offload = best.storage.offload;
      from.storage.offload_split = best.storage.offload_split;
      consider(from, best_leaving);
    }
    // The same for logits.
    from.storage.offload = best.storage.offload;
    from.storage.offload_split = best.storage.offload_split;
    from.storage.mlp_rows = best.storage.mlp_rows;
    from.storage.loss_rows = kRowTile;
    consider(from, best_leaving);
    excess_ = best_excess;
    return best;
  }

  bool embedding_may_leave(Policy policy) {
    policy.embedding_on_host = true;
    plan(policy);
    return pinned_fits();
  }
  bool pinned_fits() const { return s_.fit.pinned_bytes() <= s_.fit.pinned_budget_bytes; }
  void plan(const Policy& policy) {
    plan_policy(s_, policy, sample_context_, Plans::draft);
    excess_ = excess(s_) + margin_;
    planned_ = true;
  }
  std::int64_t host_room() const { return s_.fit.pinned_budget_bytes - s_.fit.pinned_bytes(); }
  std::int64_t pageable() const {
    if (s_.without_adapter) return 0;
    return s_.trainer->parameters().elements() / kParameterBlock *
           s_.trainer->pageable_bytes_per_block();
  }
  // Pages what the plan just made is too large by. The pages take room in the arena as well, so
  // that what was saved is looked at again.
  void page(Policy& policy) {
    const std::int64_t each = s_.trainer->pageable_bytes_per_block();
    const std::int64_t rounding = kPagedArrays * s_.backend->info().allocation_bytes;
    std::int64_t blocks = policy.paged / kParameterBlock;
    const std::int64_t most =
        std::clamp<std::int64_t>(host_room() + s_.trainer->paged_bytes(), 0, pageable());
    for (int tries = 0; tries < 3 && excess_ > 0 && blocks * each < most; ++tries) {
      blocks = std::min(blocks + (excess_ + rounding) / each + 1, most / each);
      policy.paged = blocks * kParameterBlock;
      plan(policy);
    }
  }
  // What streaming can take off the device.
  std::int64_t streamable() const {
    const std::int64_t blocks = s_.loaded->config().layers - kStreamedInArena;
    return std::max<std::int64_t>(0, blocks) * streamable_of_block();
  }
  std::int64_t streamable_of_block() const {
    return s_.loaded->streamable_bytes() / s_.loaded->config().layers;
  }
  // Streams as many blocks as are still too many.
  void stream(Policy& policy) {
    const std::int64_t layers = s_.loaded->config().layers;
    const std::int64_t each = streamable_of_block();
    if (each == 0) return;
    for (int tries = 0; tries < 3 && excess_ > 0 && policy.storage.streamed < layers; ++tries) {
      const std::int64_t in_arena = policy.storage.streamed == 0 ? kStreamedInArena : 0;
      const std::int64_t more = (excess_ + each - 1) / each + in_arena;
      policy.storage.streamed = std::min(policy.storage.streamed + more, layers);
      plan(policy);
    }
  }
  // Plain numbers serve where the device is not known: only their order matters.
  double seconds() const {
    if (s_.fit.step_seconds > 0) return s_.fit.step_seconds;
    const DeviceRates nominal{.flops = 1e14, .bytes = 1e12, .copy_bytes = 2e10, .launch = 3e-6};
    return s_.trainer->estimate_step(nominal, s_.work.average_span, s_.work.rows_per_step);
  }
  // Gives `policy` the fastest rungs that fit when what may leave does, and lets so much leave.
  void search(Policy& policy, Leaving leaving) {
    policy.storage.streamed = policy.paged = 0;
    choose_rungs(policy, leaving);
    if (leaving != Leaving::none) {
      page(policy);
      stream(policy);
    }
    if (!planned_) plan(policy);
  }
  // Where the host has no room for what every block may send, fewer blocks send it.
  bool offload_less(Policy& policy) {
    StoragePolicy& storage = policy.storage;
    const std::int64_t bytes = s_.trainer->runtime().page_bytes();
    if (storage.offload_split == 0) offloaded_bytes_[storage.offload] = bytes;
    if (pinned_fits() || storage.offload == Offload::none) return false;
    const std::int64_t layers = s_.loaded->config().layers;
    const std::int64_t each =
        (offloaded_bytes_[storage.offload] - offloaded_bytes_[one_less(storage.offload)]) / layers;
    const std::int64_t over = s_.fit.pinned_bytes() - s_.fit.pinned_budget_bytes;
    const std::int64_t sending = storage.offload_split == 0 ? layers : storage.offload_split;
    if (each <= 0 || over >= each * sending) return false;
    storage.offload_split = sending - (over + each - 1) / each;
    if (storage.offload_split == 0) return false;
    plan(policy);
    return true;
  }
  // How much of what may leave the host has room for.
  std::int64_t leaving_bytes(Leaving leaving, std::int64_t host_room) const {
    if (leaving == Leaving::none) return 0;
    const std::int64_t pages = std::clamp<std::int64_t>(host_room, 0, pageable());
    if (leaving == Leaving::optimizer) return pages;
    // And one that is streamed for a part of it.
    const std::int64_t in_arena = (kStreamedInArena + 1) * streamable_of_block();
    return pages + std::clamp<std::int64_t>(host_room - pages - in_arena, 0, streamable());
  }
  // The fastest rungs that fit when so much leaves: from the fastest to the leanest, and between
  // the last that does not fit and the first that does as few lean blocks as possible. Bytes are
  // all but linear in their number, so that a few plans find it.
  void choose_rungs(Policy& policy, Leaving leaving) {
    const auto look = [&](Rung rung, Rung lean, std::int64_t split) {
      policy.storage.rung = rung;
      policy.storage.lean = lean;
      policy.storage.split = split;
      const auto found = known_.find(policy.storage.str());
      if (found == known_.end()) {
        plan(policy);
        return known_[policy.storage.str()] = {excess_, host_room()};
      }
      planned_ = false;
      excess_ = found->second.excess;
      return found->second;
    };
    const Known everything = look(Rung::store, Rung::store, 0);
    const std::int64_t room = leaving_bytes(leaving, everything.host_room);
    const auto too_many = [&](Rung rung, Rung lean, std::int64_t split) {
      return look(rung, lean, split).excess - room;
    };
    std::int64_t over = everything.excess - room;
    // Gates spare more work by the byte than attention's outputs do: who sends them alone has no
    // memory for those.
    std::vector<Rung> rungs = {Rung::store, Rung::cheap, Rung::attention, Rung::block};
    if (policy.storage.offload == Offload::inputs_gate) std::erase(rungs, Rung::attention);
    for (std::size_t i = 0; i + 1 < rungs.size() && over > 0; ++i) {
      const Rung fast = rungs[i], lean = rungs[i + 1];
      std::int64_t over_lean = too_many(lean, Rung::store, 0);
      if (over_lean > 0) {
        over = over_lean;
        continue;
      }
      const std::int64_t layers = s_.loaded->config().layers;
      std::int64_t too_few = 0, enough = layers, split = layers;
      for (int tries = 0; tries < kMostSplits && enough - too_few > 1; ++tries) {
        const double share = static_cast<double>(over) / static_cast<double>(over - over_lean);
        const auto guess = too_few + static_cast<std::int64_t>(
                                         std::ceil(share * static_cast<double>(enough - too_few)));
        split = std::clamp(guess, too_few + 1, enough - 1);
        const std::int64_t now = too_many(fast, lean, split);
        (now > 0 ? too_few : enough) = split;
        (now > 0 ? over : over_lean) = now;
      }
      if (split != enough) {
        enough < layers ? too_many(fast, lean, enough) : too_many(lean, Rung::store, 0);
      }
      break;
    }
  }

  FinetuneSetup& s_;
  std::int64_t sample_context_;
  std::int64_t excess_ = 0;  // bytes too many, of the last plan or of what is known
  bool planned_ = false;     // it is of the last plan
  std::int64_t margin_ = 0;  // what drafts came out too small by
  struct Known {
    std::int64_t excess, host_room;
  };
  std::map<std::string, Known> known_;  // by storage policy, with nothing paged or streamed
  std::map<Offload, std::int64_t> offloaded_bytes_;  // by what every block sends
};

}  // namespace

std::optional<std::int64_t> device_cap(const Recipe& recipe) {
  if (!recipe.memory.empty()) return parse_size(recipe.memory, "--memory");
  if (!recipe.card.empty()) return find_card(recipe.card).memory_bytes;
  return {};
}

std::int64_t host_budget(const Recipe& recipe) {
  if (!recipe.host_memory.empty()) return parse_size(recipe.host_memory, "--host-memory");
  return os::memory_bytes() / 10 * 6;
}

void plan_model(FinetuneSetup& s, std::int64_t sample_context) {
  Recipe& r = s.recipe;
  std::optional<LoraSpec> lora;
  if (r.method != "full" && !s.without_adapter)
    lora = LoraSpec{r.rank, r.alpha, r.dropout, r.targets};
  s.llama =
      std::make_unique<Llama>(s.loaded->config(), s.loaded->types(), lora, r.method == "full");
  std::optional<StoragePolicy> forced;
  if (r.storage != "auto") {
    forced = StoragePolicy::parse(r.storage);
    const std::int64_t layers = s.loaded->config().layers;
    if (!forced || forced->split > layers || forced->streamed > layers ||
        forced->offload_split > layers) {
      throw Error("--storage " + r.storage +
                  ": write auto, store, cheap, attention or block, or LEANER:N+RUNG with a leaner "
                  "one of these for the first N of the " +
                  std::to_string(s.loaded->config().layers) +
                  " blocks; \",offload:inputs\", \":attention\", \":inputs+gate\" or \":gate\" may "
                  "follow, then "
                  "\",stream:N\", then \",mlp:N\" and \",loss:N\" with multiples of 512");
    }
  }
  Chooser(s, sample_context).run(forced);
  r.storage = s.fit.storage;
}

void print_fit(const FitReport& fit, std::ostream& out) {
  out << "memory     " << size_text(fit.total_bytes()) << " allocated:";
  for (const FitReport::Line& line : fit.device) {
    if (line.bytes > 0) out << " " << line.name << " " << size_text(line.bytes) << ",";
  }
  out << " storage " << fit.storage << "\n";
  for (const FitReport::Line& line : fit.pinned) {
    out << "           " << line.name << " " << size_text(line.bytes) << " on the host, of "
        << size_text(fit.pinned_budget_bytes) << "\n";
  }
  for (const FitReport::Line& line : fit.host) {
    out << "           " << line.name << " " << size_text(line.bytes) << " (not allocated)\n";
  }
  if (fit.budget_bytes > 0) {
    out << "           of " << size_text(fit.budget_bytes);
    if (fit.context_bytes > 0)
      out << " with " << size_text(fit.context_bytes) << " for the device's context";
    const std::int64_t excess = fit.excess_bytes();
    out << ": "
        << (excess <= 0 ? "fits, " + size_text(-excess) + " to spare\n"
                        : "does not fit, " + size_text(excess) + " too much\n");
  }
  if (fit.tokens_per_s > 0) {
    out << format("speed      %.0f tokens/s predicted", fit.tokens_per_s);
    if (fit.hours > 0) out << ", " << time_text(fit.hours * 3600) << " in all";
    out << "\n";
  }
}

}  // namespace nibble
