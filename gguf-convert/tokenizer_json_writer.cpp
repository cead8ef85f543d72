// A TokenizerSpec as Hugging Face's tokenizer.json and tokenizer_config.json. The long parts, the
// vocabulary and the merges, are written token by token: an ordered JSON object looks every key up.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <tuple>
#include <unordered_map>

#include "engine/error.h"
#include "gguf-convert/pre_tokenizer_patterns.h"
#include "gguf-convert/quoted.h"
#include "gguf-convert/tokenizer_spec.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* space_mark = "\xE2\x96\x81";  // U+2581

std::string json_string(const std::string& text) {
  try {
    return Json(text).dump();
  } catch (const Json::exception&) {
    throw Unsupported("tokenizer.json cannot hold token " + nibble::quoted(text) +
                      ", which is not UTF-8; write a GGUF file instead");
  }
}

bool is_added(TokenType type) {
  return type == TokenType::control || type == TokenType::unknown ||
         type == TokenType::user_defined;
}

Json added_tokens(const TokenizerSpec& spec) {
  Json list = Json::array();
  for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
    if (!is_added(spec.types[i])) continue;
    list.push_back({{"id", i},
                    {"content", spec.tokens[i]},
                    {"single_word", false},
                    {"lstrip", false},
                    {"rstrip", false},
                    {"normalized", false},
                    {"special", spec.types[i] != TokenType::user_defined}});
  }
  return list;
}

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Json pre_tokenizer(const TokenizerSpec& spec) {
  if (spec.model == "llama") return nullptr;
  if (spec.pre == "gpt-2") return byte_level(true);
  Json steps = Json::array();
  if (spec.pre == "smollm") {
    steps = {{{"type", "Digits"}, {"individual_digits", true}}, byte_level(true)};
  }
  for (const auto& known : split_patterns) {
    if (known.name != spec.pre) continue;
    steps = {{{"type", "Split"},
              {"pattern", {{"Regex", known.regex}}},
              {"behavior", "Isolated"},
              {"invert", false}},
             byte_level(false)};
  }
  if (steps.empty()) {
    throw Unsupported("tokenizer.json for pre-tokenizer " + nibble::quoted(spec.pre) +
                      "; supported: gpt-2, smollm, llama-bpe, qwen2");
  }
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

Json normalizer(const TokenizerSpec& spec) {
  if (spec.model != "llama") return nullptr;
  Json steps = Json::array();
  if (spec.add_space_prefix) steps.push_back({{"type", "Prepend"}, {"prepend", space_mark}});
  steps.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", space_mark}});
  return {{"type", "Sequence"}, {"normalizers", steps}};
}

Json decoder(const TokenizerSpec& spec) {
  if (spec.model != "llama") return byte_level(true);
  Json steps = {
      {{"type", "Replace"}, {"pattern", {{"String", space_mark}}}, {"content", " "}},
      {{"type", "ByteFallback"}},
      {{"type", "Fuse"}},
  };
  if (spec.add_space_prefix) {
    steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  return {{"type", "Sequence"}, {"decoders", steps}};
}

// BOS and EOS around a text, if the model wants either.
Json post_processor(const TokenizerSpec& spec) {
  const bool bos = spec.add_bos && spec.bos >= 0, eos = spec.add_eos && spec.eos >= 0;
  if (!bos && !eos) return nullptr;
  Json special = Json::object();
  const auto token = [&](std::int32_t id) -> Json {
    const std::string& text = spec.tokens[static_cast<std::size_t>(id)];
    special[text] = {{"id", text}, {"ids", Json::array({id})}, {"tokens", Json::array({text})}};
    return {{"SpecialToken", {{"id", text}, {"type_id", 0}}}};
  };
  Json single = Json::array(), pair = Json::array();
  for (const char* sequence : {"A", "B"}) {
    const Json text = {{"Sequence", {{"id", sequence}, {"type_id", 0}}}};
    if (bos) pair.push_back(token(spec.bos));
    pair.push_back(text);
    if (eos) pair.push_back(token(spec.eos));
    if (sequence[0] == 'A') single = pair;
  }
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", pair},
          {"special_tokens", special}};
}

// The merge list that scores imply: every split of a token into two tokens, best score first.
std::vector<std::string> merges_of_scores(const TokenizerSpec& spec) {
  using Merge = std::tuple<float, std::int32_t, std::int32_t, std::int32_t>;
  std::unordered_map<std::string, std::int32_t> ids;
  for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
    if (spec.types[i] == TokenType::normal) ids[spec.tokens[i]] = static_cast<std::int32_t>(i);
  }
  std::vector<Merge> found;
  for (const auto& [text, id] : ids) {
    if (text.size() > 512) continue;
    for (std::size_t at = 1; at < text.size(); ++at) {
      if ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) continue;
      const auto left = ids.find(text.substr(0, at)), right = ids.find(text.substr(at));
      if (left == ids.end() || right == ids.end()) continue;
      found.emplace_back(-spec.scores[static_cast<std::size_t>(id)], id, left->second,
                         right->second);
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<std::string> merges;
  merges.reserve(found.size());
  for (const auto& [score, id, left, right] : found) {
    merges.push_back(spec.tokens[static_cast<std::size_t>(left)] + " " +
                     spec.tokens[static_cast<std::size_t>(right)]);
  }
  return merges;
}

// {"a": 0, "b": 1}: the tokens that are in the model rather than only added.
std::string vocabulary(const TokenizerSpec& spec) {
  std::string text = "{";
  for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
    text += (i == 0 ? "\n" : ",\n") + std::string("      ") + json_string(spec.tokens[i]) + ": " +
            std::to_string(i);
  }
  return text + "\n    }";
}

std::string merge_list(const std::vector<std::string>& merges) {
  std::string text = "[";
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::size_t space = merges[i].find(' ', 1);
    text += (i == 0 ? "\n" : ",\n") + std::string("      [") +
            json_string(merges[i].substr(0, space)) + ", " +
            json_string(merges[i].substr(space + 1)) + "]";
  }
  return text + "\n    ]";
}

}  // namespace

std::string tokenizer_to_json(const TokenizerSpec& spec) {
  const bool spm = spec.model == "llama";
  const bool has_unk = spm && spec.unk >= 0;
  const auto merges = spm && spec.merges.empty() ? merges_of_scores(spec) : spec.merges;
  std::string out = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n";
  const auto member = [&](const char* name, const Json& value) {
    out += "  \"" + std::string(name) + "\": " + value.dump() + ",\n";
  };
  for (const std::string& token : spec.tokens) json_string(token);  // all must be UTF-8
  member("added_tokens", added_tokens(spec));
  member("normalizer", normalizer(spec));
  member("pre_tokenizer", pre_tokenizer(spec));
  member("post_processor", post_processor(spec));
  member("decoder", decoder(spec));
  const Json unk = has_unk ? Json(spec.tokens[static_cast<std::size_t>(spec.unk)]) : Json(nullptr);
  out += "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": " +
         unk.dump() + ",\n    \"continuing_subword_prefix\": null,\n" +
         "    \"end_of_word_suffix\": null,\n    \"fuse_unk\": " + (spm ? "true" : "false") +
         ",\n    \"byte_fallback\": " + (spm ? "true" : "false") +
         ",\n    \"ignore_merges\": " + (spec.ignore_merges ? "true" : "false") +
         ",\n    \"vocab\": " + vocabulary(spec) + ",\n    \"merges\": " + merge_list(merges) +
         "\n  }\n}\n";
  return out;
}

std::string tokenizer_config_to_json(const TokenizerSpec& spec) {
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"add_bos_token", spec.add_bos},
                 {"add_eos_token", spec.add_eos},
                 {"clean_up_tokenization_spaces", false}};
  const auto token = [&](const char* name, std::int32_t id) {
    if (id >= 0) config[name] = spec.tokens[static_cast<std::size_t>(id)];
  };
  token("bos_token", spec.bos);
  token("eos_token", spec.eos);
  token("unk_token", spec.unk);
  token("pad_token", spec.pad);
  if (!spec.chat_template.empty()) config["chat_template"] = spec.chat_template;
  return config.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace nibble
