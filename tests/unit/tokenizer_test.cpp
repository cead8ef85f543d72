// Golden encodings of every covered vocabulary, and the properties that hold for all of them:
// decoding gives the text back, any bytes can be encoded, streaming never splits a character.
#include "models/tokenizer.h"

#include <doctest/doctest.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <sstream>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/gguf.h"
#include "models/merge_table.h"
#include "models/unicode.h"
#include "tests/unit/scratch.h"
#include "tests/unit/shared_data.h"
#include "tests/unit/tiny_vocabulary.h"

using namespace nibble;
using nibble::test::shared;
using nibble::test::tiny_bpe;
using nibble::test::tiny_spm;
using Ids = std::vector<std::int32_t>;

namespace {

Tokenizer gguf_tokenizer(const std::string& path) {
  return Tokenizer(tokenizer_from_gguf(GgufFile(path)));
}

std::string unpacked(const std::string& path) {
  const std::string command = "gzip -dc '" + path + "'";
  std::FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  std::array<char, 65536> block;
  for (std::size_t n; (n = std::fread(block.data(), 1, block.size(), pipe)) > 0;) {
    text.append(block.data(), n);
  }
  REQUIRE(pclose(pipe) == 0);
  return text;
}

Tokenizer json_tokenizer(const std::string& path) {
  const bool packed = path.ends_with(".gz");
  return Tokenizer(tokenizer_from_json(packed ? unpacked(path) : os::read_file(path), "", path));
}

Tokenizer spm_tokenizer(const std::string& path) {
  const os::MappedFile file(path);
  return Tokenizer(tokenizer_from_sentencepiece(file.bytes(), path));
}

// llama.cpp's vocabulary tests: cases apart from one file, one line of ids each from another.
void check_llama_cpp_vectors(const Tokenizer& tokenizer, const std::string& vectors) {
  const std::string mark = "\n__ggml_vocab_test__\n";
  const std::string cases = os::read_file(vectors + ".inp");
  std::istringstream expected(os::read_file(vectors + ".out"));
  int count = 0;
  std::string line;
  for (std::size_t at = 0; at < cases.size(); ++count) {
    const std::size_t end = std::min(cases.find(mark, at), cases.size());
    const std::string text = cases.substr(at, end - at);
    at = end + mark.size();
    REQUIRE(std::getline(expected, line));
    std::istringstream numbers(line);
    Ids wanted;
    for (std::int32_t id; numbers >> id;) wanted.push_back(id);
    CAPTURE(text);
    CHECK(tokenizer.encode(text) == wanted);
    CHECK(tokenizer.decode(wanted) == text);
  }
  CHECK(count == 46);
}

// One JSON object per line: text, ids, decoded. `normalized` are the cases whose text is not in NFC
// and which the original composed; Nibble does not normalize. Where js_agrees is false, two
// original implementations differ from each other: bytes that the vocabulary lacks.
void check_json_vectors(const Tokenizer& tokenizer, const std::string& vectors,
                        bool parse_special = true, const std::set<int>& normalized = {}) {
  std::istringstream lines(os::read_file(vectors));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const auto row = nlohmann::json::parse(line);
    const auto text = row.at("text").get<std::string>();
    const Ids ids = row.at("ids").get<Ids>();
    CAPTURE(text);
    CHECK(tokenizer.decode(ids, {.special = parse_special}) ==
          row.at("decoded").get<std::string>());
    if (normalized.count(count) != 0) continue;
    CHECK(tokenizer.encode(text, {.parse_special = parse_special}) == ids);
  }
  CHECK(count == 276);
}

std::string random_text(std::mt19937& random, std::size_t length) {
  // Mostly words and spaces, with digits, punctuation, wide characters and raw bytes in between.
  static const std::vector<std::string> parts = {"the",
                                                 " ",
                                                 "  ",
                                                 "\n",
                                                 "\r\n",
                                                 "\t",
                                                 "hello",
                                                 "'s",
                                                 "'LL",
                                                 "12",
                                                 "3",
                                                 ".",
                                                 "!?",
                                                 "<|",
                                                 "\xC3\xA9",
                                                 "\xE4\xB8\xAD\xE6\x96\x87",
                                                 "\xF0\x9F\x98\x80",
                                                 "\xE2\x96\x81",
                                                 "\xC2\xA0",
                                                 "<s>"};
  std::string text;
  while (text.size() < length) {
    const auto pick = random() % (parts.size() + 4);
    text += pick < parts.size() ? parts[pick] : std::string(1, static_cast<char>(random()));
  }
  return text;
}

std::vector<Tokenizer> all_tokenizers() {
  std::vector<Tokenizer> list;
  for (const char* pre : {"smollm", "gpt-2", "llama-bpe", "qwen2"}) {
    TokenizerSpec spec = tiny_bpe();
    spec.pre = pre;
    list.emplace_back(spec);
  }
  list.emplace_back(tiny_spm());
  for (const char* name :
       {"vectors/vocab/ggml-vocab-gpt-2.gguf", "vectors/vocab/ggml-vocab-llama-spm.gguf",
        "models/stories260K/stories260K-q8_0.gguf"}) {
    if (std::filesystem::exists(shared(name))) list.push_back(gguf_tokenizer(shared(name)));
  }
  return list;
}

}  // namespace

TEST_CASE("golden encodings: SentencePiece and GPT-2 vocabularies in GGUF") {
  for (const char* name : {"llama-spm", "gpt-2"}) {
    const std::string path = shared("vectors/vocab/ggml-vocab-") + name + ".gguf";
    SKIP_WITHOUT(path);
    CAPTURE(path);
    check_llama_cpp_vectors(gguf_tokenizer(path), path);
  }
}

TEST_CASE("golden encodings: Llama 2's tokenizer.model") {
  const std::string path = shared("models/llama2_tokenizer.model");
  SKIP_WITHOUT(path);
  const Tokenizer tokenizer = spm_tokenizer(path);
  check_json_vectors(tokenizer, shared("vectors/tokenizers/llama2_spm.jsonl"), false);
  check_llama_cpp_vectors(tokenizer, shared("vectors/vocab/ggml-vocab-llama-spm.gguf"));
}

TEST_CASE("golden encodings: tokenizer.json of Llama 3 and Qwen") {
  const std::string folder = shared("vectors/tokenizers/"), vocab = shared("vectors/vocab/");
  SKIP_WITHOUT(folder);
  const std::set<int> composed = {124, 150, 199, 201};
  const Tokenizer llama3 = json_tokenizer(folder + "llama3.tokenizer.json.gz");
  check_json_vectors(llama3, folder + "llama3.jsonl");
  check_llama_cpp_vectors(llama3, vocab + "ggml-vocab-llama-bpe.gguf");
  const Tokenizer qwen3 = json_tokenizer(folder + "qwen3.tokenizer.json.gz");
  check_json_vectors(qwen3, folder + "qwen3.jsonl", true, composed);
  check_llama_cpp_vectors(qwen3, vocab + "ggml-vocab-qwen2.gguf");
  const Tokenizer small_llama3 = json_tokenizer(folder + "tokenizer.json");
  check_json_vectors(small_llama3, folder + "torchtune_llama3ish_2000.jsonl");
  const Tokenizer small_qwen = json_tokenizer(folder + "tiny_bpe_tokenizer.json");
  check_json_vectors(small_qwen, folder + "torchtune_qwen2ish_2000.jsonl", true, composed);
}

TEST_CASE("stories260K: reference tokens are what its text encodes to") {
  const std::string path = shared("models/stories260K/stories260K-f32.gguf");
  SKIP_WITHOUT(path);
  const Tokenizer tokenizer = gguf_tokenizer(path);
  const auto reference =
      nlohmann::json::parse(os::read_file(shared("models/stories260K/reference_numpy.json")));
  const Ids ids = reference.at("ids").get<Ids>();
  const std::string text = tokenizer.decode(ids);
  CHECK(text.starts_with("Once upon a time"));
  CHECK(tokenizer.encode(text, {.add_special = true}) == ids);
  CHECK(tokenizer.is_end(2));
  CHECK_FALSE(tokenizer.is_end(1));
}

TEST_CASE("a unigram model, normalization and unknown pre-tokenizers are Unsupported by name") {
  TokenizerSpec spec = tiny_bpe();
  spec.pre = "tekken";
  CHECK_THROWS_WITH_AS(Tokenizer{spec}, doctest::Contains("tekken"), Unsupported);
  const std::string path = shared("vectors/tokenizers/m.model");
  SKIP_WITHOUT(path);
  CHECK_THROWS_WITH_AS(spm_tokenizer(path), doctest::Contains("unigram"), Unsupported);
}

TEST_CASE("byte-level BPE merges by rank and keeps what has no token") {
  const Tokenizer tokenizer(tiny_bpe());
  CHECK(tokenizer.encode("hello") == Ids{262});
  CHECK(tokenizer.encode("hell h\xFF") == Ids{261, 3 + ' ', 3 + 'h', 3 + 0xFF});
  CHECK(tokenizer.piece(262) == "hello");
  // The merged symbol "ab" is no token here: it is spelled in bytes.
  TokenizerSpec spec = tiny_bpe({"a b", "ab c"});
  spec.tokens[259] = "other";
  const Tokenizer spelling(spec);
  CHECK(spelling.encode("ab") == Ids{3 + 'a', 3 + 'b'});
  CHECK(spelling.encode("abc") == Ids{260});
}

TEST_CASE("bytes without a token are dropped before merging") {
  TokenizerSpec spec = tiny_bpe();
  spec.tokens[3 + 0xC3] = "other";
  spec.tokens[3 + 0xA9] = "another";
  const Tokenizer tokenizer(spec);
  CHECK(tokenizer.encode("he\xC3\xA9llo") == tokenizer.encode("hello"));
}

TEST_CASE("SentencePiece merges by score and spells what has no token in bytes") {
  const Tokenizer tokenizer(tiny_spm());
  CHECK(tokenizer.encode("hello", {.add_special = true}) ==
        Ids{1, *tokenizer.find("\xE2\x96\x81hello")});
  CHECK(tokenizer.encode("hello", {.continues = true}) == Ids{*tokenizer.find("hello")});
  CHECK(tokenizer.encode("\xC3\xA9", {.continues = true}) == Ids{3 + 0xC3, 3 + 0xA9});
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.decode(Ids{1, *tokenizer.find("\xE2\x96\x81hello"), 2}) == "hello");
  CHECK(tokenizer.decode(Ids{*tokenizer.find("\xE2\x96\x81hello")}, {.continues = true}) ==
        " hello");
}

TEST_CASE("control tokens come from text only when asked for, user-defined ones always") {
  TokenizerSpec spec = tiny_bpe();
  spec.tokens.push_back("<tool>");
  spec.types.push_back(TokenType::user_defined);
  const Tokenizer tokenizer(spec);
  const std::string text = "he<|im_end|>he<tool>";
  CHECK(tokenizer.encode(text, {.parse_special = true}) == Ids{259, 2, 259, 263});
  const Ids plain = tokenizer.encode(text);
  CHECK(std::count(plain.begin(), plain.end(), 2) == 0);
  CHECK(plain.back() == 263);
  CHECK(tokenizer.decode(plain) == text);
  CHECK(tokenizer.decode(Ids{1, 259, 2}) == "he");
  CHECK(tokenizer.decode(Ids{1, 259, 2}, {.special = true}) == "<|im_start|>he<|im_end|>");
  CHECK(tokenizer.is_end(2));
  CHECK(tokenizer.is_end(0));
  CHECK_FALSE(tokenizer.is_end(1));
}

TEST_CASE("special tokens: the longest wins, then the leftmost") {
  TokenizerSpec spec = tiny_bpe();
  for (const char* text : {"ab", "abc", "bcde"}) {
    spec.tokens.push_back(text);
    spec.types.push_back(TokenType::user_defined);
  }
  const Tokenizer tokenizer(spec);
  CHECK(tokenizer.encode("abcde") == Ids{3 + 'a', 265});
  CHECK(tokenizer.encode("abcab") == Ids{264, 263});
}

TEST_CASE("any bytes encode, decode to themselves and stream as valid UTF-8") {
  std::mt19937 random(7);
  for (const Tokenizer& tokenizer : all_tokenizers()) {
    for (int round = 0; round < 200; ++round) {
      std::string text = random_text(random, 1 + random() % 200);
      const bool spm = tokenizer.spec().model == "llama";
      // U+2581 in a SentencePiece text is a space afterwards, as in the original.
      for (std::size_t at; spm && (at = text.find("\xE2\x96\x81")) != std::string::npos;) {
        text.erase(at, 3);
      }
      const Ids ids = tokenizer.encode(text);
      REQUIRE(tokenizer.decode(ids) == text);
      StreamDecoder stream(tokenizer);
      std::string streamed, expected;
      for (const std::int32_t id : ids) {
        const std::string part = stream.push(id);
        REQUIRE(is_valid_utf8(part));
        streamed += part;
      }
      streamed += stream.finish();
      append_valid_utf8(expected, text, TextEnd::last);
      REQUIRE(streamed == expected);
    }
  }
}

TEST_CASE("StreamDecoder holds a character back until it is complete") {
  const Tokenizer tokenizer(tiny_bpe());
  StreamDecoder stream(tokenizer);
  CHECK(stream.push(3 + 0xF0).empty());
  CHECK(stream.push(3 + 0x9F).empty());
  CHECK(stream.push(3 + 0x98).empty());
  CHECK(stream.push(3 + 0x80) == "\xF0\x9F\x98\x80");
  CHECK(stream.push(3 + 0xC3).empty());
  CHECK(stream.push(3 + 'a') ==
        "\xEF\xBF\xBD"
        "a");
  CHECK(stream.push(3 + 0xE4).empty());
  CHECK(stream.finish() == "\xEF\xBF\xBD");
  CHECK(stream.finish().empty());
}

TEST_CASE("merging with the heap equals merging by scanning") {
  MergeTable table;
  std::mt19937 random(3);
  for (std::uint32_t rank = 0; rank < 400; ++rank) {
    const auto symbol = [&] { return static_cast<std::int32_t>(random() % 40); };
    table.add(symbol(), symbol(), {rank / 2, symbol()});
  }
  for (int round = 0; round < 300; ++round) {
    Ids symbols(33 + random() % 60);
    for (auto& s : symbols) s = static_cast<std::int32_t>(random() % 10);
    Ids expected = symbols;
    for (;;) {  // the definition: lowest rank, leftmost, until none is left
      std::size_t best = 0;
      MergeTable::Merge found{MergeTable::no_rank, -1};
      for (std::size_t i = 0; i + 1 < expected.size(); ++i) {
        const auto merge = table.find(expected[i], expected[i + 1]);
        if (merge.rank < found.rank) best = i, found = merge;
      }
      if (found.rank == MergeTable::no_rank) break;
      expected[best] = found.result;
      expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(best) + 1);
      if (expected.size() <= 32) {  // the short path continues from here
        Ids rest = expected;
        table.merge(rest);
        expected = rest;
      }
    }
    table.merge(symbols);
    REQUIRE(symbols == expected);
  }
}

TEST_CASE("long texts without a word boundary are no problem") {
  for (const Tokenizer& tokenizer : all_tokenizers()) {
    for (const char* unit : {"a", "hello", " ", "\xE4\xB8\xAD", "<|im_end|", "\n ", "1"}) {
      std::string text;
      while (text.size() < 1 << 18) text += unit;
      const Ids ids = tokenizer.encode(text, {.parse_special = true});
      CHECK(tokenizer.decode(ids, {.special = true}) == text);
    }
  }
}

TEST_CASE("tokenizer.json and GGUF give back the same encodings") {
  std::mt19937 random(11);
  const nibble::test::Scratch scratch;
  const std::string gguf_path = scratch / "vocabulary.gguf";
  for (const Tokenizer& tokenizer : all_tokenizers()) {
    const TokenizerSpec& spec = tokenizer.spec();
    const Tokenizer from_json(tokenizer_from_json(
        tokenizer_to_json(spec), tokenizer_config_to_json(spec), "tokenizer.json"));
    GgufWriter writer(gguf_path);
    write_tokenizer(spec, writer);
    writer.begin();
    writer.finish();
    const Tokenizer from_gguf = gguf_tokenizer(gguf_path);
    CHECK(from_gguf.spec().tokens == spec.tokens);
    CHECK(from_gguf.spec().types == spec.types);
    CHECK(from_gguf.spec().merges == spec.merges);
    CHECK(from_gguf.spec().scores == spec.scores);
    CHECK(from_json.spec().tokens == spec.tokens);
    for (const Tokenizer* other : {&from_json, &from_gguf}) {
      CHECK(other->spec().bos == spec.bos);
      CHECK(other->spec().eos == spec.eos);
      CHECK(other->spec().add_bos == spec.add_bos);
      CHECK(other->spec().add_space_prefix == spec.add_space_prefix);
      for (int round = 0; round < 100; ++round) {
        const std::string text = random_text(random, 100);
        const EncodeOptions options = {.add_special = true, .parse_special = true};
        REQUIRE(other->encode(text, options) == tokenizer.encode(text, options));
      }
    }
  }
}

TEST_CASE("a SentencePiece tokenizer.json whose merges scores cannot say keeps its merges") {
  // "abc" is made from "ab c" only: "a" + "bc" must not merge, and scores would merge it.
  const std::string json = R"({"normalizer": {"type": "Replace", "pattern": {"String": " "},
    "content": "▁"}, "model": {"type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
    "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "ab": 5, "abc": 6},
    "merges": ["b c", "a b", "ab c"]}})";
  const TokenizerSpec spec = tokenizer_from_json(json, "", "tokenizer.json");
  CHECK(spec.merges.size() == 3);
  CHECK(Tokenizer(spec).encode("abc") == Ids{1, 4});
}

TEST_CASE("damaged tokenizer files say where and what") {
  const auto message = [](const std::string& json) -> std::string {
    try {
      tokenizer_from_json(json, "", "dir/tokenizer.json");
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  CHECK(message("{").starts_with("dir/tokenizer.json: at byte 1: "));
  CHECK(message("{}").find("\"model\" is missing") != std::string::npos);
  CHECK(message(R"({"model": {"type": "Unigram"}})").find("Unigram") != std::string::npos);
  const std::string level = R"("pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false})";
  const auto model = [&](const std::string& body) {
    return message("{" + level + R"(, "model": {"type": "BPE", )" + body + "}}");
  };
  CHECK(model(R"("vocab": {"a": 0}, "merges": [])") == "accepted");
  CHECK(model(R"("vocab": {"a": 4000000000}, "merges": [])").find("4000000000") !=
        std::string::npos);
  CHECK(model(R"("vocab": {"a": -1}, "merges": [])").find("-1") != std::string::npos);
  CHECK(model(R"("vocab": {"a": 0, "b": 0}, "merges": [])").find("same id") != std::string::npos);
  CHECK(model(R"("vocab": {"a": 0}, "merges": ["ab"])").find("merge 0") != std::string::npos);
  CHECK(model(R"("vocab": {"a": 0}, "merges": [["a"]])").find("merge 0") != std::string::npos);
  const std::string strip = R"({"normalizer": {"type": "Lowercase"}, )" + level +
                            R"(, "model": {"vocab": {"a": 0}, "merges": []}})";
  CHECK(message(strip).find("Lowercase") != std::string::npos);
}

TEST_CASE("an id outside the vocabulary is an Error") {
  const Tokenizer tokenizer(tiny_bpe());
  CHECK_THROWS_AS(tokenizer.decode(Ids{tokenizer.size()}), Error);
  CHECK_THROWS_AS(tokenizer.piece(-1), Error);
  TokenizerSpec spec = tiny_bpe();
  spec.eos = 100000;
  CHECK_THROWS_AS(Tokenizer{spec}, Error);
}
