#include "tools/cards.h"

#include <array>

#include "engine/error.h"
#include "tools/text.h"

namespace nibble {
namespace {

constexpr std::int64_t gib(double n) { return static_cast<std::int64_t>(n * (1 << 30)); }

// H100 and H200: what training steps reach (README): products between other kernels run at a higher
// clock than one kept up alone, which falls to 590 to 630 on the H100. The others: nine tenths of
// what their makers state for dense BF16 products with F32 sums and for memory, and what pinned
// copies reach on their bus. Weight gradients run on the instructions that all cards have, at 190
// TFLOP/s on the H100; their share on the others is a guess.
constexpr DeviceRates rates(double teraflops, double gigabytes, double copy_gigabytes,
                            double weight_gradients = 0.6) {
  return {.flops = teraflops * 1e12,
          .bytes = gigabytes * 1e9,
          .copy_bytes = copy_gigabytes * 1e9,
          .launch = 4.7e-6,
          .weight_gradients = weight_gradients,
          .decodes_weights = true};
}
constexpr std::array kCards{
    CardFigures{"rtx3090", "RTX 3090", 86, 82, gib(23.4), rates(64, 840, 24)},
    CardFigures{"rtx4090", "RTX 4090", 89, 128, gib(23.4), rates(149, 907, 24)},
    CardFigures{"rtx5090", "RTX 5090", 120, 170, gib(31.3), rates(188, 1610, 48)},
    CardFigures{"a6000", "RTX A6000", 86, 84, gib(47.3), rates(139, 690, 24)},
    CardFigures{"l40s", "L40S", 89, 142, gib(44.3), rates(326, 777, 24)},
    CardFigures{"a100", "A100", 80, 108, gib(79.1), rates(281, 1740, 24)},
    CardFigures{"h100", "H100", 90, 132, gib(79.1), rates(690, 2800, 54, 0.275)},
    CardFigures{"h200", "H200", 90, 132, gib(139.7), rates(655, 3600, 54, 0.29)},
};

}  // namespace

const CardFigures& find_card(const std::string& name) {
  for (const CardFigures& card : kCards) {
    if (card.name == name) return card;
  }
  throw Error("--card " + name + " is not known; there are " + card_list() +
              "; for another one give --memory");
}

std::vector<std::string> card_names() {
  std::vector<std::string> names;
  for (const CardFigures& card : kCards) names.emplace_back(card.name);
  return names;
}

std::string card_list() {
  std::string list;
  for (const CardFigures& card : kCards) {
    if (!list.empty()) list += ", ";
    list += card.name;
  }
  return list;
}

DeviceRates device_rates(const BackendInfo& info) {
  for (const CardFigures& card : kCards) {
    if (info.description.find(card.part) != std::string::npos) return card.rates;
  }
  return {};
}

}  // namespace nibble
