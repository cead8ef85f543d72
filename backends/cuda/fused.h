// Kernels that do the work of two consecutive steps, for patterns that every llama-shaped model
// repeats. Each takes both calls and gives the very bytes of running them one after the other.
//
// X_supports(first, second) looks at types, params and the refs of the nodes' inputs alone, so it
// can be asked before memory is planned; that second reads output 0 of first where the pattern
// says so is the caller's to know. Addresses: as for one op with the inputs and outputs of both. An
// output may be the very address of an input of the same bytes where a contract says so, and must
// not overlap any other operand.
#pragma once

#include "backends/cuda/kernel.h"

namespace nibble::cuda {

// first: s = a + b; second: y = rms_norm(s, w, eps), w stored as F32 or BF16.
// Reads first.in[0], first.in[1] and second.in[1]; writes first.out[0] (s) and second.out[0] (y).
// s may be a or b, y may be a or b, and y may be s, in which case s is not stored. A row is read
// before any of it is written.
bool add_rms_norm_supports(const OpCall& first, const OpCall& second);
void add_rms_norm(const OpCall& first, const OpCall& second, const Launch& launch);

// first: dx = rms_norm_dx(x, w, dy, eps), w stored as F32 or BF16; second: s = dx + other, where
// dx is either input of second, but not both, by its address.
// Reads first.in[0..2] and other; writes second.out[0] (s) alone: dx is never stored, so nothing
// else may read it. s may be x, dy, other or the place of dx.
bool rms_norm_dx_add_supports(const OpCall& first, const OpCall& second);
void rms_norm_dx_add(const OpCall& first, const OpCall& second, const Launch& launch);

// Two independent ropes of different tensors (q and k), with the same positions, frequencies and
// params and any number of heads each. Each output may be its own input.
bool rope_pair_supports(const OpCall& first, const OpCall& second);
void rope_pair(const OpCall& first, const OpCall& second, const Launch& launch);

}  // namespace nibble::cuda
