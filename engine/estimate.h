// How long a program should take: a roofline over its steps, before anything runs.
#pragma once

#include "engine/plan.h"

namespace nibble {

// What a device keeps up, all per second. Zero: unknown.
struct DeviceRates {
  double flops = 0;       // of a large BF16 product, at the clock the card holds under load
  double bytes = 0;       // of memory, read and written
  double copy_bytes = 0;  // from or to pinned host memory, each way
  double launch = 0;      // seconds that a kernel takes at least
  double weight_gradients =
      1;  // the share of `flops` that sums over tokens for whole weights reach
  // Quantized weights are written out as BF16 and read back for products of more rows than
  // kDecodeRows.
  bool decodes_weights = false;

  bool known() const { return flops > 0; }
};

// Seconds of one run; copies from and to host memory run beside the kernels. `average_span`: rows
// of a document, for attention.
double estimate_seconds(const Plan& plan, const DeviceRates& rates, double average_span);

}  // namespace nibble
