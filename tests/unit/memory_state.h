// Training state in memory: what a trainer saved, to be compared and loaded again.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/state.h"

namespace nibble::test {

struct MemoryState final : StateSink, StateSource {
  std::map<std::string, std::vector<std::byte>, std::less<>> tensors;
  std::map<std::string, TensorType, std::less<>> types;
  void write(std::string_view name, const TensorType& type,
             std::span<const std::byte> bytes) override {
    tensors[std::string(name)].assign(bytes.begin(), bytes.end());
    types[std::string(name)] = type;
  }
  void read(std::string_view name, const TensorType& type, std::span<std::byte> bytes) override {
    const auto found = tensors.find(name);
    REQUIRE(found != tensors.end());
    if (!(types.at(found->first) == type)) throw Error(found->first + " is of another type");
    REQUIRE(found->second.size() == bytes.size());
    std::copy(found->second.begin(), found->second.end(), bytes.begin());
  }
};

}  // namespace nibble::test
