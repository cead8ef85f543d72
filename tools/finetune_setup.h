// Everything about a finetuning run that is decided before a weight is read: the same code serves
// `nibble finetune`, `nibble fit` and `nibble bench train`.
#pragma once

#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/trainer.h"
#include "models/dataset.h"
#include "models/generate.h"
#include "models/loader.h"
#include "models/packing.h"
#include "tools/recipe.h"

namespace nibble {

// What --data held, to tell whether a resumed run reads the same rows.
struct DataRead {
  std::int64_t rows = 0, tokens = 0;
  std::uint64_t fingerprint = 0;
};

// What a step consists of, on average, for predicting its time.
struct StepWork {
  double tokens_per_step = 0;  // of the data
  double rows_per_step = 0;    // those that are computed, padding included
  double evaluated_rows = 0;   // of one evaluation
  double average_span = 0;     // rows of a document
};

struct FinetuneSetup {
  Recipe recipe;  // with every default filled in
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LoadedModel> loaded;
  std::unique_ptr<Tokenizer> tokenizer;  // null: only lengths matter (random weights)
  Dataset dataset;
  DataRead data_read;
  std::vector<Row> train, held_out, samples;
  std::unique_ptr<Schedule> schedule;
  std::vector<std::int64_t> buckets;
  std::unique_ptr<Llama> llama;
  std::unique_ptr<Trainer> trainer;
  std::unique_ptr<Decoder> decoder;
  StepWork work;
  FitReport fit;
  std::int64_t total_parameters = 0;
  bool repeat_first_block = false;  // LoadOptions
  bool without_adapter = false;     // only decodes, with the weights as they are
  bool evaluates = true;            // plans programs that only score
  bool plans_only = false;          // nothing will be allocated: --card need not be there
  // What the device was seen to take beside the plan; none: it is predicted.
  std::optional<std::int64_t> measured_context_bytes;
  bool replanned = false;  // with what was left when the first plan could not be reserved

  bool trains_weights() const { return recipe.method == "full"; }
  // Gives all memory back: what holds it before what it came from. Ends the setup.
  void release();
};

// Opens headers and data, resolves every default and plans all programs. Prints what was found to
// `log`. Nothing of the size of the model is allocated or read.
FinetuneSetup set_up(const Recipe& recipe, std::ostream& log, bool plans_only = false,
                     std::optional<std::int64_t> measured_context_bytes = {});

// The parts of set_up() that do not need data: backend and model headers, then the programs for
// setup.buckets and, with sample_context > 0, for decoding.
void open_setup_model(FinetuneSetup& setup);
void plan_model(FinetuneSetup& setup, std::int64_t sample_context);

// Bytes that --memory or --card allow on the device; none: neither was given.
std::optional<std::int64_t> device_cap(const Recipe& recipe);
// Bytes of the host that a run may page-lock.
std::int64_t host_budget(const Recipe& recipe);

// Takes all memory of the run from the backend. Throws OutOfMemory.
void reserve(FinetuneSetup& setup);
// Fills what reserve() took.
void read_weights(FinetuneSetup& setup, const LoadedModel::Progress& progress);

// HF or GGUF names or a regular expression to the linears of a block; throws Error naming what
// there is.
std::vector<std::string> resolve_targets(const std::vector<std::string>& targets);

// Fits or not, line by line.
void print_fit(const FitReport& fit, std::ostream& out);

// Fills the adapter: A uniform in +-1/sqrt(in) from the seed, B zero.
void initialize_adapter(Trainer& trainer, std::uint64_t seed);

}  // namespace nibble
