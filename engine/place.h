// Offline memory placement: lifetimes in, offsets out, nothing else known.
//
// A lifetime occupies `bytes` during program steps first..last, both included. Two lifetimes that
// share a step must not share an address. The maximum over steps of the live bytes bounds any
// placement from below. Finding the smallest arena is NP-hard, so the search is greedy: values are
// placed one by one in a given order, each in the tightest gap. Several orders take turns; from each
// a few rounds follow in which values that ended above the bound choose first ("squeaky wheel"
// optimization, Joslin and Clements 1999). The training graphs here meet the bound.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nibble {

struct Lifetime {
  std::int64_t bytes;
  std::int32_t first, last;
};

struct Placement {
  std::vector<std::int64_t> offsets;  // one per lifetime, multiples of the alignment
  std::int64_t bytes = 0;             // of the whole arena
  std::int64_t lower_bound = 0;       // maximum live bytes, each lifetime rounded to the alignment
};

// The lower bound as if it were a placement: all offsets are 0.
Placement bound_placement(std::span<const Lifetime> lifetimes, std::int64_t alignment);

// An arena of `enough` bytes is there anyway: no smaller one is looked for.
Placement place(std::span<const Lifetime> lifetimes, std::int64_t alignment,
                std::int64_t enough = 0);

}  // namespace nibble
