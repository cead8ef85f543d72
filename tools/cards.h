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

// What a CUDA context with the kernels takes beside what is planned, and every step of a recorded
// program: from 7,000 steps with 563 MiB to 27,000 with 788 were seen, all a little less than this.
inline constexpr std::int64_t kContextBytes = std::int64_t{528} << 20;
inline constexpr std::int64_t kRecordedStepBytes = 10 << 10;

// Throws Error naming the known cards.
const CardFigures& find_card(const std::string& name);
std::vector<std::string> card_names();
std::string card_list();  // "rtx3090, rtx4090, ..."

// Of an opened backend; not known() for a CPU and for cards that are not in the table.
DeviceRates device_rates(const BackendInfo& info);

}  // namespace nibble
