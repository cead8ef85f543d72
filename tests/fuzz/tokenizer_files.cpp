// Tokenizer files and training data, cut short and damaged: tokenizer.json, tokenizer.model, the
// vocabulary of a GGUF file, rows in JSON lines and in an array. Whatever is still read is used: it
// encodes and decodes, is written out again, or gives rows whose parts fit together.
#include <doctest/doctest.h>

#include <filesystem>
#include <vector>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/gguf.h"
#include "models/chat.h"
#include "models/dataset.h"
#include "models/unicode.h"
#include "tests/fuzz/mutate.h"
#include "tests/unit/scratch.h"
#include "tests/unit/tiny_vocabulary.h"

using namespace nibble;
using test::get;
using test::Outcomes;
using test::put;
using test::Scratch;

namespace {

void use(const TokenizerSpec& spec) {
  const Tokenizer tokenizer(spec);
  const std::string text = " hello  12\n\xC3\xA9\xFF<|im_end|></s>'s";
  const auto ids = tokenizer.encode(text, {.add_special = true, .parse_special = true});
  tokenizer.decode(ids, {.special = true});
  StreamDecoder stream(tokenizer);
  std::string streamed;
  for (std::int32_t id = 0; id < tokenizer.size(); ++id) streamed += stream.push(id);
  REQUIRE(is_valid_utf8(streamed + stream.finish()));
  tokenizer_to_json(spec);
  if (!tokenizer.find("<|im_start|>")) return;
  const ChatTemplate chat(tokenizer);
  chat.encode(tokenizer, {{"user", text}}, ChatEnd::wants_answer);
}

void read_json(const std::string& path) { use(tokenizer_from_json(os::read_file(path), "", path)); }

void read_config(const std::string& path) {
  use(tokenizer_from_json(tokenizer_to_json(test::tiny_bpe()), os::read_file(path), path));
}

void read_model(const std::string& path) {
  const os::MappedFile file(path);
  use(tokenizer_from_sentencepiece(file.bytes(), path));
}

void read_gguf(const std::string& path) { use(tokenizer_from_gguf(GgufFile(path))); }

void read_rows(const std::string& path) {
  static const Tokenizer tokenizer(test::tiny_bpe());
  for (const bool skip_bad : {true, false}) {
    DatasetOptions options;
    options.skip_bad = skip_bad;
    options.seq = 400;
    options.truncate = true;
    for (const Row& row : load_dataset({path}, tokenizer, options).rows) {
      REQUIRE(row.ids.size() == row.trained.size());
      REQUIRE(row.ids.size() <= 400);
      REQUIRE(is_valid_utf8(render(row, tokenizer)));
    }
  }
}

// A SentencePiece BPE model of the pieces of tiny_spm(), encoded by hand.
std::string small_model() {
  const auto field = [](char key, const std::string& bytes) {
    return std::string{key, static_cast<char>(bytes.size())} + bytes;
  };
  const TokenizerSpec spec = test::tiny_spm();
  std::string file;
  for (std::size_t i = 0; i < spec.tokens.size(); ++i) {
    const float score = spec.scores[i];
    std::string piece = field('\x0A', spec.tokens[i]);
    piece += '\x15';
    piece.append(reinterpret_cast<const char*>(&score), sizeof score);
    piece += {'\x18', static_cast<char>(spec.types[i])};
    file += field('\x0A', piece);
  }
  file += field('\x12', std::string{'\x18', 2});
  file += field('\x1A', std::string{'\x18', 1, '\x20', 0});
  return file;
}

std::string small_gguf(const Scratch& scratch, const TokenizerSpec& spec) {
  GgufWriter writer(scratch / "seed.gguf");
  write_tokenizer(spec, writer);
  writer.begin();
  writer.finish();
  return get(scratch / "seed.gguf");
}

void check(const std::string& bytes, std::uint64_t seed, const test::Reader& reader) {
  const Scratch scratch;
  const std::string path = scratch / "file";
  put(path, bytes);
  Outcomes whole;
  test::read_hostile(path, "unchanged", reader, whole);
  CHECK(whole.read == 1);
  const std::size_t every = bytes.size() < 1500 ? bytes.size() : 0;
  const Outcomes cut = test::read_prefixes(path, bytes, every, every > 0 ? 0 : 300, seed, reader);
  const Outcomes changed = test::read_mutations(path, bytes, bytes.size(), 700, seed + 1, reader);
  MESSAGE("cut: " << cut.read << " read, " << cut.refused << " refused; changed: " << changed.read
                  << " read, " << changed.refused << " refused");
  CHECK(cut.refused > 0);
  CHECK(changed.refused > 0);
}

}  // namespace

TEST_CASE("tokenizer.json: prefixes and mutations") {
  for (const char* pre : {"smollm", "gpt-2", "llama-bpe"}) {
    TokenizerSpec spec = test::tiny_bpe();
    spec.pre = pre;
    check(tokenizer_to_json(spec), 1, read_json);
  }
  TokenizerSpec spec = test::tiny_spm();
  spec.tokens.push_back("<|im_start|>"), spec.tokens.push_back("<|im_end|>");
  spec.types.resize(spec.tokens.size(), TokenType::control);
  spec.scores.resize(spec.tokens.size());
  check(tokenizer_to_json(spec), 3, read_json);
}

TEST_CASE("tokenizer_config.json: prefixes and mutations") {
  TokenizerSpec spec = test::tiny_bpe();
  spec.chat_template = "{{ '<|im_start|>system\nhello<|im_end|>\n' }}";
  check(tokenizer_config_to_json(spec), 5, read_config);
}

TEST_CASE("tokenizer.model: prefixes and mutations") {
  const Scratch scratch;
  put(scratch / "whole", small_model());
  const os::MappedFile file(scratch / "whole");
  CHECK(tokenizer_from_sentencepiece(file.bytes(), "whole").tokens == test::tiny_spm().tokens);
  check(small_model(), 7, read_model);
}

TEST_CASE("GGUF vocabularies: prefixes and mutations") {
  const Scratch scratch;
  check(small_gguf(scratch, test::tiny_bpe()), 9, read_gguf);
  check(small_gguf(scratch, test::tiny_spm()), 11, read_gguf);
}

TEST_CASE("training rows: prefixes and mutations") {
  const std::string rows =
      R"({"instruction": "Add.", "input": "1 \u00e9", "output": "3"}
{"instruction": "Greet.", "output": "hello \ud83d\ude00"}
)";
  check(rows, 13, read_rows);
  check(R"([{"prompt": "a", "completion": "b"}, {"prompt": "c\"]", "completion": "d"}])", 15,
        read_rows);
  check(R"({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"},)"
        R"( {"role": "assistant", "content": "hello"}]})",
        17, read_rows);
  check(R"({"conversations": [{"from": "human", "value": "y"}, {"from": "gpt", "value": "z"}]})",
        19, read_rows);
}

TEST_CASE("nesting a million deep is refused without running out of stack") {
  const Scratch scratch;
  const std::string deep(1 << 20, '[');
  for (const std::string& text :
       {deep, "{\"text\": " + deep, "{\"text\": " + deep + std::string(1 << 20, ']') + "}"}) {
    put(scratch / "rows.jsonl", text);
    CHECK_THROWS_AS(read_rows(scratch / "rows.jsonl"), Error);
    put(scratch / "tokenizer.json", text);
    CHECK_THROWS_AS(read_json(scratch / "tokenizer.json"), Error);
  }
}
