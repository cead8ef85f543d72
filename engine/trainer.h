// The training step, for any model that can append its loss to a graph.
//
// A step is k times micro() and one apply(). micro() runs the forward and backward program of its
// bucket and adds unscaled sums (loss, gradients) to what earlier micros left; apply() divides by
// the number of label tokens, clips by the global norm, takes an AdamW step over the flat arrays
// and clears the sums. So k micros and one apply equal one big batch.
//
// Everything is planned in the constructor and allocated once in allocate(); fit() says in between
// what that will take, to the byte. Evaluation runs in the same memory.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/estimate.h"
#include "engine/fit.h"
#include "engine/parameters.h"
#include "engine/runtime.h"
#include "engine/state.h"
#include "engine/storage.h"

namespace nibble {

// The inputs of one program, T rows (tokens) of several documents one after the other. Padding rows
// are documents of one token without label.
struct LossInputs {
  Tensor tokens, positions, labels, span_begin;  // I32 [T]; label -1: none
  Tensor loss_rows;                              // I32 [R], padded with -1
  Tensor ordinal;                                // I32 [T]: number within the optimizer step
  Tensor rng;                                    // I64 [2]: seed, optimizer step
  StoragePolicy storage;
  bool training = true;  // false: no dropout, no gradient follows
};

// Appends a model's forward pass and returns output 0 of its linear_cross_entropy.
using BuildLoss = std::function<Tensor(Graph&, const LossInputs&)>;

struct Microbatch {
  std::vector<std::int32_t> tokens, positions, labels, span_begin, ordinal;  // one per row
  std::int64_t label_count() const;
};

// adamw8bit keeps the moments in 8 bits, about a quarter of their bytes.
enum class Optimizer { adamw, adamw8bit };

struct TrainerOptions {
  DType compute = DType::F32;
  Optimizer optimizer = Optimizer::adamw;
  StoragePolicy storage;
  std::vector<std::int64_t> buckets = {512};                  // rows of a microbatch, ascending
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, clip = 1.0;  // clip 0: none
  std::uint64_t seed = 0;
  bool training = true;   // false: evaluation programs only, no gradients and moments
  bool evaluates = true;  // false: no evaluation programs
  // Elements of the optimizer's arrays that live in host memory between their turns: the last ones,
  // rounded up to whole blocks. apply() brings them through the arena, which is idle then. The
  // arrays are the moments and, where parameters are used as rounded copies, the masters.
  std::int64_t paged_elements = 0;
  // Elements that apply() works on at a time, a multiple of kParameterBlock. 0: kParameterPage of
  // those in device memory, and of those on the host so many that two pages fit into what the
  // arena has anyway. Changes no bit.
  std::int64_t page_elements = 0;
  // Plans the largest bucket alone, all of whose rows have labels, without laying out the arena:
  // enough for choosing among policies. Such a trainer cannot be allocated.
  bool draft = false;
};

struct StepResult {
  double loss = 0;       // mean over the step's label tokens
  double grad_norm = 0;  // of the mean gradient, before clipping
  std::int64_t tokens = 0;
  std::int64_t copied_bytes = 0;  // between device and host, both ways, by the whole step
  // Of apply() alone, where copies decide how long it takes once states are paged.
  std::int64_t apply_copied_bytes = 0;
  double apply_seconds = 0;
};

class Trainer {
 public:
  Trainer(Backend& backend, ParameterTable parameters, BuildLoss build_loss,
          const TrainerOptions& options);

  // For programs that share this trainer's memory (sampling); only before allocate().
  Runtime& runtime() { return runtime_; }
  void bind_weight(std::string_view name, std::byte* address) { runtime_.bind(name, address); }

  // Lines of everything but the weights, which belong to the caller.
  FitReport fit() const;
  void allocate();
  // Readies every program and runs one of each kind, so that what the device needs beside the plan
  // is taken from here on. All parameters and states are zero afterwards.
  void warm_up();

  const ParameterTable& parameters() const { return parameters_; }
  void set_parameter(std::string_view name, std::span<const float> values);
  std::vector<float> parameter(std::string_view name) const;  // the master
  std::vector<float> gradient(std::string_view name) const;   // sums since the last apply()

  // With a hook every node is visited after it ran (see Executable).
  void micro(const Microbatch& batch, const Executable::Hook& hook = {});
  StepResult apply(double lr, const Executable::Hook& hook = {});
  // The loss of every labelled row, in row order. Touches no training state.
  std::vector<float> evaluate(const Microbatch& batch);

  std::int64_t step() const { return step_; }  // applied so far

  // Parameters, moments and the step; only between steps. Moments in 8 bits are written as they are
  // stored, I8 [blocks, kMomentBlockBytes], since GGUF has no U8.
  void save(StateSink& sink) const;
  void load(StateSource& source);

  // Steps of all programs, those of the decoder that shares the runtime included; of a draft, how
  // many the real plan has.
  std::int64_t recorded_steps() const;

  // The training program of the largest bucket, all of whose rows have labels, and its loss: the
  // nodes before that are the forward pass.
  const Plan& training_plan() const { return runtime_.plan(micro_.back().number); }
  std::int32_t training_loss() const { return micro_.back().row_losses.node; }
  // The optimizer's program, which apply() runs.
  const Plan& apply_plan() const { return runtime_.plan(apply_); }

  // Seconds that microbatches of `rows` rows in all and one apply() should take, and those of
  // scoring so many rows; in the largest bucket, as if all rows had labels.
  double estimate_step(const DeviceRates& rates, double average_span, double rows) const;
  double estimate_evaluation(const DeviceRates& rates, double average_span, double rows) const;

  // Bytes that paging one block of kParameterBlock elements moves out of device memory.
  std::int64_t pageable_bytes_per_block() const;
  std::int64_t paged_elements() const { return parameters_.elements() - resident_; }
  std::int64_t paged_bytes() const {
    return paged_elements() / kParameterBlock * pageable_bytes_per_block();
  }

 private:
  // A flat array: elements below resident_ in device memory, the rest on the host.
  struct FlatArray {
    std::int64_t block_bytes = 0;  // of kParameterBlock elements
    std::unique_ptr<Buffer> device, host;
  };
  // Elements [begin, begin + count) of the flat arrays, one step of the optimizer.
  struct Page {
    std::int64_t begin, count;
    bool paged;
    std::string suffix() const { return "." + std::to_string(begin); }
  };
  struct Program {
    std::int64_t rows, loss_rows;
    int number;
    Ref row_losses;
  };
  int add_program(std::int64_t rows, std::int64_t loss_rows, bool training);
  int add_apply();
  const Program& write_inputs(const std::vector<Program>& programs, const Microbatch& batch);
  void bind_leaves();
  std::int64_t block_table_bytes() const;
  std::int64_t element_bytes() const;                // of masters and gradients
  TensorType moment_type(std::int64_t count) const;  // of so many elements
  bool pages_masters() const { return options_.compute == DType::BF16; }
  void choose_pages();
  std::vector<Page> pages() const;
  // Where element `at`, the first of a block, lies; null before allocate().
  std::byte* address(const FlatArray& array, std::int64_t at) const;
  FlatArray allocate_array(std::int64_t block_bytes, bool pageable, std::string_view purpose);
  template <class F>
  void for_pieces(const FlatArray& array, const ParameterSegment& segment, std::size_t size,
                  F f) const;
  // The first bytes of a segment, as stored.
  void read_bytes(const FlatArray& array, const ParameterSegment& segment,
                  std::span<std::byte> to) const;
  void write_bytes(const FlatArray& array, const ParameterSegment& segment,
                   std::span<const std::byte> from);
  std::vector<float> read_array(const FlatArray& array, const ParameterSegment& segment) const;
  void write_array(const FlatArray& array, const ParameterSegment& segment,
                   std::span<const float> values);

  Backend& backend_;
  ParameterTable parameters_;
  BuildLoss build_loss_;
  TrainerOptions options_;
  Runtime runtime_;
  std::vector<Program> micro_, evaluate_;
  int apply_ = -1;
  Ref norm_;  // of the apply program
  FlatArray master_, gradient_, first_moment_, second_moment_;
  std::unique_ptr<Buffer> copy_, block_table_;
  std::int64_t resident_ = 0;  // elements of pageable arrays in device memory
  std::int64_t page_ = 0;      // elements of a page on the host
  std::int64_t step_ = 0;
  std::int64_t tokens_ = 0;        // labels since the last apply
  std::int64_t copied_bytes_ = 0;  // the same of copies
};

}  // namespace nibble
