// From a checkpoint in one format to a model file in another, tensor by tensor.
//
// Which type each tensor gets, and the bytes it becomes, are pure functions of the source and the
// options (converted_type, convert_tensor), so that a trainer which quantizes while loading has
// the very bytes that gguf-convert would have written.
//
// NF4 files are Nibble's own: Hugging Face row order, planes, and `nibble.rope.style = half`.
// Every other GGUF is stock: adjacent row order and llama.cpp's keys.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <regex>
#include <span>
#include <string>
#include <vector>

#include "engine/dtype.h"
#include "engine/error.h"
#include "gguf-convert/adapter.h"
#include "gguf-convert/checkpoint.h"

namespace nibble {

// The command line asks for something that makes no sense; programs exit with 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

enum class Container { gguf, huggingface };

struct ConvertOptions {
  Container container = Container::gguf;
  DType type = DType::NF4;             // NF4, F32, F16, BF16 or Q8_0
  QuantParams quant;                   // of NF4
  std::optional<std::regex> no_quant;  // GGUF or HF names of matrices that stay as they are
  std::optional<DType> head;           // of the matrix that makes the logits
};

// "nf4" -> DType::NF4. Throws Unsupported for a type that exists elsewhere and UsageError for one
// that does not; both list what can be written.
DType output_type(const std::string& name);
// Throws UsageError when it is not a regular expression.
std::regex name_pattern(const std::string& text);

// The row order of q and k in the output.
RopeStyle converted_rope_style(const ConvertOptions& options);

// What `tensor` becomes:
//   NF4: the linears of decoder blocks; other matrices keep their type (F32 becomes BF16).
//   F32, F16, BF16, Q8_0: every matrix; F16 instead of Q8_0 where rows are not whole blocks.
//   Vectors are F32, in a Hugging Face directory the type of the matrices.
TensorType converted_type(const Checkpoint& source, const Checkpoint::Tensor& tensor,
                          const ConvertOptions& options);

// Writes `tensor` as `target` with rows in `style` order; out.size() == bytes(target). A tensor
// that has this type already is copied, everything else is decoded to F32 and rounded once.
void convert_tensor(const Checkpoint& source, const Checkpoint::Tensor& tensor,
                    const TensorType& target, RopeStyle style, std::span<std::byte> out);

// The same for rows [begin, end), with `adapter` (in `style` order; may be nullptr) merged in F32.
// Plane types allow the whole tensor only.
void convert_rows(const Checkpoint& source, const Checkpoint::Tensor& tensor,
                  const TensorType& target, RopeStyle style, const AdapterTensor* adapter,
                  double scale, std::int64_t begin, std::int64_t end, std::span<std::byte> out);

// The F32 values that convert_rows() rounds: rows in `style` order, adapter merged.
void source_rows(const Checkpoint& source, const Checkpoint::Tensor& tensor, RopeStyle style,
                 const AdapterTensor* adapter, double scale, std::int64_t begin,
                 std::span<float> out);

// Whether convert_tensor() copies the stored bytes (rows in another order, perhaps).
bool is_copied(const Checkpoint& source, const Checkpoint::Tensor& tensor, const TensorType& target,
               RopeStyle style);

struct PlannedTensor {
  const Checkpoint::Tensor* source = nullptr;  // borrowed from the checkpoint
  TensorType target;
  const AdapterTensor* adapter = nullptr;  // to merge; borrowed
};

struct ConvertPlan {
  std::vector<PlannedTensor> tensors;
  RopeStyle style = RopeStyle::half;
  std::int64_t bytes = 0;             // of all tensors
  std::vector<std::string> warnings;  // one line each
};

// Throws UsageError for options that exclude each other. `adapter` may be nullptr.
ConvertPlan plan_conversion(const Checkpoint& source, const ConvertOptions& options,
                            const AdapterFile* adapter);

struct ConvertRequest {
  std::string source, destination;
  ConvertOptions options;
  std::string adapter;  // path; empty: none
  std::string base;     // for adapters only: what they were trained on
  bool verify = false, dry_run = false, json = false;
  bool terminal = false;  // the log is a terminal: progress in place
  int threads = 1;
};

// Runs a request: results to `out`, progress and warnings to `log`. Returns 0, or 130 when
// interrupted; the destination appears whole or not at all. Throws Error.
int convert(const ConvertRequest& request, std::ostream& out, std::ostream& log);

// One tensor as --verify sees it, and the sum over all.
struct TensorError {
  std::string name;
  TensorType type;
  double max_abs = 0;       // largest |stored - source|
  double rms_relative = 0;  // rms(stored - source) / rms(source)
};
struct VerifyReport {
  std::vector<TensorError> tensors;
  TensorError total;
};
// Re-reads `written` and compares it with what `plan` made it from. Throws Error when a tensor has
// another type than planned, is not finite, or differs although its conversion is exact.
VerifyReport verify_conversion(const Checkpoint& source, const ConvertPlan& plan,
                               const AdapterFile* adapter, const Checkpoint& written);

}  // namespace nibble
