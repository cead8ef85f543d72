// Cards by name: what --card plans for, and how fast they are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/backend.h"
#include "engine/estimate.h"

namespace nibble {

struct CardFigures {
  std::string_view name;  // of --card
  std::string_view part;  // of what the driver calls it
  int capability, multiprocessors;
  std::int64_t memory_bytes;  // to be had, context included
  DeviceRates rates;
};

// What a CUDA context, the kernels and the recorded programs take beside what is planned: 570 to
// 650 MiB were seen, from 7B to 65B.
inline constexpr std::int64_t kContextBytes = std::int64_t{672} << 20;

// Throws Error naming the known cards.
const CardFigures& find_card(const std::string& name);
std::vector<std::string> card_names();
std::string card_list();  // "rtx3090, rtx4090, ..."

// Of an opened backend; not known() for a CPU and for cards that are not in the table.
DeviceRates device_rates(const BackendInfo& info);

}  // namespace nibble
