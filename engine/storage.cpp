#include "engine/storage.h"

#include <algorithm>
#include <array>
#include <charconv>

namespace nibble {
namespace {

constexpr std::array<std::string_view, 4> kRungNames = {"store", "cheap", "attention", "block"};

constexpr std::string_view kOffload = ",offload:", kStream = ",stream:", kLoss = ",loss:";
constexpr std::array<std::string_view, 3> kOffloadNames = {"inputs", "attention", "gate"};

std::string_view rung_name(Rung rung) { return kRungNames[static_cast<std::size_t>(rung)]; }

std::optional<Rung> find_rung(std::string_view name) {
  for (std::size_t i = 0; i < kRungNames.size(); ++i) {
    if (kRungNames[i] == name) return static_cast<Rung>(i);
  }
  return {};
}

// A positive number; none for anything else.
std::optional<std::int64_t> parse_count(std::string_view text) {
  std::int64_t count = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, count);
  if (error != std::errc() || stop != end || count < 1) return {};
  return count;
}

// Takes ",KEY:VALUE" from the end of the text; none when it ends otherwise.
std::optional<std::string_view> take_suffix(std::string_view& text, std::string_view key) {
  const std::size_t comma = text.find(key);
  if (comma == std::string_view::npos) return {};
  const std::string_view value = text.substr(comma + key.size());
  text.remove_suffix(text.size() - comma);
  return value;
}

}  // namespace

std::string StoragePolicy::str() const {
  std::string text;
  if (split > 0) text = std::string(rung_name(lean)) + ":" + std::to_string(split) + "+";
  text += rung_name(rung);
  if (offload != Offload::none) {
    text += kOffload;
    text += kOffloadNames[static_cast<std::size_t>(offload) - 1];
    if (offload_split > 0) text += ":" + std::to_string(offload_split);
  }
  if (streamed > 0) text += std::string(kStream) + std::to_string(streamed);
  if (loss_rows > 0) text += std::string(kLoss) + std::to_string(loss_rows);
  return text;
}

std::optional<StoragePolicy> StoragePolicy::parse(std::string_view text) {
  StoragePolicy policy;
  if (const auto count = take_suffix(text, kLoss)) {
    const auto rows = parse_count(*count);
    if (!rows || *rows % kLossTile != 0) return {};
    policy.loss_rows = *rows;
  }
  if (const auto count = take_suffix(text, kStream)) {
    const auto streamed = parse_count(*count);
    if (!streamed) return {};
    policy.streamed = *streamed;
  }
  if (auto name = take_suffix(text, kOffload)) {
    if (const auto blocks = take_suffix(*name, ":")) {
      const auto count = parse_count(*blocks);
      if (!count) return {};
      policy.offload_split = *count;
    }
    const auto found = std::find(kOffloadNames.begin(), kOffloadNames.end(), *name);
    if (found == kOffloadNames.end()) return {};
    policy.offload = static_cast<Offload>(found - kOffloadNames.begin() + 1);
  }
  if (const std::size_t plus = text.find('+'); plus != std::string_view::npos) {
    const std::string_view first = text.substr(0, plus);
    const std::size_t colon = first.find(':');
    if (colon == std::string_view::npos) return {};
    const auto lean = find_rung(first.substr(0, colon));
    const auto split = parse_count(first.substr(colon + 1));
    if (!lean || !split) return {};
    policy.lean = *lean;
    policy.split = *split;
    text.remove_prefix(plus + 1);
  }
  const auto rung = find_rung(text);
  if (!rung || (policy.split > 0 && policy.lean <= *rung)) return {};
  policy.rung = *rung;
  return policy;
}

}  // namespace nibble
