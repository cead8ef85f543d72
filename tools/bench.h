// `nibble bench ops|train|decode`: rates with their share of what the machine can do, measured in
// the same run.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

namespace CLI {
class App;
}

namespace nibble {

struct BenchRequest {
  std::string what, model, compute = "f32", storage = "store", method = "qlora", backend = "auto";
  std::int64_t batch = 4, sequence = 256, rank = 16, steps = 5, prompt = 128, tokens = 64;
  int threads = 0;
  bool ops = false, json = false;
};

void add_bench_flags(CLI::App& command, BenchRequest& request);
int bench_command(const BenchRequest& request, std::ostream& out, std::ostream& log);

}  // namespace nibble
