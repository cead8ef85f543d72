#include "engine/parameters.h"

#include "engine/dtype.h"
#include "engine/error.h"

namespace nibble {

void ParameterTable::add(std::string name, std::int64_t rows, std::int64_t cols, float lr_scale,
                         float weight_decay) {
  if (!numbers_.emplace(name, segments_.size()).second) {
    throw Error("parameter \"" + name + "\" is there twice");
  }
  segments_.push_back({std::move(name), elements_, rows, cols, lr_scale, weight_decay});
  elements_ += round_up(rows * cols, kParameterBlock);
}

void ParameterTable::set_weight_decay(float decay) {
  for (ParameterSegment& s : segments_) {
    if (s.rows > 1) s.weight_decay = decay;
  }
}

const ParameterSegment* ParameterTable::find(std::string_view name) const {
  const auto found = numbers_.find(name);
  return found == numbers_.end() ? nullptr : &segments_[found->second];
}

const ParameterSegment& ParameterTable::at(std::string_view name) const {
  if (const ParameterSegment* s = find(name)) return *s;
  throw Error("there is no parameter \"" + std::string(name) + "\"");
}

std::int64_t ParameterTable::trainable() const {
  std::int64_t sum = 0;
  for (const ParameterSegment& s : segments_) sum += s.elements();
  return sum;
}

std::vector<float> ParameterTable::block_table() const {
  std::vector<float> table;
  table.reserve(static_cast<std::size_t>(2 * elements_ / kParameterBlock));
  for (const ParameterSegment& s : segments_) {
    const std::int64_t blocks = round_up(s.elements(), kParameterBlock) / kParameterBlock;
    for (std::int64_t i = 0; i < blocks; ++i) {
      table.push_back(s.lr_scale);
      table.push_back(s.weight_decay);
    }
  }
  return table;
}

}  // namespace nibble
