// The search is over drafts, which are plans without a layout: about 20 ms each for 80 blocks. For
// every set of activations that may wait on the host, it takes the fastest rungs that fit when all
// of the optimizer's states and of the weights may leave as well, lets so much of them leave as is
// still too many, and asks the estimate how long a step takes. Sets that cannot be faster are
// dropped as early as their rungs tell. Then come the refinements: more activations, an MLP or
// logits by rows, and less traffic where the step waits for it.
#include "tools/choose_policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "tools/cards.h"

namespace nibble {
namespace {

constexpr int kMostSplits = 6;  // depths to try
constexpr std::int64_t kMargin = 4 << 20;
constexpr std::int64_t kPagedArrays = 3;  // masters and two moments, each rounded up
// What more traffic has to save to be worth it.
constexpr double kWorthwhile = 0.99;
constexpr double kAnySeconds = std::numeric_limits<double>::infinity();
// Parts of the rows that an MLP works on in turn, where it does; it may from so many rows on, and
// where nothing fits without.
constexpr std::int64_t kMlpParts = 8, kLongRows = 16384;
constexpr std::int64_t kStreamedInArena = kStreamedAhead + 1;  // blocks, the one in use among them

// What may leave for the host beside activations, each with those before it.
enum class Leaving { none, optimizer, weights };
struct Way {
  Leaving leaving = Leaving::none;
  double share = 1;            // of the weights that may be streamed, which the rungs count with
  bool weights_first = false;  // before the optimizer's pages
};

class Chooser {
 public:
  Chooser(FinetuneSetup& setup, std::int64_t sample_context)
      : s_(setup), sample_context_(sample_context) {}

  // Drafts decide; where the real layout then needs more than a draft's, it is decided again.
  void run(const std::optional<StoragePolicy>& forced) {
    Policy policy = forced ? with_storage(*forced) : fastest();
    for (int tries = 0; tries < 3; ++tries) {
      const bool draft_fits = excess_ <= 0;
      plan_policy(s_, policy, sample_context_, Plans::all);
      if (!draft_fits || excess(s_) <= 0) return;
      margin_ += 2 * excess(s_) + kMargin;  // another policy, another layout
      policy = forced ? with_storage(*forced) : again(policy);
    }
  }

 private:
  // Of a storage policy with nothing paged or streamed.
  struct Known {
    std::int64_t excess, host_room;
    double seconds;
  };
  struct Choice {
    Policy policy;
    Way way;
    std::int64_t excess = 0;
    double seconds = 0;
    double computing = 0;  // seconds if copies took none
    double fastest = 0;    // of all that fit
  };

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
    best_ = {};
    Policy& best = best_.policy;
    plan(best);
    if (excess_ <= 0) return best;
    best.embedding_on_host = embedding_may_leave(best);
    if (!best.embedding_on_host) plan(best);
    if (excess_ <= 0 || s_.without_adapter) return best;
    know(best.storage);
    best_.excess = excess_;
    consider_all(best, {Leaving::weights, Leaving::optimizer, Leaving::none});
    // Where the host has room for every gate it may have some for what stands beside them.
    const Offload offload = best.storage.offload;
    if (has(offload, Activation::gate) && best.storage.offload_split == 0) {
      consider_more(Offload::inputs_gate_up);
      if (has(offload, Activation::attention)) consider_more(Offload::up);
    }
    // Where wide values of many rows are what takes most, fewer rows at a time leave room for the
    // blocks; the weights are then decoded as often as there are parts.
    const std::int64_t rows = s_.buckets.back();
    Policy parts = best;
    parts.storage.mlp_rows = round_up((rows + kMlpParts - 1) / kMlpParts, kRowTile);
    if (best_.excess > 0 && parts.storage.mlp_rows < rows) {
      consider_all(parts, {Leaving::weights});
    } else if (rows >= kLongRows) {
      consider(parts, best_.way, worthwhile());
    }
    // The same for logits.
    Policy few_logits = best;
    few_logits.storage.loss_rows = kRowTile;
    consider(few_logits, best_.way, worthwhile());
    copy_less();
    excess_ = best_.excess;
    return best;
  }

  // The same once more, with another margin.
  Policy again(Policy policy) {
    known_.clear();
    const bool found = search(policy, best_.way, kAnySeconds);
    return found && excess_ <= 0 && pinned_fits() ? policy : fastest();
  }

  // Every set of activations, those first that spare most. A later one sends less, and is taken
  // where that costs nothing.
  void consider_all(Policy policy, std::initializer_list<Leaving> all) {
    policy.storage.offload_split = 0;
    for (const Offload offload : {Offload::gate, Offload::inputs_gate, Offload::attention,
                                  Offload::inputs, Offload::none}) {
      policy.storage.offload = offload;
      std::optional<Leaving> left;
      for (const Leaving leaving : all) {
        if (left && leaving >= *left) continue;  // the same again
        left = consider(policy, {leaving}, best_.fastest / kWorthwhile);
        if (!left) break;
      }
    }
  }
  // The best policy so far, sending these as well.
  void consider_more(Offload offload) {
    Policy policy = best_.policy;
    policy.storage.offload = offload;
    policy.storage.offload_split = 0;
    consider(policy, best_.way, worthwhile());
  }
  double worthwhile() const { return kWorthwhile * best_.seconds; }

  // Where a step waits for its copies, fewer weights are streamed and the blocks keep less; or more
  // are, before the optimizer is paged, which nothing runs beside.
  void copy_less() {
    for (const bool weights_first : {false, true}) {
      for (const double share : {1.0, 0.5, 0.25, 0.0}) {
        const Policy& best = best_.policy;
        const bool copies = best.storage.streamed > 0 || (weights_first && best.paged > 0);
        if (!copies || worthwhile() < best_.computing) break;
        if (share == 1 && !weights_first) continue;  // that is known
        const Way way{Leaving::weights, share, weights_first};
        Policy policy = best;
        consider(policy, way, worthwhile());
        policy.storage.offload = Offload::none;
        policy.storage.offload_split = 0;
        consider(policy, way, worthwhile());
      }
    }
  }

  // Takes the policy that a search finds from here where it fits and needs less than `most`
  // seconds, or where none has fitted and this one lacks less. What left in it; none where it is
  // hopeless to let less leave.
  std::optional<Leaving> consider(Policy policy, const Way& way, double most) {
    if (best_.excess > 0) most = kAnySeconds;
    if (!search(policy, way, most)) return {};
    for (int tries = 0; !pinned_fits(); ++tries) {
      if (tries == 3 || !offload_less(policy) || !search(policy, way, most)) return way.leaving;
    }
    const double needed = seconds();
    const bool better = best_.excess > 0 ? excess_ < best_.excess : excess_ <= 0 && needed < most;
    if (better) {
      best_.fastest = best_.excess > 0 ? needed : std::min(best_.fastest, needed);
      best_.policy = policy;
      best_.way = way;
      best_.excess = excess_;
      best_.seconds = needed;
      best_.computing = seconds(false);
    }
    if (policy.storage.streamed > 0) return Leaving::weights;
    return policy.paged > 0 ? Leaving::optimizer : Leaving::none;
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
  const Known& know(const StoragePolicy& planned) {
    return known_[planned.str()] = {excess_, host_room(), seconds()};
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
  // Of a step of the last plan. Plain numbers serve where the device is not known: only their order
  // matters.
  double seconds(bool copies_take_time = true) const {
    DeviceRates rates = device_rates(s_.backend->info());
    if (!rates.known()) rates = {.flops = 1e14, .bytes = 1e12, .copy_bytes = 2e10, .launch = 3e-6};
    if (!copies_take_time) rates.copy_bytes = std::numeric_limits<double>::infinity();
    return s_.trainer->estimate_step(rates, s_.work.average_span, s_.work.rows_per_step);
  }
  // Gives `policy` the fastest rungs that fit when what may leave does, and lets so much leave.
  // False where they alone take longer than `most`, or where that is too little and something else
  // is known to fit.
  bool search(Policy& policy, const Way& way, double most) {
    policy.storage.streamed = policy.paged = 0;
    const Known rungs = choose_rungs(policy, way, most);
    const bool fits = rungs.excess <= leaving_bytes(way, rungs.host_room);
    if (rungs.seconds > most || (best_.excess <= 0 && !fits)) return false;
    const bool weights = way.leaving == Leaving::weights;
    if (weights && way.weights_first) stream(policy);
    if (way.leaving != Leaving::none) page(policy);
    if (weights) stream(policy);
    if (!planned_) plan(policy);
    return true;
  }
  // The host has no room for what every block sends: fewer blocks send it. False where that does
  // not help; then what was planned last is not this policy.
  bool offload_less(Policy& policy) {
    StoragePolicy& storage = policy.storage;
    if (storage.offload == Offload::none) return false;
    if (storage.offload_split == 0) {
      offloaded_bytes_[storage.offload] = s_.trainer->runtime().page_bytes();
    }
    const std::int64_t layers = s_.loaded->config().layers;
    const std::int64_t over = s_.fit.pinned_bytes() - s_.fit.pinned_budget_bytes;
    const std::int64_t sending = storage.offload_split == 0 ? layers : storage.offload_split;
    const std::int64_t each = (offloaded_bytes(policy, storage.offload) -
                               offloaded_bytes(policy, one_less(storage.offload))) /
                              layers;
    if (each <= 0 || over >= each * sending) return false;
    storage.offload_split = sending - (over + each - 1) / each;
    if (storage.offload_split == 0) return false;
    plan(policy);
    return true;
  }
  // What all blocks send, in a policy that is like this one otherwise.
  std::int64_t offloaded_bytes(Policy policy, Offload offload) {
    const auto [found, is_new] = offloaded_bytes_.try_emplace(offload, 0);
    if (is_new) {
      policy.storage.offload = offload;
      policy.storage.offload_split = 0;
      plan(policy);
      found->second = s_.trainer->runtime().page_bytes();
    }
    return found->second;
  }
  // How much of what may leave the host has room for.
  std::int64_t leaving_bytes(const Way& way, std::int64_t host_room) const {
    if (way.leaving == Leaving::none) return 0;
    const std::int64_t pages = std::clamp<std::int64_t>(host_room, 0, pageable());
    if (way.leaving == Leaving::optimizer) return pages;
    // And one that is streamed for a part of it.
    const std::int64_t in_arena = (kStreamedInArena + 1) * streamable_of_block();
    const std::int64_t most =
        std::clamp<std::int64_t>(host_room - pages - in_arena, 0, streamable());
    return pages + static_cast<std::int64_t>(way.share * static_cast<double>(most));
  }
  // The fastest rungs that fit when so much leaves: from the fastest to the leanest, and between
  // the last that does not fit and the first that does as few lean blocks as possible. Bytes are
  // all but linear in their number, so that a few plans find it. Ends where rungs need more than
  // `most` seconds already.
  Known choose_rungs(Policy& policy, const Way& way, double most) {
    Known chosen;
    const auto look = [&](Rung rung, Rung lean, std::int64_t split) {
      policy.storage.rung = rung;
      policy.storage.lean = lean;
      policy.storage.split = split;
      const auto found = known_.find(policy.storage.str());
      if (found == known_.end()) {
        plan(policy);
        return chosen = know(policy.storage);
      }
      planned_ = false;
      excess_ = found->second.excess;
      return chosen = found->second;
    };
    // What the MLP has spares more work by the byte than attention's outputs do: who sends that
    // alone has no memory for those.
    std::vector<Rung> rungs = {Rung::store, Rung::cheap, Rung::attention, Rung::block};
    const Offload offload = policy.storage.offload;
    if (has(offload, Activation::gate) && !has(offload, Activation::attention)) {
      std::erase(rungs, Rung::attention);
    }
    // Where fewer blocks send now, none of the faster rungs has come to fit.
    if (policy.storage.offload_split > 0) {
      rungs.erase(rungs.begin(), std::find(rungs.begin(), rungs.end(), policy.storage.rung));
    }
    const Known fastest = look(rungs.front(), Rung::store, 0);
    const std::int64_t room = leaving_bytes(way, fastest.host_room);
    const auto too_many = [&](Rung rung, Rung lean, std::int64_t split) {
      return look(rung, lean, split).excess - room;
    };
    std::int64_t over = fastest.excess - room;
    for (std::size_t i = 0; i + 1 < rungs.size() && over > 0 && chosen.seconds <= most; ++i) {
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
    return chosen;
  }

  FinetuneSetup& s_;
  std::int64_t sample_context_;
  std::int64_t excess_ = 0;  // bytes too many, of the last plan or of what is known
  bool planned_ = false;     // it is of the last plan
  std::int64_t margin_ = 0;  // what drafts came out too small by
  Choice best_;
  std::map<std::string, Known> known_;
  std::map<Offload, std::int64_t> offloaded_bytes_;  // by what every block sends
};

}  // namespace

void choose_policy(FinetuneSetup& setup, std::int64_t sample_context,
                   const std::optional<StoragePolicy>& forced) {
  Chooser(setup, sample_context).run(forced);
}

}  // namespace nibble
