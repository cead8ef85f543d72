#include "tools/tiny_model.h"

namespace nibble {

std::unique_ptr<Checkpoint> open_model_source(const std::string& source, std::uint64_t seed) {
  return open_checkpoint(source, seed);
}

}  // namespace nibble
