#include "tools/tokens.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <ostream>

#include "engine/error.h"
#include "engine/os.h"
#include "models/dataset.h"
#include "tools/text.h"
#include "tools/tiny_model.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

// Pieces may be parts of characters: what is not valid UTF-8 is shown as U+FFFD.
std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

int show_text(const TokensRequest& r, const Tokenizer& tokenizer, std::ostream& out) {
  const auto ids = tokenizer.encode(
      r.text, {.add_special = true, .parse_special = r.special, .continues = false});
  Json pieces = Json::array();
  for (const std::int32_t id : ids) pieces.push_back(tokenizer.piece(id));
  if (r.json) {
    out << dump({{"ids", ids}, {"pieces", pieces}}) << "\n";
    return 0;
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    out << format("%8d  ", ids[i]) << dump(pieces[i]) << "\n";
  }
  out << ids.size() << " tokens\n";
  return 0;
}

void show_row(const Row& row, const Tokenizer& tokenizer, bool json, std::ostream& out) {
  if (json) {
    Json pieces = Json::array();
    for (const std::int32_t id : row.ids) pieces.push_back(tokenizer.piece(id));
    out << dump({{"source", row.source},
                 {"ids", row.ids},
                 {"trained", row.trained},
                 {"pieces", pieces}})
        << "\n";
    return;
  }
  const Marks marks = os::is_terminal(1) ? Marks::terminal : Marks::guillemets;
  out << "-- " << row.source << ": " << row.ids.size() << " tokens\n"
      << render(row, tokenizer, marks) << "\n";
}

}  // namespace

void add_tokens_flags(CLI::App& command, TokensRequest& r) {
  command.alias("data");
  command.add_option("--model,-m", r.model, "whose tokenizer")->required();
  auto* text = command.add_option("--text", r.text, "show the tokens of this text");
  auto* data = command.add_option("--data,-d", r.data, "show rows of these files")->take_all();
  text->excludes(data);
  command.add_flag("--special", r.special, "text such as <|im_end|> is the control token");
  command.add_option("--rows", r.rows, "how many rows to show")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--format", r.format)
      ->check(CLI::IsMember({"alpaca", "completion", "messages", "text"}));
  command.add_option("--train-on", r.train_on)
      ->check(CLI::IsMember({"auto", "all", "completion", "assistant"}))
      ->capture_default_str();
  command.add_option("--seq", r.sequence, "most tokens of a row; default: no limit");
  command.add_flag("--truncate", r.truncate, "cut longer rows instead of refusing them");
  command.add_flag("--skip-bad", r.skip_bad, "count malformed rows and go on");
  command.add_flag("--json", r.json, "JSON lines");
}

int tokens_command(const TokensRequest& r, std::ostream& out, std::ostream& log) {
  if (r.text.empty() && r.data.empty()) throw Error("tokens needs --text TEXT or --data FILE");
  const auto checkpoint = open_model_source(r.model);
  const Tokenizer tokenizer(checkpoint->tokenizer());
  if (r.data.empty()) return show_text(r, tokenizer, out);
  DatasetOptions options;
  options.format = r.format;
  options.train_on = train_on_from_name(r.train_on);
  options.seq = r.sequence;
  options.truncate = r.truncate;
  options.skip_bad = r.skip_bad;
  const Dataset data = load_dataset(r.data, tokenizer, options);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(r.rows, std::ssize(data.rows)); ++i) {
    show_row(data.rows[static_cast<std::size_t>(i)], tokenizer, r.json, out);
  }
  (r.json ? log : out) << data.format << ": " << count_text(std::ssize(data.rows)) << " rows, "
                       << count_text(data.total_tokens) << " tokens, "
                       << count_text(data.trained_tokens) << " trained, "
                       << count_text(data.truncated) << " truncated, " << count_text(data.skipped)
                       << " bad; EOS is trained in " << count_text(data.eos_trained) << " rows\n";
  if (data.skipped > 0) log << "first bad row: " << data.first_bad << "\n";
  return 0;
}

}  // namespace nibble
