#include "tools/sampling.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/adapter.h"
#include "models/chat.h"
#include "models/loader.h"
#include "tools/finetune_setup.h"
#include "tools/text.h"
#include "tools/tiny_model.h"

namespace nibble {
namespace {

constexpr std::int64_t kDefaultContext = 2048;

void add_common_flags(CLI::App& command, SamplingRequest& r) {
  command.add_option("--model,-m", r.model, "Hugging Face directory, .gguf file, or tiny")
      ->required();
  command
      .add_option("--adapter", r.adapters,
                  "PATH or PATH:SCALE, PEFT directory or GGUF; may be repeated")
      ->take_all();
  command
      .add_option("--temperature,--temp", r.sample.temperature, "0: always the most likely token")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--top-p", r.sample.top_p)->check(CLI::Range(0.0, 1.0))->capture_default_str();
  command.add_option("--min-p", r.sample.min_p)->check(CLI::Range(0.0, 1.0))->capture_default_str();
  command.add_option("--top-k", r.sample.top_k, "0: no limit")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--seed", r.sample.seed)->capture_default_str();
  command.add_option("--max-tokens,-n", r.sample.max_tokens, "tokens to generate")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command
      .add_option("--context,-c", r.context,
                  "tokens of prompt and answer; default: the model's, at most 2048")
      ->check(CLI::Range(2, 1 << 24));
  command.add_option("--compute", r.compute, "f32 | bf16; default f32 on a CPU, bf16 on a GPU")
      ->check(CLI::IsMember({"f32", "bf16"}));
  command
      .add_option("--method", r.method,
                  "lora: weights as they are | qlora: quantize to NF4 while loading")
      ->check(CLI::IsMember({"lora", "qlora"}))
      ->capture_default_str();
  add_backend_flags(command, r.where);
}

// Several adapters with scales as one: their ranks are concatenated, each B times its scale.
AdapterFile combine(const std::vector<std::string>& paths, const ModelConfig& config) {
  AdapterFile sum;
  for (const std::string& text : paths) {
    std::string path = text;
    double factor = 1;
    if (const std::size_t colon = text.rfind(':');
        colon != std::string::npos && colon + 1 < text.size()) {
      std::size_t end = 0;
      try {
        factor = std::stod(text.substr(colon + 1), &end);
      } catch (const std::exception&) {
      }
      if (end == text.size() - colon - 1)
        path = text.substr(0, colon);
      else
        factor = 1;
    }
    AdapterFile adapter = read_adapter(path, config);
    for (AdapterTensor& t : adapter.tensors) {
      const auto scale = static_cast<float>(factor * adapter.scale(t));
      for (float& b : t.b) b *= scale;
      t.alpha = static_cast<double>(t.rank);
      const auto same =
          std::find_if(sum.tensors.begin(), sum.tensors.end(),
                       [&](const AdapterTensor& other) { return other.name == t.name; });
      if (same == sum.tensors.end()) {
        sum.tensors.push_back(std::move(t));
        continue;
      }
      std::vector<float> b;
      for (std::int64_t row = 0; row < t.out; ++row) {
        b.insert(b.end(), same->b.begin() + row * same->rank,
                 same->b.begin() + (row + 1) * same->rank);
        b.insert(b.end(), t.b.begin() + row * t.rank, t.b.begin() + (row + 1) * t.rank);
      }
      same->a.insert(same->a.end(), t.a.begin(), t.a.end());
      same->b = std::move(b);
      same->rank += t.rank;
    }
  }
  return sum;
}

// Every adapter matrix padded with zeros to one rank, which the graph needs: zeros add nothing.
std::int64_t pad_ranks(AdapterFile& adapter) {
  std::int64_t rank = 1;
  for (const AdapterTensor& t : adapter.tensors) rank = std::max(rank, t.rank);
  for (AdapterTensor& t : adapter.tensors) {
    std::vector<float> b(static_cast<std::size_t>(t.out * rank));
    for (std::int64_t row = 0; row < t.out; ++row) {
      std::copy_n(t.b.begin() + row * t.rank, t.rank, b.begin() + row * rank);
    }
    t.a.resize(static_cast<std::size_t>(rank * t.in));
    t.b = std::move(b);
    t.rank = rank;
  }
  return rank;
}

// A model ready to decode: weights, adapters, cache and programs.
class Session {
 public:
  Session(const SamplingRequest& r, std::ostream& log) {
    backend_ = open_backend(r.where, 0);
    LoadOptions options;
    options.method = r.method == "qlora" ? Method::qlora : Method::lora;
    options.compute = compute_dtype(resolve_compute(r.compute, backend_->info()));
    options.threads = r.where.threads > 0 ? r.where.threads : os::physical_cores();
    loaded_ = std::make_unique<LoadedModel>(open_model_source(r.model), backend_->info(), options);
    tokenizer_ = std::make_unique<Tokenizer>(loaded_->checkpoint().tokenizer());
    make_model(r);
    TrainerOptions trainer;
    trainer.compute = options.compute;
    trainer.buckets = {};
    trainer.training = false;
    trainer_ = std::make_unique<Trainer>(*backend_, model_->parameters(), BuildLoss{}, trainer);
    const std::int64_t most = loaded_->config().context;
    const std::int64_t context = r.context > 0 ? r.context : std::min(most, kDefaultContext);
    if (context > most) {
      log << format(
          "warning: --context %lld is more than the %lld tokens the model was trained for\n",
          static_cast<long long>(context), static_cast<long long>(most));
    }
    decoder_ = std::make_unique<Decoder>(trainer_->runtime(), *model_, options.compute, context,
                                         loaded_->config().vocab, r.sample);
    loaded_->reserve(trainer_->runtime(), *model_);
    trainer_->allocate();
    loaded_->read(*backend_, {});
    for (const AdapterTensor& t : adapter_.tensors) set_adapter_tensor(t);
  }

  Decoder& decoder() { return *decoder_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }

 private:
  void make_model(const SamplingRequest& r) {
    std::optional<LoraSpec> lora;
    if (!r.adapters.empty()) {
      adapter_ = combine(r.adapters, loaded_->config());
      const std::int64_t rank = pad_ranks(adapter_);
      lora = LoraSpec{rank, static_cast<double>(rank), 0, {}};
      for (const std::string& linear : llama_linears()) {
        const std::string suffix = "." + linear + ".weight";
        if (std::any_of(adapter_.tensors.begin(), adapter_.tensors.end(),
                        [&](const AdapterTensor& t) { return t.name.ends_with(suffix); })) {
          lora->targets.push_back(linear);
        }
      }
    }
    model_ = std::make_unique<Llama>(loaded_->config(), loaded_->types(), lora, false);
  }

  void set_adapter_tensor(const AdapterTensor& t) {
    const std::string base = t.name.substr(0, t.name.rfind('.'));
    trainer_->set_parameter(base + ".lora_a", t.a);
    trainer_->set_parameter(base + ".lora_b", t.b);
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LoadedModel> loaded_;
  std::unique_ptr<Tokenizer> tokenizer_;
  AdapterFile adapter_;
  std::unique_ptr<Llama> model_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<Decoder> decoder_;
};

struct Prompt {
  std::string text;
  std::vector<std::int32_t> ids;
};

std::vector<Prompt> read_prompts(const SamplingRequest& r, const Tokenizer& tokenizer) {
  const EncodeOptions options{.add_special = true, .parse_special = r.special, .continues = false};
  std::vector<Prompt> prompts;
  if (r.prompts.empty()) return {{r.prompt, tokenizer.encode(r.prompt, options)}};
  std::ifstream file(r.prompts);
  if (!file) throw Error(r.prompts + ": cannot be opened");
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto row = nlohmann::json::parse(line, nullptr, false);
    const std::string where = r.prompts + ":" + std::to_string(number) + ": ";
    if (row.is_discarded()) throw Error(where + "not JSON; every line is {\"prompt\": TEXT}");
    if (!row.is_object() || !row.contains("prompt") || !row["prompt"].is_string()) {
      throw Error(where + "\"prompt\" is missing; every line is {\"prompt\": TEXT}");
    }
    const std::string text = row["prompt"];
    prompts.push_back({text, tokenizer.encode(text, options)});
  }
  if (prompts.empty()) throw Error(r.prompts + ": holds no prompt");
  return prompts;
}

// The prompt for the conversation so far. Forgets the oldest turns where the context has no room
// for them and an answer, and says so; nullopt when the last message alone is too long.
std::optional<ChatTokens> fitting_prompt(const ChatTemplate& chat, Session& session,
                                         std::vector<Message>& messages, std::int64_t answer,
                                         std::ostream& log) {
  const std::int64_t context = session.decoder().context();
  const std::int64_t room = std::min(answer, context / 4);
  const std::size_t system = messages.front().role == "system" ? 1 : 0;
  std::int64_t forgotten = 0;
  std::optional<ChatTokens> prompt;
  while (true) {
    prompt = chat.encode(session.tokenizer(), messages, ChatEnd::wants_answer);
    const bool last = messages.size() - system <= 1;
    if (std::ssize(prompt->ids) + (last ? 1 : room) <= context) break;
    if (last) {
      prompt.reset();
      break;
    }
    const auto oldest = messages.begin() + static_cast<std::ptrdiff_t>(system);
    messages.erase(oldest, oldest + 2);  // a question and its answer
    ++forgotten;
  }
  if (forgotten > 0) {
    log << format("the context of %lld tokens is full: forgot the oldest turns (%lld)\n",
                  static_cast<long long>(context), static_cast<long long>(forgotten));
  }
  if (!prompt) {
    log << format(
        "this message does not fit the context of %lld tokens; say it shorter, or start "
        "with a larger --context\n",
        static_cast<long long>(context));
  }
  return prompt;
}

}  // namespace

void add_generate_flags(CLI::App& command, SamplingRequest& r) {
  add_common_flags(command, r);
  auto* prompt = command.add_option("--prompt,-p", r.prompt, "text to continue");
  auto* prompts = command.add_option("--prompts", r.prompts, "file of {\"prompt\": TEXT} lines");
  prompt->excludes(prompts);
  command.add_flag("--special", r.special,
                   "text such as <|im_end|> in a prompt is the control token");
  command.add_flag("--json", r.json, "one JSON line a prompt: text, ids, logprobs");
}

void add_chat_flags(CLI::App& command, SamplingRequest& r) {
  add_common_flags(command, r);
  command.add_option("--system", r.system, "system message");
}

int generate_command(const SamplingRequest& r, std::ostream& out, std::ostream& log) {
  if (r.prompt.empty() && r.prompts.empty())
    throw Error("generate needs --prompt TEXT or --prompts FILE");
  Session session(r, log);
  for (const Prompt& prompt : read_prompts(r, session.tokenizer())) {
    const Generation g = generate(session.decoder(), session.tokenizer(), prompt.ids,
                                  r.sample.max_tokens, [&](const std::string& text) {
                                    if (!r.json) out << text << std::flush;
                                    return !os::interrupted();
                                  });
    if (r.json) {
      out << nlohmann::ordered_json{{"text", g.text}, {"ids", g.ids}, {"logprobs", g.logprobs}}
                 .dump()
          << "\n"
          << std::flush;
    } else {
      out << "\n" << std::flush;
    }
    log << format(
        "%lld prompt tokens in %.2f s (%.0f tokens/s), %lld generated in %.2f s (%.1f tokens/s)\n",
        static_cast<long long>(prompt.ids.size()), g.prompt_seconds,
        static_cast<double>(prompt.ids.size()) / std::max(g.prompt_seconds, 1e-9),
        static_cast<long long>(g.ids.size()), g.seconds,
        static_cast<double>(g.ids.size()) / std::max(g.seconds, 1e-9));
    if (os::interrupted()) return 130;
  }
  return 0;
}

// Turns are kept and the whole conversation is scored again from the cache's start each time: the
// template may rewrite what comes before.
int chat_command(const SamplingRequest& r, std::istream& in, std::ostream& out, std::ostream& log) {
  Session session(r, log);
  const ChatTemplate chat(session.tokenizer());
  std::vector<Message> messages;
  if (!r.system.empty()) messages.push_back({"system", r.system});
  const bool terminal = os::is_terminal(0);
  std::string line;
  while (true) {
    if (terminal) log << "> " << std::flush;
    if (!std::getline(in, line) || os::interrupted()) break;
    if (line.empty()) continue;
    if (line == "/exit" || line == "/quit") break;
    messages.push_back({"user", line});
    const auto prompt = fitting_prompt(chat, session, messages, r.sample.max_tokens, log);
    if (!prompt) {
      messages.pop_back();
      continue;
    }
    const Generation g = generate(session.decoder(), session.tokenizer(), prompt->ids,
                                  r.sample.max_tokens, [&](const std::string& text) {
                                    out << text << std::flush;
                                    return !os::interrupted();
                                  });
    out << "\n" << std::flush;
    if (!g.ended && session.decoder().position() == session.decoder().context()) {
      log << "the answer stops here: the context is full\n";
    }
    messages.push_back({"assistant", g.text});
  }
  return os::interrupted() ? 130 : 0;
}

}  // namespace nibble
