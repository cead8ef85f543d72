// Finds the literal texts of special tokens in a text.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace nibble {

// A trie over the special tokens' texts. One walk per position collects every occurrence; they are
// then granted longest first, lower id first among equals, leftmost first, which is what splitting
// the text by one token after the other comes to, without a pass per token.
class SpecialTokens {
 public:
  struct Match {
    std::size_t begin, end;
    std::int32_t id;
  };
  // `always`: found even when the caller did not ask for special tokens (user-defined ones).
  void add(std::string_view text, std::int32_t id, bool always);
  // Disjoint, ascending.
  std::vector<Match> find(std::string_view text, bool parse_special) const;

 private:
  struct Node {
    std::map<char, std::uint32_t> next;
    std::int32_t id = -1;  // of the token that ends here
    bool always = false;
  };
  std::vector<Node> nodes_ = std::vector<Node>(1);
};

}  // namespace nibble
