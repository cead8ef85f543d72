#include "models/chat.h"

#include <algorithm>
#include <array>
#include <utility>

#include "engine/error.h"
#include "gguf-convert/quoted.h"

namespace nibble {
namespace {

constexpr std::string_view im_start = "<|im_start|>", im_end = "<|im_end|>";

// The literal system message of a template, which lies between the header and <|im_end|> without
// leaving the string: `<|im_start|>system\nYou are ...<|im_end|>`. The line break after the role is
// either a real one or the two characters of an escape.
std::string literal_system(std::string_view text) {
  constexpr std::string_view header = "<|im_start|>system";
  for (std::size_t at = text.find(header); at != std::string_view::npos;
       at = text.find(header, at + 1)) {
    std::string_view rest = text.substr(at + header.size());
    const bool escape = rest.substr(0, 2) == "\\n";
    if (!escape && rest.substr(0, 1) != "\n") continue;
    rest.remove_prefix(escape ? 2 : 1);
    const std::string_view message = rest.substr(0, rest.find(im_end));
    const bool literal = message.size() < rest.size() && !message.empty() &&
                         message.find_first_of("'\"{}\\") == std::string_view::npos;
    if (literal) return std::string(message);
  }
  return "";
}

}  // namespace

std::string chat_family(const std::string& chat_template) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 12> marks = {{
      {"<think>", "Qwen3 or another reasoning model's"},
      {"<|im_start|>", "ChatML"},
      {"<|start_header_id|>", "Llama-3"},
      {"<start_of_turn>", "Gemma"},
      {"[SYSTEM_PROMPT]", "Mistral"},
      {"[AVAILABLE_TOOLS]", "Mistral"},
      {"<<SYS>>", "Llama-2 [INST]"},
      {"[INST]", "Mistral or Llama-2 [INST]"},
      {"<|assistant|>", "Zephyr or Phi-3"},
      {"GPT4 Correct", "OpenChat"},
      {"ASSISTANT:", "Vicuna"},
      {"### Instruction", "Alpaca"},
  }};
  for (const auto& [mark, family] : marks) {
    if (chat_template.find(mark) != std::string::npos) return std::string(family);
  }
  return "unknown";
}

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer) {
  const std::string& text = tokenizer.spec().chat_template;
  constexpr const char* advice =
      "; supported: ChatML; or write the rows as {\"prompt\", \"completion\"} with the template's "
      "text in the prompt";
  if (const std::string family = chat_family(text); !text.empty() && family != "ChatML") {
    throw Unsupported("messages: the model's chat template looks like " + family + advice);
  }
  const auto start = tokenizer.find(im_start), end = tokenizer.find(im_end);
  if (!start || !end) {
    throw Unsupported("messages: the vocabulary has no <|im_start|> and <|im_end|>" +
                      std::string(advice));
  }
  start_ = *start;
  end_ = *end;
  default_system_ = literal_system(text);
}

// `messages` with the template's own system message in front where it puts one.
std::vector<Message> ChatTemplate::complete(const std::vector<Message>& messages) const {
  if (messages.empty()) throw Error("a conversation without messages");
  for (const Message& message : messages) {
    const auto& role = message.role;
    if (role == "system" || role == "user" || role == "assistant") continue;
    throw Error("role " + nibble::quoted(role) + "; supported: system, user, assistant");
  }
  std::vector<Message> all;
  if (!default_system_.empty() && messages.front().role != "system") {
    all.push_back({"system", default_system_});
  }
  all.insert(all.end(), messages.begin(), messages.end());
  return all;
}

std::string ChatTemplate::render(const std::vector<Message>& messages, ChatEnd end) const {
  std::string text;
  const auto open = [&](const std::string& role) { text += std::string(im_start) + role + "\n"; };
  for (const Message& message : complete(messages)) {
    open(message.role);
    text += message.content + std::string(im_end) + "\n";
  }
  if (end == ChatEnd::wants_answer) open("assistant");
  return text;
}

ChatTokens ChatTemplate::encode(const Tokenizer& tokenizer, const std::vector<Message>& messages,
                                ChatEnd end) const {
  ChatTokens tokens;
  const auto append = [&](const std::vector<std::int32_t>& ids, std::int32_t answer) {
    tokens.ids.insert(tokens.ids.end(), ids.begin(), ids.end());
    tokens.answer.resize(tokens.ids.size(), answer);
  };
  const TokenizerSpec& spec = tokenizer.spec();
  if (spec.add_bos && spec.bos >= 0) append({spec.bos}, 0);
  std::int32_t answers = 0;
  bool first = true;
  for (const Message& message : complete(messages)) {
    if (!first) append(tokenizer.encode("\n"), 0);  // after the previous <|im_end|>
    first = false;
    append({start_}, 0);
    if (message.role == "assistant") {
      append(tokenizer.encode("assistant\n"), 0);
      append(tokenizer.encode(message.content, {.continues = true}), ++answers);
      append({end_}, answers);
    } else {
      append(tokenizer.encode(message.role + "\n" + message.content), 0);
      append({end_}, 0);
    }
  }
  append(tokenizer.encode("\n"), 0);
  if (end == ChatEnd::wants_answer) {
    append({start_}, 0);
    append(tokenizer.encode("assistant\n"), 0);
  }
  return tokens;
}

}  // namespace nibble
