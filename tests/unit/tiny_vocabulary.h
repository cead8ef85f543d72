// Small vocabularies made by hand, for tests that must run without any file.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "gguf-convert/tokenizer_spec.h"
#include "models/text_encoders.h"
#include "models/unicode.h"

namespace nibble::test {

// Byte-level BPE: <|endoftext|> <|im_start|> <|im_end|>, the 256 bytes (id 3 + byte), then a token
// per merge.
inline TokenizerSpec tiny_bpe(std::vector<std::string> merges = {"h e", "l l", "he ll", "hell o"}) {
  TokenizerSpec spec;
  spec.model = "gpt2";
  spec.pre = "smollm";
  for (const char* text : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
    spec.tokens.push_back(text);
    spec.types.push_back(TokenType::control);
  }
  for (int byte = 0; byte < 256; ++byte) {
    std::string text;
    append_utf8(text, alphabet_char(static_cast<unsigned char>(byte)));
    spec.tokens.push_back(text);
  }
  for (std::string merge : merges) spec.tokens.push_back(merge.erase(merge.find(' ', 1), 1));
  spec.types.resize(spec.tokens.size(), TokenType::normal);
  spec.merges = std::move(merges);
  spec.eos = 2;
  spec.bos = 1;
  return spec;
}

// SentencePiece-BPE: <unk> <s> </s>, the 256 byte tokens (id 3 + byte), then `pieces`, the earlier
// the better; "_" stands for U+2581.
inline TokenizerSpec tiny_spm(const std::vector<std::string>& pieces = {
                                  "_", "h", "e", "l", "o", "ll", "he", "hell", "_hello", "hello"}) {
  TokenizerSpec spec;
  spec.model = "llama";
  spec.pre = "default";
  spec.tokens = {"<unk>", "<s>", "</s>"};
  spec.types = {TokenType::unknown, TokenType::control, TokenType::control};
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", byte);
    spec.tokens.push_back(text);
    spec.types.push_back(TokenType::byte);
  }
  spec.scores.assign(spec.tokens.size(), 0);
  for (std::string piece : pieces) {
    for (std::size_t at; (at = piece.find('_')) != std::string::npos;) {
      piece.replace(at, 1, "\xE2\x96\x81");
    }
    spec.tokens.push_back(piece);
    spec.types.push_back(TokenType::normal);
    spec.scores.push_back(-static_cast<float>(spec.tokens.size()));
  }
  spec.unk = 0, spec.bos = 1, spec.eos = 2;
  spec.add_bos = true;
  spec.add_space_prefix = true;
  return spec;
}

}  // namespace nibble::test
