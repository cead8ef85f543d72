// The checks that every op gets by being in engine/ops.def, with no test of its own.
//
// A check returns what is wrong, one line per problem, each naming op, sample, dtypes and backend;
// an empty list means all is well. Backends come from the caller, so that another device is held to
// the same rules by passing it here.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "tests/registry/case.h"
#include "tests/registry/tolerance.h"

namespace nibble::registry {

using Problems = std::vector<std::string>;

// Backends that must agree bit for bit, as one does with itself at other thread counts.
struct Target {
  std::string name;
  std::unique_ptr<Backend> backend;
  // Runs of each program, all of the same bytes. A CUDA backend runs a program kernel by kernel,
  // then records it, then replays the record: three show each.
  int runs = 2;
};
using Family = std::vector<Target>;

// The op has samples, a reference and a shape rule. Inputs of another rank or dtype, and another
// number of inputs, are refused by a ShapeError that starts with the op's name.
Problems check_shape_rule(OpId op);

// For every case of the op in one of `computes`, on every backend: a kernel exists and agrees with
// the reference, writes nothing but its outputs, reads nothing but its inputs, gives the same bytes
// when run again, at every member of the family, as a recomputing clone and when output 0 takes
// over the memory of an input that it may overwrite.
Problems check_kernels(OpId op, const std::vector<Family>& families, WorstRatios& worst,
                       std::span<const DType> computes = kComputes);

// One device against another, within twice the tolerance, on the same inputs, in F32: where one
// side rounds operands and the other does not, only the reference can judge.
Problems compare_backends(OpId op, const Target& candidate, const Target& oracle,
                          WorstRatios& worst);

// Small cases in F64: gradients of append_backward against central differences, for every element
// of every differentiable input. `checked` counts the cases.
Problems check_gradients(OpId op, Backend& backend, int& checked);

}  // namespace nibble::registry
