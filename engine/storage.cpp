#include "engine/storage.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>

namespace nibble {
namespace {

constexpr std::array<std::string_view, 4> kRungNames = {"store", "cheap", "attention", "block"};

constexpr std::string_view kOffload = ",offload:", kStream = ",stream:", kMlp = ",mlp:",
                           kLoss = ",loss:";
constexpr std::array<std::pair<Offload, std::string_view>, 6> kOffloads = {
    {{Offload::inputs, "inputs"},
     {Offload::attention, "attention"},
     {Offload::inputs_gate, "inputs+gate"},
     {Offload::gate, "gate"},
     {Offload::inputs_gate_up, "inputs+gate+up"},
     {Offload::up, "up"}}};

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

Offload one_less(Offload offload) {
  return static_cast<Offload>(static_cast<unsigned>(offload) -
                              std::bit_floor(static_cast<unsigned>(offload)));
}

std::string StoragePolicy::str() const {
  std::string text;
  if (split > 0) text = std::string(rung_name(lean)) + ":" + std::to_string(split) + "+";
  text += rung_name(rung);
  if (offload != Offload::none) {
    text += kOffload;
    text += std::find_if(kOffloads.begin(), kOffloads.end(), [&](const auto& o) {
              return o.first == offload;
            })->second;
    if (offload_split > 0) text += ":" + std::to_string(offload_split);
  }
  if (streamed > 0) text += std::string(kStream) + std::to_string(streamed);
  if (mlp_rows > 0) text += std::string(kMlp) + std::to_string(mlp_rows);
  if (loss_rows > 0) text += std::string(kLoss) + std::to_string(loss_rows);
  return text;
}

std::optional<StoragePolicy> StoragePolicy::parse(std::string_view text) {
  StoragePolicy policy;
  for (const auto& [key, most] : {std::pair{kLoss, &policy.loss_rows}, {kMlp, &policy.mlp_rows}}) {
    const auto count = take_suffix(text, key);
    if (!count) continue;
    const auto rows = parse_count(*count);
    if (!rows || *rows % kRowTile != 0) return {};
    *most = *rows;
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
    const auto found = std::find_if(kOffloads.begin(), kOffloads.end(),
                                    [&](const auto& o) { return o.second == *name; });
    if (found == kOffloads.end()) return {};
    policy.offload = found->first;
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
