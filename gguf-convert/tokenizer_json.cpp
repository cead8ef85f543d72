// Hugging Face's tokenizer.json (and tokenizer_config.json) to a TokenizerSpec. Two styles of BPE
// are read, told apart by their pre-tokenizer and normalizer:
//
//   byte-level     a ByteLevel pre-tokenizer, alone or after Digits or one known Split pattern
//   SentencePiece  " " becomes U+2581 in the normalizer (or Metaspace without splitting), with
//                  byte fallback; merges become scores when the merge list is exactly what scores
//                  imply, and stay a merge list otherwise
//
// Anything else in the tree is Unsupported by name: a tokenizer that is nearly right trains a model
// that is quietly wrong. One exception: NFC in front of a byte-level BPE is read as no
// normalization, as llama.cpp does.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <unordered_set>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/json_fields.h"
#include "gguf-convert/pre_tokenizer_patterns.h"
#include "gguf-convert/quoted.h"
#include "gguf-convert/tokenizer_spec.h"

namespace nibble {
namespace {

using Json = nlohmann::json;

constexpr const char* space_mark = "\xE2\x96\x81";  // U+2581
constexpr const char* supported_trees =
    "; supported: ByteLevel as in GPT-2, Digits + ByteLevel as in SmolLM, the Split patterns of "
    "Llama 3 and Qwen2, and SentencePiece-style BPE as in Llama 2";

class Source {
 public:
  Source(const std::string& path, const Json& root, TokenizerSpec& spec)
      : path_(path), root_(root), spec_(spec) {}

  void read() {
    JsonFields top(root_, path_);
    const Json* model = top.object("model");
    if (model == nullptr) fail("\"model\" is missing");
    const JsonFields fields(*model, path_);
    const std::string type = fields.string("type", "BPE");
    if (type != "BPE")
      unsupported("a tokenizer model of type " + nibble::quoted(type) + "; supported: BPE");
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!fields.string(affix, "").empty()) unsupported("BPE with \"" + std::string(affix) + "\"");
    }
    read_kind(fields);
    read_vocabulary(fields);
    read_merges(fields);
    spec_.ignore_merges = fields.boolean("ignore_merges", false);
    if (spec_.model == "llama") merges_to_scores();
    read_post_processor(top.object("post_processor"));
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw FormatError(path_, 0, what); }
  [[noreturn]] void unsupported(const std::string& what) const {
    throw Unsupported(path_ + ": " + what);
  }
  std::string type_of(const Json& node) const { return JsonFields(node, path_).string("type"); }

  // The members of a Sequence, or the node itself; nothing for null.
  std::vector<Json> sequence(const char* key, const char* members) const {
    const Json* node = JsonFields(root_, path_).object(key);
    if (node == nullptr) return {};
    if (type_of(*node) != "Sequence") return {*node};
    const auto list = node->find(members);
    if (list == node->end() || !list->is_array())
      fail("\"" + std::string(members) + "\" is missing");
    for (const Json& item : *list) {
      if (!item.is_object()) fail("\"" + std::string(members) + "\" holds what is not an object");
    }
    return {list->begin(), list->end()};
  }

  // Decides model, pre and add_space_prefix from the pre-tokenizer and the normalizer.
  void read_kind(const JsonFields& model) {
    const auto steps = sequence("pre_tokenizer", "pretokenizers");
    const bool byte_level = std::any_of(steps.begin(), steps.end(),
                                        [&](const Json& s) { return type_of(s) == "ByteLevel"; });
    if (byte_level) {
      spec_.model = "gpt2";
      spec_.pre = byte_level_pre(steps);
    } else {
      spec_.model = "llama";
      spec_.pre = "default";
      byte_fallback_ = model.boolean("byte_fallback", false);
    }
    bool marks_spaces = false;
    for (const Json& step : sequence("normalizer", "normalizers")) {
      const JsonFields fields(step, path_);
      const std::string type = fields.string("type");
      if (byte_level && type == "NFC") continue;
      if (!byte_level && type == "Prepend" && fields.string("prepend") == space_mark) {
        spec_.add_space_prefix = true;
      } else if (!byte_level && type == "Replace" && replaces_space(fields)) {
        marks_spaces = true;
      } else {
        unsupported("normalizer " + nibble::quoted(type) + " in front of this BPE" +
                    supported_trees);
      }
    }
    if (!byte_level) read_metaspace(steps, marks_spaces);
  }

  bool replaces_space(const JsonFields& fields) const {
    const Json* pattern = fields.object("pattern");
    return pattern != nullptr && JsonFields(*pattern, path_).string("String", "") == " " &&
           fields.string("content") == space_mark;
  }

  void read_metaspace(const std::vector<Json>& steps, bool marks_spaces) {
    for (const Json& step : steps) {
      const JsonFields fields(step, path_);
      const std::string type = fields.string("type");
      if (type != "Metaspace")
        unsupported("pre-tokenizer " + nibble::quoted(type) + supported_trees);
      if (fields.string("replacement", space_mark) != space_mark || fields.boolean("split", true)) {
        unsupported(std::string("pre-tokenizer \"Metaspace\" that splits words") + supported_trees);
      }
      const bool prefix = fields.boolean("add_prefix_space", true);
      spec_.add_space_prefix =
          fields.string("prepend_scheme", prefix ? "always" : "never") != "never";
      marks_spaces = true;
    }
    if (!marks_spaces) unsupported(std::string("BPE that is not byte-level") + supported_trees);
  }

  std::string byte_level_pre(const std::vector<Json>& steps) const {
    const JsonFields last(steps.back(), path_);
    const bool regex = last.boolean("use_regex", true);
    std::string tree;
    for (const Json& step : steps) tree += (tree.empty() ? "" : " + ") + type_of(step);
    if (last.string("type") == "ByteLevel" && !last.boolean("add_prefix_space", false)) {
      if (steps.size() == 1 && regex) return "gpt-2";
      if (steps.size() == 2 && regex && isolates_digits(steps[0])) return "smollm";
      if (steps.size() == 2 && !regex) {
        const std::string pattern = split_regex(steps[0]);
        for (const auto& known : split_patterns) {
          if (known.regex == pattern) return std::string(known.name);
        }
        if (!pattern.empty()) tree = "Split " + nibble::quoted(pattern);
      }
    } else if (last.boolean("add_prefix_space", false)) {
      tree += " with add_prefix_space";
    }
    unsupported("pre-tokenizer " + tree + supported_trees);
  }

  bool isolates_digits(const Json& step) const {
    const JsonFields fields(step, path_);
    if (fields.string("type") == "Digits") return fields.boolean("individual_digits", false);
    return split_regex(step) == R"(\p{N})";
  }

  // The pattern of a Split that isolates its matches; empty for any other step.
  std::string split_regex(const Json& step) const {
    const JsonFields fields(step, path_);
    if (fields.string("type") != "Split" || fields.boolean("invert", false)) return "";
    const std::string behavior = fields.string("behavior", "");
    const Json* pattern = fields.object("pattern");
    if (pattern == nullptr || (behavior != "Isolated" && behavior != "isolated")) return "";
    return JsonFields(*pattern, path_).string("Regex", "");
  }

  void place(const std::string& text, const Json& id, std::size_t limit, TokenType type) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= limit) {
      fail("the id of token " + nibble::quoted(text) + " is " + id.dump() + "; wanted less than " +
           std::to_string(limit));
    }
    const auto at = id.get<std::size_t>();
    if (at >= spec_.tokens.size()) {
      spec_.tokens.resize(at + 1);
      spec_.types.resize(at + 1, TokenType::unused);
    }
    if (!spec_.tokens[at].empty() && spec_.tokens[at] != text) {
      fail("tokens " + nibble::quoted(spec_.tokens[at]) + " and " + nibble::quoted(text) +
           " have the same id " + std::to_string(at));
    }
    spec_.tokens[at] = text;
    spec_.types[at] = type;
    ids_[text] = static_cast<std::int32_t>(at);
  }

  void read_vocabulary(const JsonFields& model) {
    const Json* vocabulary = model.object("vocab");
    if (vocabulary == nullptr || vocabulary->empty()) fail("\"vocab\" is missing or empty");
    const Json* added = JsonFields(root_, path_).find("added_tokens");
    if (added != nullptr && !added->is_array()) fail("\"added_tokens\" is not a list");
    const std::size_t count = vocabulary->size() + (added == nullptr ? 0 : added->size());
    // Ids may have gaps, but no more than a file of this size explains.
    const std::size_t limit = 2 * count + 1024;
    const std::string unk = model.string("unk_token", "");
    for (const auto& [text, id] : vocabulary->items()) {
      const bool byte = byte_fallback_ && text.size() == 6 && text.rfind("<0x", 0) == 0;
      const TokenType type = !unk.empty() && text == unk ? TokenType::unknown
                             : byte                      ? TokenType::byte
                                                         : TokenType::normal;
      place(text, id, limit, type);
    }
    if (added != nullptr) {
      for (const Json& token : *added) read_added(token, limit, unk);
    }
    for (std::size_t i = 0; i < spec_.tokens.size(); ++i) {
      if (spec_.tokens[i].empty()) spec_.tokens[i] = "[PAD" + std::to_string(i) + "]";
    }
    if (!unk.empty()) spec_.unk = id_of(unk);
  }

  void read_added(const Json& token, std::size_t limit, const std::string& unk) {
    if (!token.is_object()) fail("\"added_tokens\" holds what is not an object");
    const JsonFields fields(token, path_);
    const std::string text = fields.string("content");
    const Json* id = fields.find("id");
    if (id == nullptr || text.empty()) fail("an added token without id or text");
    const TokenType type = text == unk                        ? TokenType::unknown
                           : fields.boolean("special", false) ? TokenType::control
                                                              : TokenType::user_defined;
    place(text, *id, limit, type);
  }

  std::int32_t id_of(const std::string& text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? -1 : found->second;
  }

  // "a b" or ["a", "b"]. A space inside a symbol cannot be kept apart in the first form; byte-level
  // symbols have none, SentencePiece symbols have U+2581.
  void read_merges(const JsonFields& model) {
    const Json* merges = model.find("merges");
    if (merges == nullptr || !merges->is_array()) fail("\"merges\" is missing or not a list");
    spec_.merges.reserve(merges->size());
    for (const Json& merge : *merges) {
      std::string pair;
      if (merge.is_string()) {
        pair = merge.get<std::string>();
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        pair = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
      }
      const std::size_t space = pair.find(' ', 1);
      if (space == std::string::npos || space + 1 == pair.size() ||
          pair.find(' ', space + 1) != std::string::npos) {
        fail("merge " + std::to_string(spec_.merges.size()) + " is " +
             nibble::quoted(merge.dump(-1, ' ', false, Json::error_handler_t::replace)) +
             "; wanted two symbols");
      }
      spec_.merges.push_back(std::move(pair));
    }
  }

  // A token's score is minus the rank of the first merge that makes it. That says as much as the
  // merge list if the merges of one token follow each other and no way of splitting a token is
  // missing; then the list is dropped. Tokens that nothing makes can only be produced by a model.
  void merges_to_scores() {
    const std::size_t n = spec_.tokens.size();
    spec_.scores.assign(n, 0);
    std::vector<bool> made(n);
    std::int32_t previous = -1;
    bool as_scores = true;
    for (std::size_t rank = 0; rank < spec_.merges.size(); ++rank) {
      std::string text = spec_.merges[rank];
      text.erase(text.find(' ', 1), 1);
      const std::int32_t id = id_of(text);
      if (id < 0)
        fail("merge " + std::to_string(rank) + " makes " + nibble::quoted(text) +
             ", which is no token");
      const auto at = static_cast<std::size_t>(id);
      if (!made[at]) spec_.scores[at] = -static_cast<float>(rank);
      as_scores = as_scores && (!made[at] || id == previous);
      made[at] = true;
      previous = id;
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (made[i]) continue;
      spec_.scores[i] = -static_cast<float>(spec_.merges.size() + i);
      if (spec_.types[i] == TokenType::normal && chars_in(spec_.tokens[i]) > 1) {
        spec_.types[i] = TokenType::unused;
      }
    }
    const std::unordered_set<std::string> distinct(spec_.merges.begin(), spec_.merges.end());
    if (as_scores && distinct.size() == implied_merges()) spec_.merges.clear();
  }

  static std::size_t chars_in(const std::string& text) {
    return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    }));
  }

  std::size_t implied_merges() const {
    std::size_t count = 0;
    const auto normal = [&](const std::string& text) {
      const std::int32_t id = id_of(text);
      return id >= 0 && spec_.types[static_cast<std::size_t>(id)] == TokenType::normal;
    };
    for (const std::string& text : spec_.tokens) {
      if (text.size() > 512 || !normal(text)) continue;
      for (std::size_t at = 1; at < text.size(); ++at) {
        if ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) continue;
        count += normal(text.substr(0, at)) && normal(text.substr(at));
      }
    }
    return count;
  }

  // BOS and EOS as a TemplateProcessing puts them around a single text.
  void read_post_processor(const Json* top) {
    if (top == nullptr) return;
    for (const Json& step : sequence("post_processor", "processors")) {
      if (type_of(step) != "TemplateProcessing") continue;
      const auto single = step.find("single");
      if (single == step.end() || !single->is_array() || single->empty()) continue;
      if (const auto id = special_id(single->front()); id >= 0) {
        spec_.add_bos = true;
        spec_.bos = id;
      }
      if (const auto id = special_id(single->back()); id >= 0 && single->size() > 1) {
        spec_.add_eos = true;
        spec_.eos = id;
      }
    }
  }

  std::int32_t special_id(const Json& piece) const {
    if (!piece.is_object()) return -1;
    const Json* token = JsonFields(piece, path_).object("SpecialToken");
    return token == nullptr ? -1 : id_of(JsonFields(*token, path_).string("id"));
  }

  const std::string& path_;
  const Json& root_;
  TokenizerSpec& spec_;
  bool byte_fallback_ = false;
  std::unordered_map<std::string, std::int32_t> ids_;
};

// A token in tokenizer_config.json is its text or an object with "content".
std::string token_text(const JsonFields& fields, const std::string& path, const char* key) {
  const Json* value = fields.find(key);
  if (value != nullptr && value->is_object()) return JsonFields(*value, path).string("content", "");
  return fields.string(key, "");
}

// One template, or a list of named ones of which "default" counts.
std::string chat_template(const JsonFields& fields) {
  const Json* value = fields.find("chat_template");
  if (value == nullptr || !value->is_array()) return fields.string("chat_template", "");
  for (const Json& entry : *value) {
    if (entry.is_object() && entry.value("name", Json()) == "default" &&
        entry.value("template", Json()).is_string()) {
      return entry["template"].get<std::string>();
    }
  }
  return "";
}

void read_config(const std::string& text, const std::string& path, TokenizerSpec& spec) {
  const Json config = parse_json_object(text, path);
  const JsonFields fields(config, path);
  const auto id = [&](const char* key, std::int32_t otherwise) {
    const std::string wanted = token_text(fields, path, key);
    const auto found = std::find(spec.tokens.begin(), spec.tokens.end(), wanted);
    if (wanted.empty() || found == spec.tokens.end()) return otherwise;
    return static_cast<std::int32_t>(found - spec.tokens.begin());
  };
  spec.bos = id("bos_token", spec.bos);
  spec.eos = id("eos_token", spec.eos);
  spec.unk = id("unk_token", spec.unk);
  spec.pad = id("pad_token", spec.pad);
  spec.add_bos = fields.boolean("add_bos_token", spec.add_bos) && spec.bos >= 0;
  spec.add_eos = fields.boolean("add_eos_token", spec.add_eos) && spec.eos >= 0;
  const std::string chat = chat_template(fields);
  if (!chat.empty()) spec.chat_template = chat;
}

}  // namespace

TokenizerSpec tokenizer_from_json(const std::string& json, const std::string& config,
                                  const std::string& path) {
  TokenizerSpec spec;
  const Json root = parse_json_object(json, path);
  Source(path, root, spec).read();
  if (!config.empty()) {
    const auto folder = std::filesystem::path(path).parent_path();
    read_config(config, (folder / "tokenizer_config.json").string(), spec);
  }
  return spec;
}

bool has_tokenizer_files(const std::string& directory) {
  const std::filesystem::path folder(directory);
  return std::filesystem::exists(folder / "tokenizer.json") ||
         std::filesystem::exists(folder / "tokenizer.model");
}

TokenizerSpec tokenizer_from_directory(const std::string& directory) {
  const std::filesystem::path folder(directory);
  const auto path = [&](const char* name) { return (folder / name).string(); };
  const auto text = [&](const char* name) {
    return std::filesystem::exists(folder / name) ? os::read_file(path(name)) : std::string();
  };
  TokenizerSpec spec;
  const std::string config = text("tokenizer_config.json");
  if (std::filesystem::exists(folder / "tokenizer.json")) {
    spec =
        tokenizer_from_json(os::read_file(path("tokenizer.json")), config, path("tokenizer.json"));
  } else if (std::filesystem::exists(folder / "tokenizer.model")) {
    const os::MappedFile file(path("tokenizer.model"));
    spec = tokenizer_from_sentencepiece(file.bytes(), path("tokenizer.model"));
    if (!config.empty()) read_config(config, path("tokenizer_config.json"), spec);
  } else {
    throw Unsupported(directory + ": there is neither tokenizer.json nor tokenizer.model");
  }
  const std::string jinja = text("chat_template.jinja");
  if (!jinja.empty()) spec.chat_template = jinja;
  return spec;
}

}  // namespace nibble
