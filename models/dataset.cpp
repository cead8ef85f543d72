// Reading rows: find the JSON values, decide the format once, then turn each value into segments
// (text, trained or not) and the segments into tokens.
#include "models/dataset.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "engine/error.h"
#include "engine/os.h"
#include "engine/philox.h"
#include "gguf-convert/quoted.h"
#include "models/chat.h"
#include "models/json_rows.h"
#include "models/unicode.h"

namespace nibble {
namespace {

using Json = nlohmann::json;

constexpr const char* format_list =
    "{\"instruction\", \"input\"?, \"output\"}, {\"prompt\", \"completion\"}, {\"messages\"} or "
    "{\"text\"}";

// What a row's members must be, for messages.
const char* wants(const std::string& format) {
  if (format == "alpaca") return "every row needs \"instruction\" and \"output\"";
  if (format == "completion") return "every row needs \"prompt\" and \"completion\"";
  if (format == "messages")
    return "every row needs \"messages\", a list of {\"role\", \"content\"}";
  return "every row needs \"text\"";
}

std::optional<std::string> detect(const Json& row) {
  const auto has = [&](const char* key) { return row.contains(key); };
  if (has("messages") || has("conversations")) return "messages";
  if (has("instruction") && has("output")) return "alpaca";
  if (has("prompt") && has("completion")) return "completion";
  if (has("text")) return "text";
  return std::nullopt;
}

std::string keys_of(const Json& row) {
  constexpr std::size_t most = 8;
  std::string keys;
  std::size_t count = 0;
  for (const auto& [key, value] : row.items()) {
    if (++count <= most) keys += (count > 1 ? ", " : "") + nibble::quoted(key);
  }
  return count == 0 ? "no members" : keys + (count > most ? ", ..." : "");
}

// Makes rows of one format. Errors it throws say what is wrong with the row, not where it is.
class RowMaker {
 public:
  RowMaker(const Tokenizer& tokenizer, const std::string& format, TrainOn train_on)
      : tokenizer_(tokenizer), format_(format), train_on_(train_on) {
    if (format == "messages") chat_.emplace(tokenizer);
    const bool answers = train_on == TrainOn::completion || train_on == TrainOn::assistant;
    if (format == "text" && answers) {
      throw Unsupported("text rows have no completion to train on; use --train-on all");
    }
  }

  Row make(const Json& json) const {
    Row row = format_ == "messages" ? chat_row(json)
              : format_ == "alpaca" ? answer_row(alpaca_prompt(json), member(json, "output"))
              : format_ == "text"   ? answer_row("", member(json, "text"))
                                  : answer_row(member(json, "prompt"), member(json, "completion"));
    // The first token follows nothing, so nothing can be learnt about it.
    if (!row.trained.empty()) row.trained.front() = 0;
    if (std::count(row.trained.begin(), row.trained.end(), 1) == 0) {
      throw Error("no token to train: the text the model should learn is empty");
    }
    return row;
  }

 private:
  const std::string& member(const Json& json, const char* key) const {
    const auto found = json.find(key);
    if (found == json.end()) {
      throw Error("\"" + std::string(key) + "\" is missing; " + wants(format_));
    }
    if (!found->is_string()) {
      throw Error("\"" + std::string(key) + "\" is " + found->type_name() + ", wanted a string; " +
                  wants(format_));
    }
    return found->get_ref<const std::string&>();
  }

  // The prompts of Stanford Alpaca; an empty or null input counts as none.
  std::string alpaca_prompt(const Json& json) const {
    const std::string& instruction = member(json, "instruction");
    const bool has_input = json.contains("input") && !json["input"].is_null();
    const std::string input = has_input ? member(json, "input") : "";
    if (input.empty()) {
      return "Below is an instruction that describes a task. Write a response that appropriately "
             "completes the request.\n\n### Instruction:\n" +
             instruction + "\n\n### Response: ";
    }
    return "Below is an instruction that describes a task, paired with an input that provides "
           "further context. Write a response that appropriately completes the request.\n\n"
           "### Instruction:\n" +
           instruction + "\n\n### Input:\n" + input + "\n\n### Response: ";
  }

  Row answer_row(const std::string& prompt, const std::string& answer) const {
    const TokenizerSpec& spec = tokenizer_.spec();
    Row row;
    if (spec.add_bos && spec.bos >= 0) row.ids.push_back(spec.bos);
    append(row, tokenizer_.encode(prompt), train_on_ == TrainOn::all);
    append(row, tokenizer_.encode(answer, {.continues = !prompt.empty()}), true);
    if (spec.eos >= 0) append(row, {spec.eos}, true);
    return row;
  }

  static void append(Row& row, const std::vector<std::int32_t>& ids, bool trained) {
    row.trained.resize(row.ids.size());
    row.ids.insert(row.ids.end(), ids.begin(), ids.end());
    row.trained.resize(row.ids.size(), trained);
  }

  std::vector<Message> messages_of(const Json& json) const {
    // ShareGPT's names for the same: {"conversations": [{"from": "human", "value": ...}]}.
    const bool sharegpt = !json.contains("messages") && json.contains("conversations");
    const char* list_key = sharegpt ? "conversations" : "messages";
    const char *role_key = sharegpt ? "from" : "role", *text_key = sharegpt ? "value" : "content";
    const auto list = json.find(list_key);
    if (list == json.end()) throw Error("\"messages\" is missing; " + std::string(wants(format_)));
    if (!list->is_array()) throw Error("\"" + std::string(list_key) + "\" is not a list");
    std::vector<Message> messages;
    for (const Json& item : *list) {
      if (!item.is_object()) throw Error("a message is no object; " + std::string(wants(format_)));
      std::string role = member(item, role_key);
      if (sharegpt && role == "human") role = "user";
      if (sharegpt && role == "gpt") role = "assistant";
      messages.push_back({std::move(role), member(item, text_key)});
    }
    return messages;
  }

  // Automatic and assistant train every answer, completion the last one.
  Row chat_row(const Json& json) const {
    const ChatTokens tokens = chat_->encode(tokenizer_, messages_of(json), ChatEnd::complete);
    const std::int32_t answers =
        tokens.answer.empty() ? 0 : *std::max_element(tokens.answer.begin(), tokens.answer.end());
    if (answers == 0 && train_on_ != TrainOn::all) {
      throw Error("no message of the assistant, so nothing to train");
    }
    const std::int32_t first = train_on_ == TrainOn::all          ? 0
                               : train_on_ == TrainOn::completion ? answers
                                                                  : 1;
    Row row;
    row.ids = tokens.ids;
    for (const std::int32_t answer : tokens.answer) row.trained.push_back(answer >= first);
    return row;
  }

  const Tokenizer& tokenizer_;
  const std::string format_;
  const TrainOn train_on_;
  std::optional<ChatTemplate> chat_;
};

// Reads rows of any number of files into one dataset.
class Loader {
 public:
  Loader(const Tokenizer& tokenizer, const DatasetOptions& options, Dataset& dataset)
      : tokenizer_(tokenizer), options_(options), dataset_(dataset) {
    if (options.format.empty()) return;
    const auto& f = options.format;
    if (f != "alpaca" && f != "completion" && f != "messages" && f != "text") {
      throw Unsupported("row format \"" + f + "\"; supported: alpaca, completion, messages, text");
    }
    decide(f);
  }

  void read(const std::string& path) {
    const std::string contents = os::read_file(path);
    for (const JsonRow& found : find_json_rows(contents, path)) {
      const std::string source = path + ":" + std::to_string(found.line);
      try {
        Row row = make(found, contents);
        row.source = source;
        dataset_.rows.push_back(std::move(row));
      } catch (const Unsupported&) {
        throw;  // the format as a whole
      } catch (const Error& e) {
        bad(source + ": " + e.what());
      }
    }
  }

 private:
  void decide(const std::string& format) {
    maker_.emplace(tokenizer_, format, options_.train_on);
    dataset_.format = format;
  }

  Row make(const JsonRow& found, std::string_view contents) {
    const Json json = parse(found, contents);
    if (!json.is_object()) {
      throw Error("this is " + std::string(json.type_name()) + ", wanted an object; rows are " +
                  format_list);
    }
    if (!maker_) {
      const auto format = detect(json);
      if (!format) throw Error("found " + keys_of(json) + "; a row is " + format_list);
      decide(*format);
    }
    return maker_->make(json);
  }

  static Json parse(const JsonRow& found, std::string_view contents) {
    try {
      return Json::parse(found.text);
    } catch (const Json::parse_error& e) {
      const JsonPlace place = place_in(found, contents, e.byte == 0 ? 0 : e.byte - 1);
      std::string what = e.what();  // "[json.exception...] parse error at line 1, column 9: WHAT"
      const std::size_t reason = what.find(": ");
      if (reason != std::string::npos) what.erase(0, reason + 2);
      throw Error("this is not JSON: line " + std::to_string(place.line) + ", column " +
                  std::to_string(place.column) + ": " + what);
    } catch (const Json::exception& e) {
      throw Error("this is not JSON: " + std::string(e.what()));
    }
  }

  void bad(const std::string& message) {
    if (!options_.skip_bad) throw Error(message);
    if (dataset_.skipped++ == 0) dataset_.first_bad = message;
  }

  const Tokenizer& tokenizer_;
  const DatasetOptions& options_;
  Dataset& dataset_;
  std::optional<RowMaker> maker_;
};

}  // namespace

TrainOn train_on_from_name(const std::string& name) {
  if (name == "auto") return TrainOn::automatic;
  if (name == "all") return TrainOn::all;
  if (name == "completion") return TrainOn::completion;
  if (name == "assistant") return TrainOn::assistant;
  throw Unsupported("training on \"" + name + "\"; supported: auto, all, completion, assistant");
}

Dataset load_dataset(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                     const DatasetOptions& options) {
  Dataset dataset;
  Loader loader(tokenizer, options, dataset);
  for (const std::string& path : paths) loader.read(path);
  if (dataset.rows.empty()) {
    throw Error("no usable row in " + (paths.empty() ? "no file" : paths.front()) +
                (paths.size() > 1 ? " and the other files" : "") +
                (dataset.skipped > 0 ? "; the first bad one: " + dataset.first_bad : ""));
  }
  count_tokens(dataset, tokenizer);
  if (options.seq > 0) limit_length(dataset, options.seq, options.truncate, tokenizer);
  return dataset;
}

void count_tokens(Dataset& dataset, const Tokenizer& tokenizer) {
  dataset.total_tokens = dataset.trained_tokens = dataset.eos_trained = dataset.longest = 0;
  for (const Row& row : dataset.rows) {
    const auto size = static_cast<std::int64_t>(row.ids.size());
    dataset.total_tokens += size;
    dataset.longest = std::max(dataset.longest, size);
    dataset.trained_tokens += std::count(row.trained.begin(), row.trained.end(), 1);
    const auto last = std::find(row.trained.rbegin(), row.trained.rend(), 1);
    if (last == row.trained.rend()) continue;
    const auto at = static_cast<std::size_t>(row.trained.rend() - last) - 1;
    dataset.eos_trained += tokenizer.is_end(row.ids[at]);
  }
}

void limit_length(Dataset& dataset, std::int64_t seq, bool truncate, const Tokenizer& tokenizer) {
  if (seq < 2) throw Error("rows of at most " + std::to_string(seq) + " tokens; at least 2 needed");
  const auto limit = static_cast<std::size_t>(seq);
  const auto too_long = [&](const Row& row) { return row.ids.size() > limit; };
  const auto count = std::count_if(dataset.rows.begin(), dataset.rows.end(), too_long);
  if (count == 0) return;
  if (!truncate) {
    std::string list;
    int listed = 0;
    for (const Row& row : dataset.rows) {
      if (!too_long(row) || ++listed > 5) continue;
      list += (listed > 1 ? ", " : "") + row.source + " (" + std::to_string(row.ids.size()) + ")";
    }
    throw Error(std::to_string(count) + " of " + std::to_string(dataset.rows.size()) +
                " rows are longer than " + std::to_string(seq) + " tokens: " + list +
                (count > 5 ? ", ..." : "") + "; raise --seq or cut them with --truncate");
  }
  dataset.truncated += count;
  for (Row& row : dataset.rows) {
    if (!too_long(row)) continue;
    row.ids.resize(limit);
    row.trained.resize(limit);
  }
  const auto nothing_left = [](const Row& row) {
    return std::count(row.trained.begin(), row.trained.end(), 1) == 0;
  };
  const auto kept = std::remove_if(dataset.rows.begin(), dataset.rows.end(), nothing_left);
  dataset.dropped += dataset.rows.end() - kept;
  dataset.rows.erase(kept, dataset.rows.end());
  if (dataset.rows.empty()) {
    throw Error("cut to " + std::to_string(seq) +
                " tokens, no row has a token left to train: every prompt is longer; raise --seq");
  }
  count_tokens(dataset, tokenizer);
}

void check_ids(const std::vector<Row>& rows, std::int64_t vocab) {
  for (const Row& row : rows) {
    for (const std::int32_t id : row.ids) {
      if (id >= 0 && id < vocab) continue;
      throw Error(row.source + ": the tokenizer gives token " + std::to_string(id) +
                  ", the model has embeddings for 0 to " + std::to_string(vocab - 1) +
                  "; model and tokenizer do not belong together");
    }
  }
}

std::uint64_t fingerprint(const std::vector<Row>& rows) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) {
      hash = (hash ^ (value >> (8 * i) & 0xFF)) * 0x100000001b3u;
    }
  };
  for (const Row& row : rows) {
    add(row.ids.size(), 8);  // rows cut elsewhere are other rows
    for (std::size_t i = 0; i < row.ids.size(); ++i) {
      add(static_cast<std::uint32_t>(row.ids[i]), 4);
      add(row.trained[i], 1);
    }
  }
  return hash;
}

std::string render(const Row& row, const Tokenizer& tokenizer, Marks marks) {
  const bool terminal = marks == Marks::terminal;
  const std::string open = terminal ? "\x1b[1;32m" : "\xC2\xAB";
  const std::string close = terminal ? "\x1b[0m" : "\xC2\xBB";
  std::string out;
  for (std::size_t begin = 0; begin < row.ids.size();) {
    const bool trained = row.trained[begin] != 0;
    std::string bytes;
    std::size_t end = begin;
    for (; end < row.ids.size() && (row.trained[end] != 0) == trained; ++end) {
      bytes += tokenizer.piece(row.ids[end]);
    }
    if (trained) out += open;
    // Control characters of the data must not reach a terminal.
    for (char& c : bytes) {
      if ((c >= 0 && c < ' ' && c != '\n' && c != '\t') || c == 0x7F) c = '?';
    }
    append_valid_utf8(out, bytes, TextEnd::last);
    if (trained) out += close;
    begin = end;
  }
  return out;
}

std::pair<std::vector<Row>, std::vector<Row>> split_rows(std::vector<Row> rows, double share,
                                                         std::uint64_t seed) {
  const std::size_t n = rows.size();
  if (!(share >= 0 && share < 1)) {
    throw Error("an evaluation share of " + std::to_string(share) + "; wanted 0 to less than 1");
  }
  auto wanted = static_cast<std::size_t>(share * static_cast<double>(n) + 0.5);
  if (share > 0 && n >= 2) wanted = std::clamp<std::size_t>(wanted, 1, n - 1);
  // Rows in the order of one random number each; ties, if ever, by row.
  constexpr std::uint64_t stream = hash_name("evaluation split");
  std::vector<std::pair<std::uint64_t, std::size_t>> order(n);
  for (std::size_t i = 0; i < n; ++i) {
    const PhiloxBlock r = philox(
        seed, {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(std::uint64_t{i} >> 32),
               static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)});
    order[i] = {std::uint64_t{r[0]} << 32 | r[1], i};
  }
  std::sort(order.begin(), order.end());
  std::vector<bool> held_out(n);
  for (std::size_t i = 0; i < wanted; ++i) held_out[order[i].second] = true;
  std::pair<std::vector<Row>, std::vector<Row>> parts;
  for (std::size_t i = 0; i < n; ++i) {
    (held_out[i] ? parts.second : parts.first).push_back(std::move(rows[i]));
  }
  return parts;
}

}  // namespace nibble
