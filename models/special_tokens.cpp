#include "models/special_tokens.h"

#include <algorithm>

namespace nibble {

void SpecialTokens::add(std::string_view text, std::int32_t id, bool always) {
  if (text.empty()) return;
  std::uint32_t node = 0;
  for (const char c : text) {
    const auto [edge, inserted] =
        nodes_[node].next.emplace(c, static_cast<std::uint32_t>(nodes_.size()));
    node = edge->second;
    if (inserted) nodes_.emplace_back();
  }
  if (nodes_[node].id >= 0 && nodes_[node].id < id) return;
  nodes_[node].id = id;
  nodes_[node].always = always;
}

std::vector<SpecialTokens::Match> SpecialTokens::find(std::string_view text,
                                                      bool parse_special) const {
  std::vector<Match> found;
  for (std::size_t begin = 0; begin < text.size(); ++begin) {
    std::uint32_t node = 0;
    for (std::size_t at = begin; at < text.size(); ++at) {
      const auto edge = nodes_[node].next.find(text[at]);
      if (edge == nodes_[node].next.end()) break;
      node = edge->second;
      const Node& here = nodes_[node];
      if (here.id >= 0 && (parse_special || here.always)) found.push_back({begin, at + 1, here.id});
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Match& a, const Match& b) {
    const auto a_length = a.end - a.begin, b_length = b.end - b.begin;
    return a_length != b_length ? a_length > b_length : a.id < b.id;
  });
  // A granted range is longer than or as long as any later candidate, so a candidate overlaps one
  // exactly if its first or last byte is taken.
  std::vector<bool> taken(found.empty() ? 0 : text.size());
  std::vector<Match> granted;
  for (const Match& match : found) {
    if (taken[match.begin] || taken[match.end - 1]) continue;
    std::fill(taken.begin() + static_cast<std::ptrdiff_t>(match.begin),
              taken.begin() + static_cast<std::ptrdiff_t>(match.end), true);
    granted.push_back(match);
  }
  std::sort(granted.begin(), granted.end(),
            [](const Match& a, const Match& b) { return a.begin < b.begin; });
  return granted;
}

}  // namespace nibble
