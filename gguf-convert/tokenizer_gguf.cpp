// tokenizer.ggml.* metadata to and from a TokenizerSpec. Defaults of absent keys are llama.cpp's
// for the two models, except that an absent id of a byte-level vocabulary is "none" rather than
// token 11. A vocabulary without types is all normal.
#include <cmath>

#include "engine/error.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/quoted.h"
#include "gguf-convert/tokenizer_spec.h"

namespace nibble {
namespace {

constexpr const char* prefix = "tokenizer.ggml.";

class Reader {
 public:
  explicit Reader(const GgufFile& file) : file_(file) {}

  [[noreturn]] void fail(const std::string& key, const std::string& what) const {
    throw FormatError(file_.path(), file_.offset(prefix + key), prefix + key + ": " + what);
  }

  std::int32_t id(const std::string& key, std::int32_t fallback, std::size_t vocabulary) const {
    const std::int64_t value = file_.integer(prefix + key, fallback);
    // Some writers store "none" as -1 or as its unsigned image.
    if (value == -1 || value == 0xFFFFFFFF) return -1;
    if (value < 0 || value >= static_cast<std::int64_t>(vocabulary)) {
      fail(key,
           "token " + std::to_string(value) + " in a vocabulary of " + std::to_string(vocabulary));
    }
    return static_cast<std::int32_t>(value);
  }

  void expect_count(const std::string& key, std::size_t found, std::size_t wanted) const {
    if (found == wanted) return;
    fail(key, std::to_string(found) + " values for " + std::to_string(wanted) + " tokens");
  }

 private:
  const GgufFile& file_;
};

void read_types(const GgufFile& file, const Reader& reader, TokenizerSpec& spec) {
  spec.types.assign(spec.tokens.size(), TokenType::normal);
  const auto* types = file.integers("tokenizer.ggml.token_type");
  if (types == nullptr) return;
  reader.expect_count("token_type", types->size(), spec.tokens.size());
  for (std::size_t i = 0; i < types->size(); ++i) {
    const std::int64_t type = (*types)[i];
    if (type < 0 || type > 6) {
      reader.fail("token_type", "type " + std::to_string(type) + " of token " + std::to_string(i) +
                                    "; types are 1 to 6");
    }
    // 0 is "undefined"; llama.cpp treats such a token as a normal one.
    if (type > 0) spec.types[i] = static_cast<TokenType>(type);
  }
}

void read_scores(const GgufFile& file, const Reader& reader, TokenizerSpec& spec) {
  const auto* scores = file.reals("tokenizer.ggml.scores");
  if (scores == nullptr) reader.fail("scores", "missing; a SentencePiece vocabulary needs them");
  reader.expect_count("scores", scores->size(), spec.tokens.size());
  spec.scores.reserve(scores->size());
  for (const double score : *scores) {
    if (!std::isfinite(score)) reader.fail("scores", "a score that is not a finite number");
    spec.scores.push_back(static_cast<float>(score));
  }
}

void read_merges(const GgufFile& file, const Reader& reader, TokenizerSpec& spec) {
  const auto* merges = file.strings("tokenizer.ggml.merges");
  if (merges == nullptr && spec.model == "llama") return;
  if (merges == nullptr) reader.fail("merges", "missing; a byte-level BPE vocabulary needs them");
  for (std::size_t i = 0; i < merges->size(); ++i) {
    const std::size_t space = (*merges)[i].find(' ', 1);
    if (space != std::string::npos && space + 1 < (*merges)[i].size()) continue;
    reader.fail("merges", "merge " + std::to_string(i) + " is " + nibble::quoted((*merges)[i]) +
                              "; wanted two symbols separated by a space");
  }
  spec.merges = *merges;
}

bool is_llama_bpe(const std::string& pre) {
  return pre == "llama3" || pre == "llama-v3" || pre == "llama-bpe";
}

}  // namespace

TokenizerSpec tokenizer_from_gguf(const GgufFile& file) {
  const Reader reader(file);
  TokenizerSpec spec;
  spec.model = file.string("tokenizer.ggml.model", "");
  if (spec.model != "llama" && spec.model != "gpt2") {
    throw Unsupported(file.path() + ": tokenizer model " + nibble::quoted(spec.model) +
                      "; supported: llama (SentencePiece-BPE), gpt2 (byte-level BPE)");
  }
  const bool spm = spec.model == "llama";
  spec.pre = file.string("tokenizer.ggml.pre", "default");
  if (is_llama_bpe(spec.pre)) spec.pre = "llama-bpe";
  const auto* tokens = file.strings("tokenizer.ggml.tokens");
  if (tokens == nullptr || tokens->empty()) reader.fail("tokens", "missing or empty");
  spec.tokens = *tokens;
  const std::size_t n = spec.tokens.size();
  read_types(file, reader, spec);
  if (spm) read_scores(file, reader, spec);
  read_merges(file, reader, spec);
  const auto fallback = [&](std::int32_t id) {
    return spm && static_cast<std::size_t>(id) < n ? id : -1;
  };
  spec.bos = reader.id("bos_token_id", fallback(1), n);
  spec.eos = reader.id("eos_token_id", fallback(2), n);
  spec.unk = reader.id("unknown_token_id", fallback(0), n);
  spec.pad = reader.id("padding_token_id", -1, n);
  spec.eot = reader.id("eot_token_id", -1, n);
  spec.add_bos = file.boolean("tokenizer.ggml.add_bos_token", spm || spec.pre == "llama-bpe");
  spec.add_eos = file.boolean("tokenizer.ggml.add_eos_token", false);
  spec.add_space_prefix = file.boolean("tokenizer.ggml.add_space_prefix", spm);
  spec.ignore_merges = spec.pre == "llama-bpe";
  spec.chat_template = file.string("tokenizer.chat_template", "");
  return spec;
}

void write_tokenizer(const TokenizerSpec& spec, GgufWriter& writer) {
  const auto key = [](const char* name) { return std::string(prefix) + name; };
  writer.set_string(key("model"), spec.model);
  writer.set_string(key("pre"), spec.model == "llama" ? "default" : spec.pre);
  writer.set_strings(key("tokens"), spec.tokens);
  if (spec.model == "llama") writer.set_f32s(key("scores"), spec.scores);
  std::vector<std::int32_t> types;
  types.reserve(spec.types.size());
  for (const TokenType type : spec.types) types.push_back(static_cast<std::int32_t>(type));
  writer.set_i32s(key("token_type"), types);
  if (!spec.merges.empty()) writer.set_strings(key("merges"), spec.merges);
  const auto id = [&](const char* name, std::int32_t value) {
    if (value >= 0) writer.set_u32(key(name), static_cast<std::uint32_t>(value));
  };
  id("bos_token_id", spec.bos);
  id("eos_token_id", spec.eos);
  id("unknown_token_id", spec.unk);
  id("padding_token_id", spec.pad);
  id("eot_token_id", spec.eot);
  writer.set_bool(key("add_bos_token"), spec.add_bos);
  writer.set_bool(key("add_eos_token"), spec.add_eos);
  writer.set_bool(key("add_space_prefix"), spec.add_space_prefix);
  if (!spec.chat_template.empty()) {
    writer.set_string("tokenizer.chat_template", spec.chat_template);
  }
}

}  // namespace nibble
