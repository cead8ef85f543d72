// The trainable parameters of a model as segments of flat arrays.
//
// Five arrays share the offsets: master (F32), copy (compute dtype; the master itself in F32),
// gradient, first and second moment. Every segment starts at a multiple of 4096 elements, the unit
// in which the optimizer's blocks, sums of squares and pages are counted; the padding stays zero.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/names.h"

namespace nibble {

inline constexpr std::int64_t kParameterBlock = 4096;  // elements
// Elements that the optimizer's program handles per kernel: 64 MiB of F32. A GPU spends about 5 us
// on each launch, as long as on 4 MiB.
inline constexpr std::int64_t kParameterPage = 16 << 20;

struct ParameterSegment {
  std::string name;
  std::int64_t offset;  // elements
  std::int64_t rows, cols;
  float lr_scale, weight_decay;
  std::int64_t elements() const { return rows * cols; }
};

class ParameterTable {
 public:
  // Appends a segment; rows = 1 for vectors. Names are unique.
  void add(std::string name, std::int64_t rows, std::int64_t cols, float lr_scale = 1,
           float weight_decay = 0);
  // Sets the decay of every matrix; vectors (norms, biases) are never decayed.
  void set_weight_decay(float decay);
  const std::vector<ParameterSegment>& segments() const { return segments_; }
  const ParameterSegment* find(std::string_view name) const;  // nullptr: none
  const ParameterSegment& at(std::string_view name) const;    // throws Error naming it
  std::int64_t elements() const { return elements_; }         // of each flat array, with padding
  std::int64_t trainable() const;                             // without padding
  // {lr scale, weight decay} of every block, as the adamw op reads it.
  std::vector<float> block_table() const;

 private:
  std::vector<ParameterSegment> segments_;
  NameMap<std::size_t> numbers_;  // of the segments
  std::int64_t elements_ = 0;
};

}  // namespace nibble
