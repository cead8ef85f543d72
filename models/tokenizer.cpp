#include "models/tokenizer.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <variant>

#include "engine/error.h"
#include "models/special_tokens.h"
#include "models/text_encoders.h"
#include "models/unicode.h"

namespace nibble {
namespace {

constexpr std::string_view space_mark = "\xE2\x96\x81";  // U+2581

// Texts that end a generation whatever a file's metadata says: conversions often name only one of
// several end tokens. The list of llama.cpp.
constexpr std::array<std::string_view, 13> end_texts = {
    "<|eot_id|>", "<|im_end|>",      "<|end|>",         "<end_of_turn>", "<|endoftext|>",
    "<|eom_id|>", "<|end_of_text|>", "<EOT>",           "_<EOT>",        "</s>",
    "<|eot|>",    "<|endofturn|>",   "<|end_of_turn|>",
};

bool ends_generation(std::string_view text) {
  return std::find(end_texts.begin(), end_texts.end(), text) != end_texts.end();
}

// Some conversions leave such a token's type at normal. Text like </s> can be a normal token of a
// byte-level vocabulary, text like <|im_end|> cannot.
bool is_mistyped_control(std::string_view text, TokenType type) {
  return type == TokenType::user_defined || (type == TokenType::normal && text.starts_with("<|"));
}

// Throws Error unless the lists fit together; fills in the optional ones.
void check(TokenizerSpec& spec) {
  const auto wrong = [](const std::string& what) {
    throw Error("tokenizer: " + what + "; the tokenizer file is damaged");
  };
  const std::size_t n = spec.tokens.size();
  if (spec.model != "llama" && spec.model != "gpt2") {
    throw Unsupported("tokenizer model \"" + spec.model +
                      "\"; supported: llama (SentencePiece-BPE), gpt2 (byte-level BPE)");
  }
  if (n == 0 || n > 1u << 28) wrong("a vocabulary of " + std::to_string(n) + " tokens");
  if (spec.types.empty()) spec.types.assign(n, TokenType::normal);
  const auto size = [&](const char* name, std::size_t count) {
    if (count == n) return;
    wrong(std::to_string(count) + " " + name + " for " + std::to_string(n) + " tokens");
  };
  size("types", spec.types.size());
  if (spec.model == "llama") size("scores", spec.scores.size());
  for (const auto& [name, id] : {std::pair{"bos", spec.bos},
                                 {"eos", spec.eos},
                                 {"unk", spec.unk},
                                 {"pad", spec.pad},
                                 {"eot", spec.eot}}) {
    if (id < -1 || id >= static_cast<std::int32_t>(n)) {
      wrong(std::string(name) + " is token " + std::to_string(id) + " of " + std::to_string(n));
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    if (ends_generation(spec.tokens[i]) && is_mistyped_control(spec.tokens[i], spec.types[i])) {
      spec.types[i] = TokenType::control;
    }
  }
}

std::string spm_piece(const std::string& token, TokenType type) {
  if (const int byte = byte_of_token(token); type == TokenType::byte && byte >= 0) {
    return std::string(1, static_cast<char>(byte));
  }
  if (type == TokenType::control || type == TokenType::unknown) return token;
  std::string piece;
  for (std::size_t at = 0; at < token.size();) {
    const bool space = token.compare(at, space_mark.size(), space_mark) == 0;
    piece += space ? ' ' : token[at];
    at += space ? space_mark.size() : 1;
  }
  return piece;
}

}  // namespace

struct Tokenizer::State {
  TokenizerSpec spec;
  std::vector<std::string> pieces;  // bytes by id
  std::vector<bool> ends;
  std::unordered_map<std::string_view, std::int32_t> ids;  // every token, views into spec
  SpecialTokens special;
  std::variant<std::monostate, BpeEncoder, SpmEncoder> encoder;

  explicit State(TokenizerSpec given) : spec(std::move(given)) {
    check(spec);
    const bool spm = spec.model == "llama";
    const std::size_t n = spec.tokens.size();
    pieces.reserve(n);
    ids.reserve(n);
    TokenIndex plain;
    plain.reserve(n);
    for (std::size_t i = 0; i < n; ++i) {
      const std::string& text = spec.tokens[i];
      const TokenType type = spec.types[i];
      const auto id = static_cast<std::int32_t>(i);
      ids[text] = id;
      if (type == TokenType::normal && !text.empty()) plain[text] = id;
      const bool control = type == TokenType::control || type == TokenType::unknown;
      if (control || type == TokenType::user_defined) special.add(text, id, !control);
      const bool literal = control || type == TokenType::user_defined;
      pieces.push_back(spm ? spm_piece(text, type) : literal ? text : bytes_of_alphabet(text));
      ends.push_back((control && ends_generation(text)) || id == spec.eos || id == spec.eot);
    }
    if (spm) {
      encoder.emplace<SpmEncoder>(spec, plain);
    } else {
      encoder.emplace<BpeEncoder>(spec, plain);
    }
  }
};

Tokenizer::Tokenizer(TokenizerSpec spec) : state_(std::make_unique<State>(std::move(spec))) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

const TokenizerSpec& Tokenizer::spec() const { return state_->spec; }

std::int32_t Tokenizer::size() const { return static_cast<std::int32_t>(state_->pieces.size()); }

const std::string& Tokenizer::piece(std::int32_t id) const {
  if (id < 0 || id >= size()) {
    throw Error("tokenizer: token id " + std::to_string(id) + " in a vocabulary of " +
                std::to_string(size()));
  }
  return state_->pieces[static_cast<std::size_t>(id)];
}

std::optional<std::int32_t> Tokenizer::find(std::string_view token_text) const {
  const auto found = state_->ids.find(token_text);
  if (found == state_->ids.end()) return std::nullopt;
  return found->second;
}

bool Tokenizer::is_special(std::int32_t id) const {
  if (id < 0 || id >= size()) return false;
  const TokenType type = state_->spec.types[static_cast<std::size_t>(id)];
  return type == TokenType::control || type == TokenType::unknown;
}

bool Tokenizer::is_end(std::int32_t id) const {
  return id >= 0 && id < size() && state_->ends[static_cast<std::size_t>(id)];
}

void Tokenizer::encode_plain(std::string_view text, bool space_prefix,
                             std::vector<std::int32_t>& out) const {
  if (text.empty()) return;
  if (const auto* bpe = std::get_if<BpeEncoder>(&state_->encoder)) {
    bpe->encode(text, out);
  } else if (const auto* spm = std::get_if<SpmEncoder>(&state_->encoder)) {
    const bool space = space_prefix && state_->spec.add_space_prefix;
    spm->encode(text, space ? SpmEncoder::Prefix::space : SpmEncoder::Prefix::none, out);
  }
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  const TokenizerSpec& spec = state_->spec;
  if (text.size() >= 1u << 31) throw Error("tokenizer: a text of 2 GiB or more; split it");
  std::vector<std::int32_t> out;
  out.reserve(text.size() / 3 + 2);
  if (options.add_special && spec.add_bos && spec.bos >= 0) out.push_back(spec.bos);
  std::size_t at = 0;
  for (const auto& match : state_->special.find(text, options.parse_special)) {
    encode_plain(text.substr(at, match.begin - at), at > 0 || !options.continues, out);
    out.push_back(match.id);
    at = match.end;
  }
  encode_plain(text.substr(at), at > 0 || !options.continues, out);
  if (options.add_special && spec.add_eos && spec.eos >= 0) out.push_back(spec.eos);
  return out;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, DecodeOptions options) const {
  const TokenizerSpec& spec = state_->spec;
  bool drop_space = spec.model == "llama" && spec.add_space_prefix && !options.continues;
  std::string text;
  for (const std::int32_t id : ids) {
    std::string_view part = piece(id);
    if (is_special(id)) {
      if (options.special) text += part;
      continue;
    }
    if (drop_space && !part.empty() && part.front() == ' ') part.remove_prefix(1);
    drop_space = false;
    text += part;
  }
  return text;
}

std::string StreamDecoder::push(std::int32_t id) {
  held_ += tokenizer_.decode(std::span(&id, 1), options_);
  if (!tokenizer_.is_special(id)) options_.continues = true;
  std::string text;
  held_.erase(0, append_valid_utf8(text, held_, TextEnd::more_follows));
  return text;
}

std::string StreamDecoder::finish() {
  std::string text;
  append_valid_utf8(text, held_, TextEnd::last);
  held_.clear();
  return text;
}

}  // namespace nibble
