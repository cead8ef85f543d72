#include "engine/storage.h"

#include <algorithm>
#include <array>
#include <charconv>

namespace nibble {
namespace {

constexpr std::array<std::string_view, 3> kRungNames = {"store", "cheap", "block"};

constexpr std::string_view kOffload = ",offload:";
constexpr std::array<std::string_view, 3> kOffloadNames = {"inputs", "attention", "gate"};

std::string_view rung_name(Rung rung) { return kRungNames[static_cast<std::size_t>(rung)]; }

std::optional<Rung> find_rung(std::string_view name) {
  for (std::size_t i = 0; i < kRungNames.size(); ++i) {
    if (kRungNames[i] == name) return static_cast<Rung>(i);
  }
  return {};
}

}  // namespace

std::string StoragePolicy::str() const {
  std::string rest(rung_name(rung));
  if (offload != Offload::none) {
    rest +=
        std::string(kOffload) + std::string(kOffloadNames[static_cast<std::size_t>(offload) - 1]);
  }
  if (split == 0) return rest;
  return std::string(rung_name(lean)) + ":" + std::to_string(split) + "+" + rest;
}

std::optional<StoragePolicy> StoragePolicy::parse(std::string_view text) {
  StoragePolicy policy;
  if (const std::size_t comma = text.find(kOffload); comma != std::string_view::npos) {
    const auto found =
        std::find(kOffloadNames.begin(), kOffloadNames.end(), text.substr(comma + kOffload.size()));
    if (found == kOffloadNames.end()) return {};
    policy.offload = static_cast<Offload>(found - kOffloadNames.begin() + 1);
    text.remove_suffix(text.size() - comma);
  }
  if (const std::size_t plus = text.find('+'); plus != std::string_view::npos) {
    const std::string_view first = text.substr(0, plus);
    const std::size_t colon = first.find(':');
    if (colon == std::string_view::npos) return {};
    const auto lean = find_rung(first.substr(0, colon));
    const char* const end = first.data() + first.size();
    const auto [stop, error] = std::from_chars(first.data() + colon + 1, end, policy.split);
    if (!lean || error != std::errc() || stop != end || policy.split < 1) return {};
    policy.lean = *lean;
    text.remove_prefix(plus + 1);
  }
  const auto rung = find_rung(text);
  if (!rung || (policy.split > 0 && policy.lean <= *rung)) return {};
  policy.rung = *rung;
  return policy;
}

}  // namespace nibble
