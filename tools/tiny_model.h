// The model inside the program: "tiny" is accepted wherever a model is.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gguf-convert/checkpoint.h"

namespace nibble {

// open_checkpoint(), and "tiny" for the embedded model.
std::unique_ptr<Checkpoint> open_model_source(const std::string& source, std::uint64_t seed = 0);

}  // namespace nibble
