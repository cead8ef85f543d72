#include "tests/registry/tolerance.h"

#include <algorithm>
#include <cmath>

#include "engine/error.h"

namespace nibble::registry {

double ulp(DType dtype, double value) {
  int bits = 0, lowest = 0;  // stored mantissa bits, exponent of the smallest normal number
  switch (dtype) {
    case DType::F64:
      bits = 52, lowest = -1022;
      break;
    case DType::F32:
      bits = 23, lowest = -126;
      break;
    case DType::BF16:
      bits = 7, lowest = -126;
      break;
    case DType::F16:
      bits = 10, lowest = -14;
      break;
    default:
      throw Error("no ulp for " + std::string(name(dtype)));
  }
  const int exponent = value == 0 ? lowest : std::max(std::ilogb(value), lowest);
  return std::ldexp(1.0, exponent - bits);
}

double tolerance(DType compute, DType out, std::int64_t reduction, double magnitude, double value) {
  const bool wide = compute == DType::F64 || out == DType::F64;
  const double eps = wide ? 0x1p-52 : 0x1p-23;
  return ulp(out, value) +
         kTermRounding * eps * std::sqrt(static_cast<double>(reduction)) * std::max(magnitude, 1.0);
}

double operand_roundings(OpId op, bool tensor_cores) {
  switch (op) {
    case OpId::lora_linear:
      return 1;
    case OpId::attention:
    case OpId::attention_backward:
    case OpId::attention_cached:
    case OpId::linear_cross_entropy:
    case OpId::linear_cross_entropy_dw:
    case OpId::lora_linear_y:
    case OpId::lora_linear_dx:
      return tensor_cores ? 1 : 0;
    default:
      return 0;
  }
}

std::string compare(const Case& c, DType out, std::span<const double> got,
                    std::span<const double> wanted, bool rounds_operands, WorstRatios& worst,
                    double slack) {
  if (got.size() != wanted.size()) return "another number of elements than the reference";
  if (!is_float(out)) {  // numbers of tokens and the like are right or wrong
    if (!std::equal(got.begin(), got.end(), wanted.begin())) {
      return "is " + std::to_string(got[0]) + ", wanted " + std::to_string(wanted[0]);
    }
    worst[c.compute] = std::max(worst[c.compute], 0.0);
    return {};
  }
  double magnitude = 0;
  for (const double v : wanted) magnitude = std::max(magnitude, std::abs(v));
  const double roundings = c.compute == DType::BF16 ? operand_roundings(c.op, rounds_operands) *
                                                          0x1p-9 * std::max(magnitude, 1.0)
                                                    : 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double allowed =
        slack * (tolerance(c.compute, out, c.sample.reduction, magnitude, wanted[i]) + roundings);
    const double error = std::abs(got[i] - wanted[i]);
    if (!(error <= allowed)) {  // NaN fails too
      return "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", wanted " +
             std::to_string(wanted[i]) + ": off by " + std::to_string(error / allowed) +
             " times the tolerance";
    }
    double& ratio = worst[c.compute];
    ratio = std::max(ratio, error / allowed);
  }
  return {};
}

}  // namespace nibble::registry
