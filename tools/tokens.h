// `nibble tokens`: ids and pieces of a text, or rows of data as the trainer will see them.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace nibble {

struct TokensRequest {
  std::string model, text, format, train_on = "auto";
  std::vector<std::string> data;
  bool special = false, json = false, skip_bad = false, truncate = false;
  std::int64_t rows = 3, sequence = 0;
};

void add_tokens_flags(CLI::App& command, TokensRequest& request);
int tokens_command(const TokensRequest& request, std::ostream& out, std::ostream& log);

}  // namespace nibble
