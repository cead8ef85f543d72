// Rows of every format with their masks, what is said about bad ones, cutting and splitting.
#include "models/dataset.h"

#include <doctest/doctest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "engine/error.h"
#include "engine/os.h"
#include "models/json_rows.h"
#include "models/unicode.h"
#include "tests/unit/scratch.h"
#include "tests/unit/shared_data.h"
#include "tests/unit/tiny_vocabulary.h"

using namespace nibble;
using nibble::test::put;
using nibble::test::Scratch;
using nibble::test::shared;
using nibble::test::tiny_bpe;
using nibble::test::tiny_spm;

namespace {

Dataset load(const std::string& text, const Tokenizer& tokenizer, const DatasetOptions& o = {}) {
  const Scratch scratch;
  const std::string path = scratch / "rows.jsonl";
  put(path, text);
  return load_dataset({path}, tokenizer, o);
}

std::string message(const std::string& text, const DatasetOptions& options = {}) {
  const Scratch scratch;
  const std::string path = scratch / "rows.jsonl";
  put(path, text);
  try {
    load_dataset({path}, Tokenizer(tiny_bpe()), options);
  } catch (const Error& e) {
    const std::string what = e.what();
    return what.starts_with(path) ? what.substr(path.rfind("rows.jsonl")) : what;
  }
  return "accepted";
}

// The text of the trained tokens and of the others.
std::pair<std::string, std::string> parts(const Row& row, const Tokenizer& tokenizer) {
  std::pair<std::string, std::string> text;
  REQUIRE(row.trained.size() == row.ids.size());
  for (std::size_t i = 0; i < row.ids.size(); ++i) {
    (row.trained[i] != 0 ? text.first : text.second) += tokenizer.piece(row.ids[i]);
  }
  return text;
}

const Tokenizer& bpe() {
  static const Tokenizer tokenizer(tiny_bpe());
  return tokenizer;
}

constexpr const char* chat_row =
    R"({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "he"}, {"role": "assistant", "content": "hell"}]})";

std::string one_line(std::string text) {
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return text + "\n";
}

}  // namespace

TEST_CASE("completion rows train the completion and EOS") {
  const Dataset data = load(R"({"prompt": "Q: hello\nA: ", "completion": "hell"})", bpe());
  CHECK(data.format == "completion");
  REQUIRE(data.rows.size() == 1);
  const auto [trained, rest] = parts(data.rows[0], bpe());
  CHECK(trained == "hell<|im_end|>");
  CHECK(rest == "Q: hello\nA: ");
  CHECK(data.eos_trained == 1);
  CHECK(data.trained_tokens == 2);
  CHECK(data.total_tokens == static_cast<std::int64_t>(data.rows[0].ids.size()));
  CHECK(data.longest == data.total_tokens);
  CHECK(render(data.rows[0], bpe()) == "Q: hello\nA: \xC2\xABhell<|im_end|>\xC2\xBB");
}

TEST_CASE("alpaca rows carry the prompt of Stanford Alpaca, with and without input") {
  const std::string rows = R"({"instruction": "Add.", "input": "1 2", "output": "3"}
{"instruction": "Greet.", "input": "", "output": "hello"}
{"instruction": "Greet.", "output": "hello"}
{"instruction": "Greet.", "input": null, "output": "hello"})";
  const Dataset data = load(rows, bpe());
  CHECK(data.format == "alpaca");
  REQUIRE(data.rows.size() == 4);
  const auto with_input = parts(data.rows[0], bpe());
  CHECK(with_input.first == "3<|im_end|>");
  CHECK(with_input.second ==
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### "
        "Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response: ");
  const auto without = parts(data.rows[1], bpe());
  CHECK(without.first == "hello<|im_end|>");
  CHECK(without.second ==
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nGreet.\n\n### Response: ");
  CHECK(data.rows[2].ids == data.rows[1].ids);
  CHECK(data.rows[3].ids == data.rows[1].ids);
  CHECK(data.rows[1].source.ends_with("rows.jsonl:2"));
}

TEST_CASE("messages train the assistant's turns with their ends") {
  const std::string rows = one_line(chat_row);
  const auto trained = [&](TrainOn train_on) {
    const Dataset data = load(rows, bpe(), {.train_on = train_on});
    CHECK(data.format == "messages");
    return parts(data.rows[0], bpe()).first;
  };
  CHECK(trained(TrainOn::automatic) == "hello<|im_end|>hell<|im_end|>");
  CHECK(trained(TrainOn::assistant) == "hello<|im_end|>hell<|im_end|>");
  CHECK(trained(TrainOn::completion) == "hell<|im_end|>");
  CHECK(trained(TrainOn::all) ==
        "user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nhe<|im_end|>"
        "\n<|im_start|>assistant\nhell<|im_end|>\n");
  CHECK(load(rows, bpe()).eos_trained == 1);
}

TEST_CASE("ShareGPT conversations are messages under other names") {
  const Dataset data = load(
      R"({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]})",
      bpe());
  CHECK(render(data.rows[0], bpe()) ==
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\xC2\xABhello<|im_end|>\xC2\xBB\n");
}

TEST_CASE("text rows train everything but the first token") {
  const Dataset data = load(R"({"text": "abc"})", bpe());
  CHECK(render(data.rows[0], bpe()) ==
        "a\xC2\xAB"
        "bc<|im_end|>\xC2\xBB");
  CHECK_THROWS_WITH_AS(load(R"({"text": "abc"})", bpe(), {.train_on = TrainOn::completion}),
                       doctest::Contains("--train-on all"), Unsupported);
}

TEST_CASE("training on all of a completion row leaves out the first token only") {
  const Dataset data =
      load(R"({"prompt": "ab", "completion": "c"})", bpe(), {.train_on = TrainOn::all});
  CHECK(data.rows[0].trained == std::vector<std::uint8_t>{0, 1, 1, 1});
}

TEST_CASE("SentencePiece rows start with BOS; the completion gets no space of its own") {
  const Tokenizer spm(tiny_spm());
  const Dataset data = load(R"({"prompt": "hello", "completion": "hello"})", spm);
  const auto id = [&](const char* text) { return *spm.find(text); };
  CHECK(data.rows[0].ids == std::vector<std::int32_t>{1, id("\xE2\x96\x81hello"), id("hello"), 2});
  CHECK(data.rows[0].trained == std::vector<std::uint8_t>{0, 0, 1, 1});
  // What generation starts from is the row's untrained part.
  CHECK(spm.encode("hello", {.add_special = true}) ==
        std::vector<std::int32_t>(data.rows[0].ids.begin(), data.rows[0].ids.begin() + 2));
}

TEST_CASE("the text of a control token in a row is text") {
  const Dataset data = load(R"({"prompt": "<|im_end|>", "completion": "a<|im_end|>"})", bpe());
  CHECK(std::count(data.rows[0].ids.begin(), data.rows[0].ids.end(), 2) == 1);
}

TEST_CASE("a JSON array holds the same rows, each with its line") {
  const Dataset data =
      load("\xEF\xBB\xBF[\n  {\"text\": \"a],b\"},\n\n  {\n  \"text\": \"c\\\"d\"\n}]\n", bpe());
  REQUIRE(data.rows.size() == 2);
  CHECK(data.rows[0].source.ends_with(":2"));
  CHECK(data.rows[1].source.ends_with(":4"));
  CHECK(parts(data.rows[1], bpe()).first == "\"d<|im_end|>");
}

TEST_CASE("bad rows: file, line, what is missing") {
  const std::string good = R"({"instruction": "a", "output": "b"})";
  CHECK(message(good + "\n" + R"({"instruction": "a"})") ==
        "rows.jsonl:2: \"output\" is missing; every row needs \"instruction\" and \"output\"");
  CHECK(message(good + "\n\n" + R"({"instruction": 7, "output": "b"})") ==
        "rows.jsonl:3: \"instruction\" is number, wanted a string; every row needs \"instruction\" "
        "and \"output\"");
  CHECK(message(good + "\n[1]\n").starts_with("rows.jsonl:2: this is array, wanted an object"));
  CHECK(message(good + "\n{\"instruction\": tru}\n")
            .starts_with("rows.jsonl:2: this is not JSON: line 2, column 20: "));
  CHECK(message("[\n{\"text\": \"a\"},\n{\"text\":\n oops}]")
            .starts_with("rows.jsonl:3: this is not JSON: line 4, column 2: "));
  CHECK(message("").find("the file is empty") != std::string::npos);
  CHECK(message(" \n\n").find("the file is empty") != std::string::npos);
  CHECK(message("[]").find("the JSON array is empty") != std::string::npos);
  CHECK(message("[{\"text\": \"a\"}").find("the file ends inside its JSON array") !=
        std::string::npos);
  CHECK(message("[{\"text\": \"a\"}] x").find("after the end of the array") != std::string::npos);
  CHECK(message(R"({"question": "a", "answer": "b"})")
            .starts_with("rows.jsonl:1: found \"answer\", \"question\"; a row is "));
  CHECK(message(R"({"prompt": "a", "completion": ""})") == "accepted");  // EOS alone is trained
  CHECK(message(R"({"messages": [{"role": "user", "content": "a"}]})")
            .find("no message of the assistant") != std::string::npos);
  CHECK(message(R"({"messages": [{"role": "robot", "content": "a"}]})").find("robot") !=
        std::string::npos);
  CHECK(message(R"({"messages": [{"role": "user"}]})").find("\"content\" is missing") !=
        std::string::npos);
  CHECK(message(R"({"messages": 3})").find("\"messages\" is not a list") != std::string::npos);
  CHECK(message(good, {.format = "text"}).find("\"text\" is missing") != std::string::npos);
  CHECK(message(good, {.format = "csv"}).find("csv") != std::string::npos);
  CHECK(message("{\"text\": \"\xFF\"}")
            .starts_with("rows.jsonl:1: this is not JSON: line 1, column "));
}

TEST_CASE("skip_bad counts bad rows and goes on") {
  const std::string rows = "nonsense\n{\"text\": \"a b\"}\n{\"text\": 1}\n{\"text\": \"c d\"}\n";
  const Dataset data = load(rows, bpe(), {.skip_bad = true});
  CHECK(data.rows.size() == 2);
  CHECK(data.skipped == 2);
  CHECK(data.first_bad.find("rows.jsonl:1: this is not JSON") != std::string::npos);
  CHECK(message("nonsense\n", {.skip_bad = true}).find("no usable row") != std::string::npos);
}

TEST_CASE("rows longer than seq are refused by line, or cut from the end") {
  const std::string rows =
      "{\"prompt\": \"ab\", \"completion\": \"cdef\"}\n"
      "{\"prompt\": \"ab\", \"completion\": \"c\"}\n"
      "{\"prompt\": \"abcdef\", \"completion\": \"c\"}\n";
  const std::string refused = message(rows, {.seq = 4});
  CHECK(refused.find("2 of 3 rows are longer than 4 tokens") != std::string::npos);
  CHECK(refused.find("rows.jsonl:1 (7), ") != std::string::npos);
  CHECK(refused.find("rows.jsonl:3 (8)") != std::string::npos);
  const Dataset cut = load(rows, bpe(), {.seq = 4, .truncate = true});
  CHECK(cut.truncated == 2);
  CHECK(cut.dropped == 1);
  REQUIRE(cut.rows.size() == 2);
  CHECK(parts(cut.rows[0], bpe()).first == "cd");
  CHECK(parts(cut.rows[1], bpe()).first == "c<|im_end|>");
  CHECK(cut.eos_trained == 1);
  CHECK(cut.total_tokens == 8);
  CHECK_THROWS_AS(
      load("{\"prompt\": \"abcd\", \"completion\": \"c\"}", bpe(), {.seq = 4, .truncate = true}),
      Error);
}

TEST_CASE("rendered rows are valid UTF-8 without control characters") {
  const Dataset data =
      load(R"({"prompt": "\u001b[31m\u00e9", "completion": "\u00e9\u0000"})", bpe());
  Row row = data.rows[0];
  CHECK(render(row, bpe()) == "?[31m\xC3\xA9\xC2\xAB\xC3\xA9?<|im_end|>\xC2\xBB");
  row.trained[row.trained.size() - 3] = 0;  // the mask ends inside the character
  CHECK(is_valid_utf8(render(row, bpe())));
  CHECK(render(row, bpe(), Marks::terminal).find("\x1b[1;32m") != std::string::npos);
}

TEST_CASE("splitting takes the asked share, by seed, and keeps the order") {
  std::vector<Row> rows(100);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i].source = std::to_string(i);
  const auto [train, eval] = split_rows(rows, 0.1, 5);
  CHECK(eval.size() == 10);
  CHECK(train.size() == 90);
  std::vector<int> order;
  for (const Row& row : eval) order.push_back(std::stoi(row.source));
  CHECK(std::is_sorted(order.begin(), order.end()));
  const auto sources = [](const std::vector<Row>& list) {
    std::string text;
    for (const Row& row : list) text += row.source + " ";
    return text;
  };
  CHECK(sources(split_rows(rows, 0.1, 5).second) == sources(eval));
  CHECK(sources(split_rows(rows, 0.1, 6).second) != sources(eval));
  CHECK(split_rows(rows, 0, 5).second.empty());
  CHECK(split_rows({rows[0], rows[1]}, 0.02, 5).second.size() == 1);
  CHECK_THROWS_AS(split_rows(rows, 1, 5), Error);
}

TEST_CASE("wikisql rows split at the answer") {
  const std::string path = shared("data/wikisql/train.jsonl");
  SKIP_WITHOUT(path);
  std::istringstream lines(os::read_file(path));
  std::string rows;
  std::vector<std::string> answers;
  for (std::string line; std::getline(lines, line);) {
    const auto text = nlohmann::json::parse(line).at("text").get<std::string>();
    const std::size_t at = text.find("\nA: ");
    REQUIRE(at != std::string::npos);
    answers.push_back(text.substr(at + 4));
    rows +=
        nlohmann::json{{"prompt", text.substr(0, at + 4)}, {"completion", answers.back()}}.dump() +
        "\n";
  }
  const Dataset data = load(rows, bpe());
  REQUIRE(data.rows.size() == answers.size());
  CHECK(data.eos_trained == static_cast<std::int64_t>(answers.size()));
  for (std::size_t i = 0; i < answers.size(); ++i) {
    REQUIRE(parts(data.rows[i], bpe()).first == answers[i] + "<|im_end|>");
  }
  const Dataset whole = load_dataset({path, shared("data/wikisql/valid.jsonl")}, bpe(), {});
  CHECK(whole.format == "text");
  CHECK(whole.rows.size() == answers.size() + 100);
}

TEST_CASE("real files: alpaca and ShareGPT arrays") {
  const std::string alpaca = shared("data/masks/alpaca.json");
  SKIP_WITHOUT(alpaca);
  CHECK(load_dataset({alpaca}, bpe(), {}).rows.size() == 2);
  const Dataset chats = load_dataset({shared("data/sharegpt/identity_500.json")}, bpe(), {});
  CHECK(chats.format == "messages");
  CHECK(chats.rows.size() == 500);
  CHECK(chats.eos_trained == 500);
}
