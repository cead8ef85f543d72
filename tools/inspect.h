// `nibble inspect`: what a model, an adapter or a GGUF file holds.
#pragma once

#include <iosfwd>
#include <string>

namespace CLI {
class App;
}

namespace nibble {

struct InspectRequest {
  std::string path;
  bool json = false, metadata = false;
};

void add_inspect_flags(CLI::App& command, InspectRequest& request);
int inspect_command(const InspectRequest& request, std::ostream& out, std::ostream& log);

}  // namespace nibble
