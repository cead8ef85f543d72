// `nibble bench ops|train|decode`: rates with their share of what the machine can do, measured in
// the same run.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "tools/backend.h"

namespace CLI {
class App;
}

namespace nibble {

struct BenchRequest {
  BackendChoice where;
  std::string what, model, compute, storage = "store", method = "qlora", memory, host_memory, card;
  std::int64_t batch = 4, sequence = 256, rank = -1, steps = 5, prompt = 128, tokens = 64;
  std::int64_t micro_batches = 1;
  double dropout = 0, peak_seconds = 2;
  bool ops = false, json = false;
};

void add_bench_flags(CLI::App& command, BenchRequest& request);
int bench_train(const BenchRequest& request, std::ostream& out, std::ostream& log);
int bench_decode(const BenchRequest& request, std::ostream& out, std::ostream& log);
int bench_command(const BenchRequest& request, std::ostream& out, std::ostream& log);

}  // namespace nibble
