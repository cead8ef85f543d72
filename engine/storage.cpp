#include "engine/storage.h"

#include <array>
#include <charconv>

namespace nibble {
namespace {

constexpr std::array<std::string_view, 3> kRungNames = {"store", "cheap", "block"};

constexpr std::string_view kOffload = ",offload";

std::string_view rung_name(Rung rung) { return kRungNames[static_cast<std::size_t>(rung)]; }

std::optional<Rung> find_rung(std::string_view name) {
  for (std::size_t i = 0; i < kRungNames.size(); ++i) {
    if (kRungNames[i] == name) return static_cast<Rung>(i);
  }
  return {};
}

}  // namespace

std::string StoragePolicy::str() const {
  const std::string rest = std::string(rung_name(rung)) + (offload ? std::string(kOffload) : "");
  if (split == 0) return rest;
  return std::string(rung_name(lean)) + ":" + std::to_string(split) + "+" + rest;
}

std::optional<StoragePolicy> StoragePolicy::parse(std::string_view text) {
  StoragePolicy policy;
  if (text.ends_with(kOffload)) {
    policy.offload = true;
    text.remove_suffix(kOffload.size());
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
