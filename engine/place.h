// Offline memory placement: lifetimes in, offsets out, nothing else known.
//
// A lifetime occupies `bytes` during program steps first..last, both included. Two lifetimes that
// share a step must not share an address. Finding the smallest arena is NP-hard; several greedy
// orders are tried and the best result is kept. The maximum over steps of the live bytes bounds any
// placement from below, and for the training graphs here the best order meets it or comes close.
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

Placement place(std::span<const Lifetime> lifetimes, std::int64_t alignment);

}  // namespace nibble
