// Offline memory placement: lifetimes in, offsets out, nothing else known.
//
// A lifetime occupies `bytes` during program steps first..last, both included. Two lifetimes that
// share a step must not share an address. The maximum over steps of the live bytes bounds any
// placement from below. Finding the smallest arena is NP-hard, so the search is greedy: values are
// placed one by one in a given order, each in the tightest gap. Several orders take turns; from
// each a few rounds follow in which values that ended above the bound choose first ("squeaky wheel"
// optimization, Joslin and Clements 1999). The training graphs here meet the bound.
#pragma once

#include <cstddef>
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
  std::size_t search = 0;             // number of the one that found it
};

// What the placement of a similar program came to.
struct PlaceHint {
  std::int64_t enough = 0;  // bytes of an arena that is there anyway: no smaller one is looked for
  std::size_t search = 0;   // what found it, and is asked first
};

// The lower bound as if it were a placement: all offsets are 0.
Placement bound_placement(std::span<const Lifetime> lifetimes, std::int64_t alignment);

Placement place(std::span<const Lifetime> lifetimes, std::int64_t alignment,
                const PlaceHint& hint = {});

}  // namespace nibble
