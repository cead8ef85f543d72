// `nibble generate` and `nibble chat`: a model, adapters over it, and text out.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "models/generate.h"
#include "tools/backend.h"

namespace CLI {
class App;
}

namespace nibble {

struct SamplingRequest {
  BackendChoice where;
  std::string model, compute, method = "lora";
  std::vector<std::string> adapters;  // PATH or PATH:SCALE
  std::string prompt, prompts, system;
  bool json = false, special = false;
  std::int64_t context = 0;
  SampleOptions sample;
};

void add_generate_flags(CLI::App& command, SamplingRequest& request);
void add_chat_flags(CLI::App& command, SamplingRequest& request);
int generate_command(const SamplingRequest& request, std::ostream& out, std::ostream& log);
int chat_command(const SamplingRequest& request, std::istream& in, std::ostream& out,
                 std::ostream& log);

}  // namespace nibble
