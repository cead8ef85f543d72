// The op linear as a product of few rows, for the executable, which runs several of the same rows
// in one launch.
#pragma once

#include "backends/cuda/decode.h"

namespace nibble::cuda {

inline constexpr std::size_t kMatVecGroup = 4;  // of matvec_group()

bool linear_is_matvec(const OpCall& call);
MatVec linear_matvec(const OpCall& call);

}  // namespace nibble::cuda
