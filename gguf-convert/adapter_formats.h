// The two file formats behind read_adapter(), and what they share.
#pragma once

#include <map>
#include <span>
#include <string>

#include "gguf-convert/adapter.h"

namespace nibble {

AdapterFile read_peft(const std::string& directory);
AdapterFile read_gguf_lora(const std::string& path);

// One half of a pair as a reader finds it.
struct AdapterMatrix {
  std::int64_t rows = 0, cols = 0;
  std::vector<float> values;
};
struct AdapterPair {
  AdapterMatrix a, b;  // rows == 0: not found
};

// Pairs, keyed by base tensor name, into tensors in model order. Throws FormatError when a half is
// missing or the ranks differ. Leaves alpha to the caller.
std::vector<AdapterTensor> join_pairs(std::map<std::string, AdapterPair>&& pairs,
                                      const std::string& path);

}  // namespace nibble
