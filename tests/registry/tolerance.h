// How far a kernel may be from the reference: the one tolerance table of the registry checks.
//
//   tolerance = 1 ulp of the output's dtype at the reference value
//             + kTermRounding * eps * sqrt(reduction) * magnitude
//
// The first part pays for the one rounding at the output (half an ulp) and for a result that lies
// next to a rounding boundary. The second pays for the arithmetic inside the op, which is F32 (F64
// in F64 graphs and for F64 outputs): eps is that type's, `reduction` is the number of terms of the
// longest sum, and rounding errors of independent sign grow with its square root. `magnitude` is
// the largest reference value of the output, and at least 1: sample inputs are of order one, so
// terms are too, also where they cancel.
//
// In BF16 a third part pays for what an op must round between two of its products: lora_linear's u
// everywhere, and on tensor cores attention's probabilities, the logits' gradient, an adapter's
// part where the library computes it. These are operand_roundings(op) roundings of relative size
// 2^-9 to values of that magnitude.
#pragma once

#include <array>
#include <map>
#include <span>
#include <string>

#include "engine/dtype.h"
#include "tests/registry/case.h"

namespace nibble::registry {

// Roundings per term: the product, the sum, and what exp, sin or rsqrt are off by.
inline constexpr double kTermRounding = 2;

// Central differences in F64 with a step of 1e-5 are good to about 1e-9 of the gradient's scale.
inline constexpr double kDifferenceStep = 1e-5;
inline constexpr double kGradientTolerance = 1e-6;

double ulp(DType dtype, double value);
double tolerance(DType compute, DType out, std::int64_t reduction, double magnitude, double value);
double operand_roundings(OpId op, bool tensor_cores);

// The largest error seen, as a share of the tolerance: by compute dtype.
using WorstRatios = std::map<DType, double>;

// Empty, or which element is past its tolerance. Raises `worst` to the largest ratio. `slack`
// multiplies the tolerance: 2 when neither side is the reference.
std::string compare(const Case& c, DType out, std::span<const double> got,
                    std::span<const double> wanted, bool rounds_operands, WorstRatios& worst,
                    double slack = 1);

}  // namespace nibble::registry
