// The outputs of make_llama_goldens.py, and a trainer set up as they were made, on any backend.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "engine/os.h"
#include "gguf-convert/safetensors.h"
#include "models/generate.h"
#include "models/llama.h"
#include "models/loader.h"

namespace nibble::golden {

inline constexpr std::int64_t kRows = 24;
inline constexpr int kSteps = 10;  // of training

struct Golden {
  explicit Golden(const std::string& variant)
      : directory("tests/golden/llama/" + variant),
        tensors(directory + "/golden.safetensors"),
        numbers(nlohmann::json::parse(os::read_file(directory + "/golden.json"))) {}

  bool has(const std::string& name) const { return tensors.find(name) != nullptr; }
  std::vector<double> values(const std::string& name) const {
    const auto* tensor = tensors.find(name);
    REQUIRE_MESSAGE(tensor != nullptr, name);
    // The mapping has no alignment: decode from a copy.
    std::vector<std::byte> copy(tensor->bytes.begin(), tensor->bytes.end());
    return decode(tensor->type, copy.data());
  }
  std::vector<float> floats(const std::string& name) const {
    const std::vector<double> wide = values(name);
    return {wide.begin(), wide.end()};
  }
  std::vector<std::int32_t> step_rows(const std::string& name, int step) const {
    const std::vector<double> all = values("steps." + name);
    return {all.begin() + step * kRows, all.begin() + (step + 1) * kRows};
  }
  Microbatch batch(int step) const {
    Microbatch b;
    b.tokens = step_rows("tokens", step);
    b.positions = step_rows("positions", step);
    b.span_begin = step_rows("span_begin", step);
    b.labels = step_rows("targets", step);
    for (std::int32_t& label : b.labels) label = label < 0 ? -1 : label;
    b.ordinal.resize(kRows);
    return b;
  }

  // The batches from `step` on in one, so many rows of them.
  Microbatch long_batch(int step, std::int64_t rows) const {
    Microbatch all;
    for (std::int32_t begin = 0; begin < rows; begin += kRows) {
      const Microbatch b = batch((step + begin / static_cast<std::int32_t>(kRows)) % kSteps);
      for (std::size_t i = 0; i < kRows && all.tokens.size() < static_cast<std::size_t>(rows);
           ++i) {
        all.ordinal.push_back(static_cast<std::int32_t>(all.tokens.size()));
        all.tokens.push_back(b.tokens[i]);
        all.positions.push_back(b.positions[i]);
        all.span_begin.push_back(begin + b.span_begin[i]);
        all.labels.push_back(b.labels[i]);
      }
    }
    return all;
  }

  std::string directory;
  SafetensorsFile tensors;
  nlohmann::json numbers;
};

// Backend, weights and trainer of one variant.
struct Setup {
  Setup(const Golden& golden, Method method, DType compute, const StoragePolicy& storage,
        std::unique_ptr<Backend> on, std::int64_t paged_elements = 0,
        Optimizer optimizer = Optimizer::adamw, std::int64_t rows = kRows, double dropout = 0)
      : backend(std::move(on)) {
    LoadOptions load;
    load.method = method;
    load.compute = compute;
    loaded =
        std::make_unique<LoadedModel>(open_checkpoint(golden.directory), backend->info(), load);
    std::optional<LoraSpec> lora;
    if (method != Method::full) {
      lora = LoraSpec{golden.numbers["rank"], golden.numbers["alpha"], dropout, llama_linears()};
    }
    llama =
        std::make_unique<Llama>(loaded->config(), loaded->types(), lora, method == Method::full);
    TrainerOptions options;
    options.compute = compute;
    options.storage = storage;
    options.buckets = {rows};
    options.paged_elements = paged_elements;
    options.optimizer = optimizer;
    options.clip = golden.numbers["clip"];
    ParameterTable table = llama->parameters();
    table.set_weight_decay(golden.numbers["weight_decay"]);
    const Llama* model = llama.get();
    trainer = std::make_unique<Trainer>(
        *backend, table,
        [model](Graph& g, const LossInputs& in) { return model->build_loss(g, in); }, options);
    loaded->place(/*embedding_on_host=*/false, storage);
    loaded->promise_pages(trainer->runtime());
    decoder = std::make_unique<Decoder>(trainer->runtime(), *llama, compute, kRows,
                                        loaded->config().vocab, SampleOptions(), storage);
    fit = trainer->fit();
    loaded->reserve(trainer->runtime(), *llama);
    trainer->allocate();
    trainer->warm_up();  // must leave no trace
    loaded->read(*backend, {});
    if (method == Method::full) loaded->load_parameters(*trainer, {});
    if (method == Method::full) return;
    for (const ParameterSegment& s : trainer->parameters().segments()) {
      trainer->set_parameter(s.name, golden.floats("lora.init." + s.name));
    }
  }
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LoadedModel> loaded;
  std::unique_ptr<Llama> llama;
  std::unique_ptr<Trainer> trainer;
  std::unique_ptr<Decoder> decoder;
  FitReport fit;  // before anything was allocated
};

// Largest difference over the largest wanted value.
inline double error(const std::vector<float>& got, const std::vector<double>& wanted) {
  REQUIRE(got.size() == wanted.size());
  double worst = 0, scale = 1e-30;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(got[i]) - wanted[i]));
    scale = std::max(scale, std::abs(wanted[i]));
  }
  return worst / scale;
}

// F64 runs return their results as F32, so 1e-7 is as close as they can be. F32 rounds once an op;
// the plain F32 run stored with the goldens is off by 2e-6 in the logits. BF16 keeps 8 bits.
struct Tolerance {
  double value, after_ten_steps;
};
inline Tolerance tolerance(DType compute) {
  if (compute == DType::F64) return {2e-7, 5e-7};
  if (compute == DType::F32) return {1e-5, 3e-4};
  return {6e-2, 2e-1};
}

inline void check_logits(const Golden& golden, Setup& s, const std::string& prefix, DType compute) {
  const std::vector<double> wanted = golden.values(prefix + ".logits");
  const Microbatch batch = golden.batch(0);
  const std::size_t vocab = wanted.size() / kRows;
  double worst = 0;
  for (std::size_t row = 0; row < kRows; ++row) {
    if (batch.span_begin[row] == static_cast<std::int32_t>(row)) s.decoder->reset();
    const std::vector<float>& logits = s.decoder->append({&batch.tokens[row], 1});
    const std::vector<double> expected(
        wanted.begin() + static_cast<std::ptrdiff_t>(row * vocab),
        wanted.begin() + static_cast<std::ptrdiff_t>((row + 1) * vocab));
    worst = std::max(worst, error(logits, expected));
  }
  MESSAGE(prefix << " logits, " << name(compute) << ": " << worst);
  CHECK(worst < tolerance(compute).value);
}

// Returns the number of gradients that the goldens hold.
inline int check_training(const Golden& golden, Setup& s, const std::string& prefix,
                          DType compute) {
  const nlohmann::json& numbers = golden.numbers[prefix];
  double worst_gradient = 0, worst_final = 0;
  int gradients = 0;
  for (int step = 0; step < 10; ++step) {
    s.trainer->micro(golden.batch(step));
    if (step == 0) {
      for (const ParameterSegment& p : s.trainer->parameters().segments()) {
        if (!golden.has(prefix + ".grad." + p.name)) continue;
        const double e =
            error(s.trainer->gradient(p.name), golden.values(prefix + ".grad." + p.name));
        CHECK_MESSAGE(e < 5 * tolerance(compute).value, p.name << " " << e);
        worst_gradient = std::max(worst_gradient, e);
        ++gradients;
      }
    }
    const StepResult result = s.trainer->apply(golden.numbers["lr"]);
    const double loss = numbers["step_losses"][static_cast<std::size_t>(step)];
    const double norm = numbers["grad_norms"][static_cast<std::size_t>(step)];
    CHECK(result.tokens == golden.numbers["label_counts"][static_cast<std::size_t>(step)]);
    CHECK(std::abs(result.loss - loss) < tolerance(compute).after_ten_steps * loss);
    CHECK(std::abs(result.grad_norm - norm) < 2 * tolerance(compute).after_ten_steps * norm);
  }
  for (const ParameterSegment& p : s.trainer->parameters().segments()) {
    if (!golden.has(prefix + ".final." + p.name)) continue;
    worst_final = std::max(worst_final, error(s.trainer->parameter(p.name),
                                              golden.values(prefix + ".final." + p.name)));
  }
  MESSAGE(prefix << " " << name(compute) << ": " << gradients << " gradients within "
                 << worst_gradient << ", parameters after ten steps within " << worst_final);
  if (compute != DType::BF16) CHECK(worst_final < tolerance(compute).after_ten_steps);
  return gradients;
}

}  // namespace nibble::golden
