// ggml's numbers for tensor types, as GGUF files store them. Source: ggml include/ggml.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "engine/dtype.h"

namespace nibble {

std::optional<DType> dtype_from_ggml(std::uint32_t id);     // nullopt: not one that Nibble reads
std::optional<std::uint32_t> ggml_from_dtype(DType dtype);  // nullopt: ggml has no such type

// "IQ4_NL (type 20)" for the types that ggml knows, else "type 99".
std::string ggml_type_name(std::uint32_t id);

// "F32, F16, ...": what dtype_from_ggml accepts, for messages.
std::string readable_ggml_types();

}  // namespace nibble
