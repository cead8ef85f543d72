// Conversations as the token sequences a chat model was trained on. Built in: ChatML,
//
//   <|im_start|>ROLE\nCONTENT<|im_end|>\n   for each message, and
//   <|im_start|>assistant\n                 where the model is to answer.
//
// A template that puts its own system message in front of conversations without one (SmolLM2 and
// Qwen2.5 do) is recognised by the literal text in it. Other templates are Unsupported by name.
//
// A message's role and content are tokenized as one text, as rendering the whole conversation and
// tokenizing it would; only in an assistant's message they are apart, because in inference the
// model continues after the header's tokens. The text of control tokens in a content stays text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/tokenizer.h"

namespace nibble {

struct Message {
  std::string role;  // system, user or assistant
  std::string content;
};

struct ChatTokens {
  std::vector<std::int32_t> ids;
  // Number of the assistant message, from 1, whose answer (its <|im_end|> included) the token is
  // part of; 0 for everything else.
  std::vector<std::int32_t> answer;
};

enum class ChatEnd { complete, wants_answer };

class ChatTemplate {
 public:
  // The built-in template that fits the model's own. Throws Unsupported, naming the family of the
  // template that was found, or the markers that the vocabulary lacks.
  explicit ChatTemplate(const Tokenizer& tokenizer);

  // Throws Error for a role other than the three and for an empty conversation.
  std::string render(const std::vector<Message>& messages, ChatEnd end) const;
  ChatTokens encode(const Tokenizer& tokenizer, const std::vector<Message>& messages,
                    ChatEnd end) const;
  const std::string& default_system() const { return default_system_; }  // empty: none

 private:
  std::vector<Message> complete(const std::vector<Message>& messages) const;
  std::int32_t start_ = -1, end_ = -1;
  std::string default_system_;
};

// "Llama-3", "Gemma", ...: whose chat template this looks like; "ChatML" for what is built in.
std::string chat_family(const std::string& chat_template);

}  // namespace nibble
