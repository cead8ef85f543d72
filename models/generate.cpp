#include "models/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "engine/os.h"
#include "engine/philox.h"

namespace nibble {
namespace {

constexpr std::int64_t kPromptRows = 64;  // rows of a prompt chunk
constexpr std::uint64_t kSampleStream = hash_name("sampling");

float log_sum_exp(std::span<const float> logits) {
  const float most = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float l : logits) sum += std::exp(static_cast<double>(l - most));
  return most + static_cast<float>(std::log(sum));
}

// Keeps the candidates that top-k, min-p and top-p leave, most likely first.
std::vector<std::pair<double, std::int32_t>> candidates(std::span<const float> logits,
                                                        const SampleOptions& options) {
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto more_likely = [&](std::int32_t a, std::int32_t b) {
    const float la = logits[static_cast<std::size_t>(a)], lb = logits[static_cast<std::size_t>(b)];
    return la != lb ? la > lb : a < b;
  };
  std::size_t count = order.size();
  if (options.top_k > 0) count = std::min(count, static_cast<std::size_t>(options.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                    more_likely);
  std::vector<std::pair<double, std::int32_t>> kept;
  const double most = logits[static_cast<std::size_t>(order[0])];
  double total = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double l = logits[static_cast<std::size_t>(order[i])];
    kept.push_back({std::exp((l - most) / options.temperature), order[i]});
    total += kept.back().first;
  }
  double sum = 0;
  std::size_t end = 0;
  while (end < kept.size()) {
    if (end > 0 && (kept[end].first < options.min_p || sum >= options.top_p * total)) break;
    sum += kept[end++].first;
  }
  kept.resize(end);
  return kept;
}

}  // namespace

Decoder::Decoder(Runtime& runtime, const Model& model, DType compute, std::int64_t context,
                 std::int64_t vocab)
    : runtime_(runtime),
      compute_(compute),
      context_(context),
      prompt_(add_program(model, kPromptRows)),
      token_(add_program(model, 1)),
      logits_(static_cast<std::size_t>(vocab)) {}

Decoder::Program Decoder::add_program(const Model& model, std::int64_t rows) const {
  auto graph = std::make_unique<Graph>(compute_);
  const std::string suffix = rows == 1 ? ".token" : ".prompt";
  DecodeInputs in;
  in.tokens = graph->input("decode.tokens" + suffix, {DType::I32, {rows}, {}});
  in.positions = graph->input("decode.positions" + suffix, {DType::I32, {rows}, {}});
  in.position = graph->input("decode.position", {DType::I32, {1}, {}});
  in.last = graph->input("decode.last", {DType::I32, {1}, {}});
  // A padded chunk may write past the last real row: the cache has room for that.
  const Tensor logits = model.build_logits(*graph, in, context_ + kPromptRows);
  graph->keep(logits);
  return {rows, runtime_.add(std::move(graph)), {logits.node, logits.output}};
}

void Decoder::run(const Program& program, std::span<const std::int32_t> tokens) {
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
  runtime_.run(program.number);
  position_ += static_cast<std::int64_t>(tokens.size());
}

const std::vector<float>& Decoder::append(std::span<const std::int32_t> tokens) {
  if (tokens.empty()) throw Error("there is no token to continue from: the prompt is empty");
  if (position_ + static_cast<std::int64_t>(tokens.size()) > context_) {
    throw Error("the context of " + std::to_string(context_) +
                " tokens is full; --context sets it");
  }
  const Program* ran = nullptr;
  while (!tokens.empty()) {
    ran = tokens.size() == 1 ? &token_ : &prompt_;
    const auto count = std::min(tokens.size(), static_cast<std::size_t>(ran->rows));
    run(*ran, tokens.first(count));
    tokens = tokens.subspan(count);
  }
  const TensorType& type = runtime_.graph(ran->number).type(ran->logits);
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  runtime_.read(ran->number, ran->logits, host);
  const std::vector<double> wide = decode(type, host.data());
  std::copy(wide.begin(), wide.end(), logits_.begin());
  return logits_;
}

std::int32_t choose_token(std::span<const float> logits, const SampleOptions& options,
                          std::uint64_t index, float& logprob) {
  const auto bad =
      std::find_if(logits.begin(), logits.end(), [](float logit) { return !std::isfinite(logit); });
  if (bad != logits.end()) {
    throw Error("the logit of token " + std::to_string(bad - logits.begin()) + " is " +
                std::to_string(*bad) +
                ", wanted a finite number; the weights or the adapter are damaged or diverged");
  }
  std::int32_t chosen =
      static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  if (options.temperature > 0) {
    const auto kept = candidates(logits, options);
    double total = 0;
    for (const auto& [weight, id] : kept) total += weight;
    const PhiloxBlock r =
        philox(options.seed ^ kSampleStream, {static_cast<std::uint32_t>(index), 0, 0, 0});
    double left = static_cast<double>(uniform(r[0])) * total;
    chosen = kept.back().second;
    for (const auto& [weight, id] : kept) {
      left -= weight;
      if (left <= 0) {
        chosen = id;
        break;
      }
    }
  }
  logprob = logits[static_cast<std::size_t>(chosen)] - log_sum_exp(logits);
  return chosen;
}

Generation generate(Decoder& decoder, const Tokenizer& tokenizer,
                    std::span<const std::int32_t> prompt, const SampleOptions& options,
                    const std::function<bool(const std::string&)>& show) {
  Generation result;
  decoder.reset();
  StreamDecoder stream(tokenizer, {.special = false, .continues = true});
  const auto emit = [&](const std::string& text) {
    result.text += text;
    return text.empty() || !show || show(text);
  };
  const double begin = os::seconds();
  const std::vector<float>* logits = &decoder.append(prompt);
  result.prompt_seconds = os::seconds() - begin;
  while (static_cast<std::int64_t>(result.ids.size()) < options.max_tokens) {
    float logprob = 0;
    const std::int32_t id = choose_token(*logits, options, result.ids.size(), logprob);
    result.ids.push_back(id);
    result.logprobs.push_back(logprob);
    if (tokenizer.is_end(id)) {
      result.ended = true;
      break;
    }
    if (!emit(stream.push(id))) break;
    if (decoder.position() == decoder.context()) break;
    if (static_cast<std::int64_t>(result.ids.size()) == options.max_tokens) break;
    logits = &decoder.append({&id, 1});
  }
  emit(stream.finish());
  result.seconds = os::seconds() - begin - result.prompt_seconds;
  return result;
}

}  // namespace nibble
