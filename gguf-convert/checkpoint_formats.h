// The formats behind open_checkpoint(), and what they share.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gguf-convert/checkpoint.h"
#include "gguf-convert/names.h"

namespace nibble {

std::unique_ptr<Checkpoint> open_gguf_checkpoint(const std::string& path);
std::unique_ptr<Checkpoint> open_hf_checkpoint(const std::string& directory);
std::unique_ptr<Checkpoint> open_random_checkpoint(const std::string& config_path,
                                                   std::uint64_t seed);

// Throws unless a stored tensor of `type` can serve as `spec`: same shape, a type with a decoder,
// and one value per element for norms.
void check_tensor(const TensorSpec& spec, const TensorType& type, const std::string& file,
                  std::uint64_t offset);

// Throws when a file with `tensors` tensors cannot hold the layers that its configuration claims,
// before a list of all their names is made.
void check_layer_count(const ModelConfig& config, std::size_t tensors, const std::string& file);

// The GGUF names of the planes of a tensor, in Planes order, are its name plus these.
inline constexpr const char* kPlaneSuffixes[5] = {".codes", ".absmax", ".absmax_scale",
                                                  ".absmax_offset", ".absmax_map"};
// Keys of a GGUF file with planes. Block size and shape may be overridden or given per tensor by
// KEY + "." + tensor name; the shape is given where codes cannot show it (an odd row length).
inline constexpr const char* kQuantVersionKey = "nibble.quant.version";
inline constexpr const char* kQuantTypeKey = "nibble.quant.type";
inline constexpr const char* kQuantBlockKey = "nibble.quant.block";
inline constexpr const char* kQuantShapeKey = "nibble.quant.shape";
inline constexpr std::uint32_t kQuantVersion = 1;

}  // namespace nibble
