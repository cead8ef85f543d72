// A finetune in small, from a model's headers to a checkpoint, for sweeps of faults. Weights become
// NF4 on three threads, the adapter trains in BF16, part of the optimizer, the embedding table and
// the blocks' inputs are in host memory: every kind of memory that a run takes occurs.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "backends/cpu/cpu.h"
#include "engine/philox.h"
#include "models/generate.h"
#include "models/llama.h"
#include "models/loader.h"
#include "tests/unit/scratch.h"
#include "tools/finetune_setup.h"
#include "tools/run_directory.h"

namespace nibble::test {

inline constexpr const char* kSmallModel = "tests/golden/llama/untied";
inline constexpr std::int64_t kSmallRows = 32;

inline cpu::CpuOptions three_threads() {
  cpu::CpuOptions options;
  options.threads = 3;
  return options;
}

// Two documents of drawn tokens; all but the first token of each is a label.
inline Microbatch small_batch(std::int64_t step, std::int64_t vocab) {
  Microbatch batch;
  for (std::int32_t i = 0; i < kSmallRows; ++i) {
    const std::int32_t begin = i < 20 ? 0 : 20;
    const PhiloxBlock random =
        philox(7, {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(step), 0, 0});
    const auto entries = static_cast<std::uint32_t>(vocab);
    batch.tokens.push_back(static_cast<std::int32_t>(random[0] % entries));
    batch.labels.push_back(i == begin ? -1 : static_cast<std::int32_t>(random[1] % entries));
    batch.positions.push_back(i - begin);
    batch.span_begin.push_back(begin);
    batch.ordinal.push_back(i);
  }
  return batch;
}

// Goes on from the newest checkpoint in `directory`, where there is one: two steps, the next
// checkpoint, an evaluation and two tokens. `base` is kSmallModel, opened.
inline void small_run(Backend& backend, std::unique_ptr<Checkpoint> base,
                      const RunDirectory& directory) {
  LoadOptions load;
  load.compute = DType::BF16;
  load.threads = 3;
  LoadedModel loaded(std::move(base), backend.info(), load);
  const Llama llama(loaded.config(), loaded.types(), LoraSpec{4, 8, 0, llama_linears()}, false);
  TrainerOptions options;
  options.compute = DType::BF16;
  options.storage = StoragePolicy::parse("block,offload:inputs,stream:1").value();
  loaded.place(/*embedding_on_host=*/true, options.storage);
  options.buckets = {kSmallRows};
  const ParameterTable parameters = llama.parameters();
  options.paged_elements = parameters.elements() / 3;
  Trainer trainer(
      backend, parameters,
      [&](Graph& graph, const LossInputs& in) { return llama.build_loss(graph, in); }, options);
  const std::int64_t vocab = loaded.config().vocab;
  Decoder decoder(trainer.runtime(), llama, options.compute, 2 * kSmallRows, vocab,
                  SampleOptions(), options.storage);
  loaded.reserve(trainer.runtime(), llama);
  trainer.allocate();
  loaded.read(backend, {});
  initialize_adapter(trainer, 1);
  if (const auto checkpoint = directory.newest_checkpoint()) load_checkpoint(*checkpoint, trainer);
  for (int i = 0; i < 2; ++i) {
    trainer.micro(small_batch(trainer.step(), vocab));
    trainer.apply(1e-2);
  }
  directory.save_checkpoint(trainer, 2);
  const Microbatch batch = small_batch(0, vocab);
  trainer.evaluate(batch);
  const std::int32_t id = decoder.choose(batch.tokens, 0).id;
  decoder.choose({&id, 1}, 1);
}

inline void small_run(Backend& backend, const RunDirectory& directory) {
  small_run(backend, open_checkpoint(kSmallModel), directory);
}

// Every file below the run's directory, hidden ones included, by its path in it.
inline std::map<std::string, std::string> files_of(const RunDirectory& directory) {
  namespace fs = std::filesystem;
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory.path())) {
    if (!entry.is_regular_file()) continue;
    const std::string path = entry.path().string();
    files[path.substr(directory.path().size() + 1)] = get(path);
  }
  return files;
}

inline constexpr const char* kSecondStep = "checkpoints/step-000002.gguf";
inline constexpr const char* kFourthStep = "checkpoints/step-000004.gguf";

// What an undisturbed run leaves after two steps and, resumed from there, after four.
struct SmallRunFiles {
  std::string second, fourth;
};

template <class MakeBackend>
SmallRunFiles undisturbed(const Scratch& scratch, MakeBackend make_backend) {
  const RunDirectory directory(scratch / "undisturbed", RunDirectory::Open::fresh);
  for (int part = 0; part < 2; ++part) small_run(*make_backend(), directory);
  std::map<std::string, std::string> files = files_of(directory);
  return {files.at(kSecondStep), files.at(kFourthStep)};
}

}  // namespace nibble::test
