// What one call of an op must do at least: the floor that a measured time is held against.
#pragma once

#include "engine/backend.h"

namespace nibble {

struct OpCost {
  double flops = 0;  // multiply-adds of products count twice; attention counts what is not masked
  double bytes = 0;  // every input read once, every result written once, as stored
};

// `average_span`: rows of a document, for attention.
OpCost op_cost(const OpCall& call, double average_span);

}  // namespace nibble
