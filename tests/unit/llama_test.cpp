// Real trained weights: stories260K in both layouts and four types against the reference greedy
// tokens and logits that an independent implementation left with it.

#include "models/llama.h"

#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "backends/cpu/cpu.h"
#include "engine/os.h"
#include "models/generate.h"
#include "models/loader.h"

using namespace nibble;

namespace {

const std::string kModels = "../shared/models/stories260K";

bool absent() {
  if (std::filesystem::exists(kModels)) return false;
  MESSAGE("skipped: " << kModels << " is not there");
  return true;
}

struct Frozen {
  Frozen(const std::string& source, DType compute, Method method = Method::lora)
      : backend(cpu::make_cpu_backend({.threads = 2, .isa = {}, .memory_limit = 0})),
        runtime(*backend) {
    LoadOptions options;
    options.compute = compute;
    options.method = method;
    loaded = std::make_unique<LoadedModel>(open_checkpoint(source), backend->info(), options);
    llama = std::make_unique<Llama>(loaded->config(), loaded->types(), std::nullopt, false);
    decoder = std::make_unique<Decoder>(runtime, *llama, compute, 512, loaded->config().vocab);
    loaded->reserve(runtime, *llama);
    runtime.allocate();
    loaded->read(*backend, {});
  }
  std::unique_ptr<Backend> backend;
  Runtime runtime;
  std::unique_ptr<LoadedModel> loaded;
  std::unique_ptr<Llama> llama;
  std::unique_ptr<Decoder> decoder;
};

nlohmann::json reference() {
  return nlohmann::json::parse(os::read_file(kModels + "/reference_numpy.json"));
}

std::int32_t argmax(const std::vector<float>& logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace

TEST_CASE("stories260K: greedy tokens, loss and logits of the reference, both layouts") {
  if (absent()) return;
  const nlohmann::json wanted = reference();
  const std::vector<std::int32_t> ids = wanted["ids"], greedy = wanted["argmax"];
  for (const std::string file : {"/stories260K-f32.gguf", "/hf"}) {
    for (const DType compute : {DType::F64, DType::F32}) {
      CAPTURE(file);
      Frozen model(kModels + file, compute);
      double nll = 0;
      for (std::size_t i = 0; i < greedy.size(); ++i) {
        const std::vector<float>& logits = model.decoder->append({&ids[i], 1});
        CHECK(argmax(logits) == greedy[i]);
        if (i + 1 == greedy.size()) {
          const std::vector<double> last = wanted["logits_last"];
          for (std::size_t v = 0; v < last.size(); ++v) {
            CHECK(std::abs(static_cast<double>(logits[v]) - last[v]) < 1e-4);
          }
        }
        double sum = 0;
        for (const float l : logits) sum += std::exp(static_cast<double>(l));
        nll += std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(ids[i + 1])]);
      }
      const double mean = nll / static_cast<double>(ids.size() - 1);
      CHECK(mean == doctest::Approx(wanted["mean_nll"].get<double>()).epsilon(1e-4));
    }
  }
}

TEST_CASE("stories260K: quantized files stay close to the unquantized one") {
  if (absent()) return;
  const std::vector<std::int32_t> ids = reference()["ids"];
  Frozen exact(kModels + "/stories260K-f32.gguf", DType::F32);
  const std::vector<float> wanted = exact.decoder->append(ids);
  struct File {
    std::string name;
    float bound;
  };
  for (const File& file :
       {File{"/stories260K-f16.gguf", 0.02f}, File{"/stories260K-q8_0.gguf", 0.3f},
        File{"/stories260K-q4_0.gguf", 4.0f}}) {
    CAPTURE(file.name);
    Frozen model(kModels + file.name, DType::F32);
    const std::vector<float>& logits = model.decoder->append(ids);
    float worst = 0;
    for (std::size_t v = 0; v < wanted.size(); ++v)
      worst = std::max(worst, std::abs(logits[v] - wanted[v]));
    MESSAGE(file.name << ": logits within " << worst);
    CHECK(worst < file.bound);
  }
}

TEST_CASE("a prompt in chunks gives the bits of a prompt token by token") {
  if (absent()) return;
  std::vector<std::int32_t> ids = reference()["ids"];
  while (ids.size() < 150) ids.insert(ids.end(), ids.begin() + 1, ids.begin() + 30);
  for (const DType compute : {DType::F32, DType::BF16}) {
    Frozen model(kModels + "/stories260K-f32.gguf", compute);
    const std::vector<float> at_once = model.decoder->append(ids);
    model.decoder->reset();
    std::vector<float> one_by_one;
    for (const std::int32_t id : ids) one_by_one = model.decoder->append({&id, 1});
    CHECK(at_once == one_by_one);
  }
}

TEST_CASE("a full context is refused, not overrun") {
  if (absent()) return;
  Frozen model(kModels + "/stories260K-q8_0.gguf", DType::F32);
  const std::vector<std::int32_t> ids(512, 1);
  model.decoder->append(ids);
  CHECK_THROWS_WITH_AS(model.decoder->append({ids.data(), 1}), doctest::Contains("--context"),
                       std::exception);
}
