// When memory that a plan counts on is gone by the time it is asked for, because another process
// took it in between, or the device takes more beside the plan than was predicted, the run is
// planned once more, with what is known then.
#pragma once

#include <iosfwd>

#include "tools/finetune_setup.h"

namespace nibble {

// Reserves all memory of `setup`, which was planned from `asked`, readies its programs, and reads
// what the device then has in use. When the one fails or the other passes the cap, gives everything
// back, plans once more and says so in a line on `log`; the new plan's memory is reserved where it
// fits (setup.fit.fits()). Returns the recipe that the setup is then planned from: `asked`, or one
// with a lower cap. Throws OutOfMemory when the new plan cannot be reserved either, and at once for
// host memory that cannot be page-locked: how much can be is not known before it is tried.
Recipe reserve_or_replan(FinetuneSetup& setup, const Recipe& asked, std::ostream& log);

}  // namespace nibble
