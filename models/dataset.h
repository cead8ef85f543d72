// Training rows: JSON lines or one JSON array, tokenized, with a mark on every token that is
// trained.
//
//   alpaca      {"instruction", "input"?, "output"}    the prompt text of Stanford Alpaca
//   completion  {"prompt", "completion"}
//   messages    {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}
//   text        {"text"}
//
// A row is what the model sees in inference: BOS where the model wants it, the prompt's tokens,
// then the completion's. The two are tokenized apart, so no token spans the seam: generation starts
// from exactly the prompt's tokens. With SentencePiece the completion gets no space of its own in
// front; a space that belongs there is part of the row's text. EOS ends every row but chats (which
// end their turns with <|im_end|>) and is trained. Prompts and answers that hold the text of a
// control token are tokenized as text.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "models/tokenizer.h"

namespace nibble {

struct Row {
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> trained;  // 1: this token is a label; never the first token
  std::string source;                 // "file.jsonl:17"
};

enum class TrainOn { automatic, all, completion, assistant };
TrainOn train_on_from_name(const std::string& name);  // auto|all|completion|assistant

struct DatasetOptions {
  std::string format = {};                // empty: the first row's
  TrainOn train_on = TrainOn::automatic;  // everything of text rows, else what the model answers
  std::int64_t seq = 0;                   // most tokens of a row; 0: no limit (see limit_length)
  bool truncate = false;                  // cut longer rows instead of refusing them
  bool skip_bad = false;                  // count bad rows and go on
};

struct Dataset {
  std::string format;
  std::vector<Row> rows;
  std::int64_t skipped = 0;    // bad rows, with skip_bad
  std::string first_bad;       // what was wrong with the first of them
  std::int64_t truncated = 0;  // rows that were cut
  std::int64_t dropped = 0;    // rows that had nothing left to train once cut
  std::int64_t total_tokens = 0, trained_tokens = 0;
  std::int64_t eos_trained = 0;  // rows whose last trained token ends a generation
  std::int64_t longest = 0;      // tokens of the longest row
};

// Reads all files, in order; all hold rows of one format. Throws Error
// (`FILE:LINE: "output" is missing; every row needs "instruction" and "output"`).
Dataset load_dataset(const std::vector<std::string>& paths, const Tokenizer& tokenizer,
                     const DatasetOptions& options);

// Makes every row at most `seq` tokens long: with `truncate` by dropping tokens from the end (EOS
// among them), otherwise by refusing with Error that lists the first longer rows.
void limit_length(Dataset& dataset, std::int64_t seq, bool truncate, const Tokenizer& tokenizer);

// The counts of `dataset` that follow from its rows.
void count_tokens(Dataset& dataset, const Tokenizer& tokenizer);

// Throws Error naming the first row with an id that a model of `vocab` tokens has no embedding for.
void check_ids(const std::vector<Row>& rows, std::int64_t vocab);

// 64-bit FNV-1a over the rows' ids and which of them are trained: equal for equal rows in the same
// order.
std::uint64_t fingerprint(const std::vector<Row>& rows);

// One row for people: its text with control tokens shown and trained spans in guillemets, or in
// bold green for a terminal. Valid UTF-8 without control characters.
enum class Marks { guillemets, terminal };
std::string render(const Row& row, const Tokenizer& tokenizer, Marks marks = Marks::guillemets);

// Takes a share of the rows (at least one of two or more, if share > 0) out for evaluation. Which
// ones depends on seed and number of rows only; both parts keep their order. {train, eval}.
std::pair<std::vector<Row>, std::vector<Row>> split_rows(std::vector<Row> rows, double share,
                                                         std::uint64_t seed);

}  // namespace nibble
