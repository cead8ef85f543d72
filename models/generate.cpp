#include "models/generate.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "engine/error.h"
#include "engine/ops.h"
#include "engine/os.h"
#include "engine/philox.h"

namespace nibble {
namespace {

constexpr std::int64_t kPromptRows = 64;  // rows of a prompt chunk
constexpr std::uint64_t kSampleStream = hash_name("sampling");

}  // namespace

Decoder::Decoder(Runtime& runtime, const Model& model, DType compute, std::int64_t context,
                 std::int64_t vocab, const SampleOptions& sample, const StoragePolicy& storage)
    : runtime_(runtime),
      compute_(compute),
      context_(context),
      sample_(sample),
      prompt_(add_program(model, kPromptRows, storage)),
      token_(add_program(model, 1, storage)),
      logits_(static_cast<std::size_t>(vocab)) {}

Decoder::Program Decoder::add_program(const Model& model, std::int64_t rows,
                                      const StoragePolicy& storage) const {
  auto graph = std::make_unique<Graph>(compute_);
  const std::string suffix = rows == 1 ? ".token" : ".prompt";
  DecodeInputs in;
  in.tokens = graph->input("decode.tokens" + suffix, {DType::I32, {rows}, {}});
  in.positions = graph->input("decode.positions" + suffix, {DType::I32, {rows}, {}});
  in.position = graph->input("decode.position", {DType::I32, {1}, {}});
  in.last = graph->input("decode.last", {DType::I32, {1}, {}});
  in.storage = storage;
  // A padded chunk may write past the last real row: the cache has room for that.
  const Tensor logits = model.build_logits(*graph, in, context_ + kPromptRows);
  const Tensor id = choose_token(logits, graph->input("decode.rng", {DType::I64, {2}, {}}),
                                 {.temperature = sample_.temperature,
                                  .top_p = sample_.top_p,
                                  .min_p = sample_.min_p,
                                  .top_k = sample_.top_k});
  graph->keep(logits);
  graph->keep(id);
  graph->keep(graph->output_of(id, 1));
  return {rows,
          runtime_.add(std::move(graph)),
          {logits.node, logits.output},
          {id.node, 0},
          {id.node, 1}};
}

void Decoder::warm_up() {
  const std::int32_t token = 0;
  for (const Program* program : {&prompt_, &token_}) run(*program, {&token, 1}, {});
  reset();
}

void Decoder::run(const Program& program, std::span<const std::int32_t> tokens,
                  const Executable::Hook& hook) {
  const std::string suffix = program.rows == 1 ? ".token" : ".prompt";
  std::vector<std::int32_t> ids(tokens.begin(), tokens.end());
  ids.resize(static_cast<std::size_t>(program.rows));
  std::vector<std::int32_t> positions(ids.size());
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(position_));
  const auto position = static_cast<std::int32_t>(position_);
  const auto last = static_cast<std::int32_t>(tokens.size()) - 1;
  runtime_.write("decode.tokens" + suffix, std::span<const std::int32_t>(ids));
  runtime_.write("decode.positions" + suffix, std::span<const std::int32_t>(positions));
  runtime_.write("decode.position", std::span<const std::int32_t>(&position, 1));
  runtime_.write("decode.last", std::span<const std::int32_t>(&last, 1));
  if (hook) {
    runtime_.run_checked(program.number, hook);
  } else {
    runtime_.run(program.number);
  }
  position_ += static_cast<std::int64_t>(tokens.size());
}

const Decoder::Program& Decoder::run_all(std::span<const std::int32_t> tokens,
                                         const Executable::Hook& hook) {
  if (tokens.empty()) throw Error("there is no token to continue from: the prompt is empty");
  if (position_ + static_cast<std::int64_t>(tokens.size()) > context_) {
    throw Error("the context of " + std::to_string(context_) +
                " tokens is full; --context sets it");
  }
  const Program* ran = nullptr;
  while (!tokens.empty()) {
    ran = tokens.size() == 1 ? &token_ : &prompt_;
    const auto count = std::min(tokens.size(), static_cast<std::size_t>(ran->rows));
    run(*ran, tokens.first(count), hook);
    tokens = tokens.subspan(count);
  }
  return *ran;
}

const std::vector<float>& Decoder::append(std::span<const std::int32_t> tokens) {
  const Program& ran = run_all(tokens, {});
  const TensorType& type = runtime_.graph(ran.number).type(ran.logits);
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  runtime_.read(ran.number, ran.logits, host);
  const std::vector<double> wide = decode(type, host.data());
  std::copy(wide.begin(), wide.end(), logits_.begin());
  return logits_;
}

Decoder::Choice Decoder::choose(std::span<const std::int32_t> tokens, std::uint64_t index,
                                const Executable::Hook& hook) {
  const std::array<std::int64_t, 2> rng = {static_cast<std::int64_t>(sample_.seed ^ kSampleStream),
                                           static_cast<std::int64_t>(index)};
  runtime_.write("decode.rng", std::span<const std::int64_t>(rng));
  const Program& ran = run_all(tokens, hook);
  Choice choice{};
  runtime_.read(ran.number, ran.id, std::as_writable_bytes(std::span(&choice.id, 1)));
  if (choice.id < 0) {
    throw Error(
        "a logit is not a finite number; the weights or the adapter are damaged or diverged");
  }
  const TensorType& type = runtime_.graph(ran.number).type(ran.logprob);
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  runtime_.read(ran.number, ran.logprob, host);
  choice.logprob = static_cast<float>(decode(type, host.data())[0]);
  return choice;
}

Generation generate(Decoder& decoder, const Tokenizer& tokenizer,
                    std::span<const std::int32_t> prompt, std::int64_t max_tokens,
                    const std::function<bool(const std::string&)>& show) {
  Generation result;
  decoder.reset();
  StreamDecoder stream(tokenizer, {.special = false, .continues = true});
  const auto emit = [&](const std::string& text) {
    result.text += text;
    return text.empty() || !show || show(text);
  };
  const double begin = os::seconds();
  std::span<const std::int32_t> next = prompt;
  std::int32_t id = 0;
  while (static_cast<std::int64_t>(result.ids.size()) < max_tokens) {
    const Decoder::Choice choice = decoder.choose(next, result.ids.size());
    if (result.ids.empty()) result.prompt_seconds = os::seconds() - begin;
    id = choice.id;
    next = {&id, 1};
    result.ids.push_back(id);
    result.logprobs.push_back(choice.logprob);
    if (tokenizer.is_end(id)) {
      result.ended = true;
      break;
    }
    if (!emit(stream.push(id))) break;
    if (decoder.position() == decoder.context()) break;
  }
  emit(stream.finish());
  result.seconds = os::seconds() - begin - result.prompt_seconds;
  return result;
}

}  // namespace nibble
