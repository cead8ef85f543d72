// The memory plan of a training program as a picture: program order from left to right, addresses
// of the arena from bottom to top, one rectangle per stay, coloured by what it is for.
#pragma once

#include <cstdint>
#include <string>

#include "engine/plan.h"

namespace nibble {

// Above the picture; the sizes of the arena follow the details.
struct PictureText {
  std::string title, details;
};

// 1600 x 900 pixels. `loss`: the node before which the forward pass ends. The file appears by
// rename.
void write_plan_picture(const PictureText& words, const Plan& plan, std::int32_t loss,
                        const std::string& path);

}  // namespace nibble
