// `nibble generate` and `nibble chat`: a model, adapters over it, and text out.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "models/generate.h"

namespace CLI {
class App;
}

namespace nibble {

struct SamplingRequest {
  std::string model, backend = "auto", compute = "f32", method = "lora";
  std::vector<std::string> adapters;  // PATH or PATH:SCALE
  std::string prompt, prompts, system;
  bool json = false, special = false;
  int threads = 0;
  std::int64_t context = 0;
  SampleOptions sample;
};

void add_generate_flags(CLI::App& command, SamplingRequest& request);
void add_chat_flags(CLI::App& command, SamplingRequest& request);
int generate_command(const SamplingRequest& request, std::ostream& out, std::ostream& log);
int chat_command(const SamplingRequest& request, std::istream& in, std::ostream& out,
                 std::ostream& log);

}  // namespace nibble
