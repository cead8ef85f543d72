// --verify: what is in the file against what it was made from, piece by piece.
#include <algorithm>
#include <cmath>

#include "gguf-convert/convert.h"

namespace nibble {
namespace {

constexpr std::int64_t kPieceElements = std::int64_t{1} << 20;

struct Sums {
  double max_abs = 0, error = 0, source = 0;

  void add(double wanted, double found) {
    const double difference = found - wanted;
    // The comparison is false for NaN, which must not vanish in a maximum.
    if (!(std::abs(difference) <= max_abs)) max_abs = std::abs(difference);
    error += difference * difference;
    source += wanted * wanted;
  }

  void add(const Sums& other) {
    max_abs = std::max(max_abs, other.max_abs);
    error += other.error;
    source += other.source;
  }

  double relative() const { return error == 0 ? 0.0 : std::sqrt(error / source); }
};

// Whether every value of the source must come back unchanged.
bool is_exact(const Checkpoint& source, const PlannedTensor& planned, RopeStyle style) {
  const DType from = planned.source->type.dtype, to = planned.target.dtype;
  const bool copied = is_copied(source, *planned.source, planned.target, style);
  if (copied && planned.adapter == nullptr) return true;
  return to == DType::F32 && from != DType::F64;
}

Sums compare(const Checkpoint& source, const ConvertPlan& plan, const PlannedTensor& planned,
             double scale, const Checkpoint& written, const Checkpoint::Tensor& stored) {
  const std::int64_t rows = planned.target.shape.rows(), cols = planned.target.shape.cols();
  const std::int64_t step = std::max<std::int64_t>(1, kPieceElements / cols);
  Sums sums;
  std::vector<float> wanted, found;
  for (std::int64_t begin = 0; begin < rows; begin += step) {
    const auto count = static_cast<std::size_t>((std::min(rows, begin + step) - begin) * cols);
    wanted.resize(count);
    found.resize(count);
    source_rows(source, *planned.source, plan.style, planned.adapter, scale, begin, wanted);
    written.read_f32(stored, begin * cols, found);
    for (std::size_t i = 0; i < count; ++i) sums.add(wanted[i], found[i]);
  }
  return sums;
}

void check(const std::string& where, const Sums& sums, bool exact) {
  if (!std::isfinite(sums.max_abs)) {
    throw Error(where + "holds values that are not finite; check the source weights");
  }
  if (exact && sums.max_abs != 0) {
    throw Error(where + "differs from the source by up to " + std::to_string(sums.max_abs) +
                ", and should be the same; convert again and check the disk");
  }
}

}  // namespace

VerifyReport verify_conversion(const Checkpoint& source, const ConvertPlan& plan,
                               const AdapterFile* adapter, const Checkpoint& written) {
  VerifyReport report;
  Sums total;
  for (const PlannedTensor& planned : plan.tensors) {
    const Checkpoint::Tensor* stored = written.find(planned.source->name);
    if (stored == nullptr || !(stored->type == planned.target)) {
      throw Error((stored == nullptr
                       ? planned.source->name + " is missing"
                       : stored->file + ": " + planned.source->name + " is " + stored->type.str()) +
                  "; wanted " + planned.target.str());
    }
    const double scale = planned.adapter == nullptr ? 0.0 : adapter->scale(*planned.adapter);
    const Sums sums = compare(source, plan, planned, scale, written, *stored);
    check(stored->file + ": " + stored->name + ": ", sums, is_exact(source, planned, plan.style));
    source.forget(*planned.source);
    written.forget(*stored);
    total.add(sums);
    report.tensors.push_back({planned.source->name, planned.target, sums.max_abs, sums.relative()});
  }
  report.total = {"total", {}, total.max_abs, total.relative()};
  return report;
}

}  // namespace nibble
