#include "gguf-convert/progress.h"

#include <algorithm>
#include <cstdio>

#include "engine/os.h"

namespace nibble {

Progress::Progress(std::string what, std::int64_t total_bytes, bool terminal, std::ostream& log)
    : what_(std::move(what)),
      total_(total_bytes),
      terminal_(terminal),
      log_(log),
      start_(os::seconds()),
      printed_(start_) {}

Progress::~Progress() {
  if (terminal_ && printed_ != start_) log_ << "\r\x1b[K" << std::flush;
}

void Progress::advance(std::int64_t bytes) {
  done_ += bytes;
  const double now = os::seconds();
  if (now - printed_ < (terminal_ ? 0.1 : 10.0)) return;
  printed_ = now;
  const double mib = 1024.0 * 1024.0, elapsed = std::max(now - start_, 1e-3);
  const double rate = std::max(static_cast<double>(done_), 1.0) / elapsed;
  char text[128];
  std::snprintf(text, sizeof text, "%s %.0f of %.0f MiB, %.0f MiB/s, %.0f s left", what_.c_str(),
                static_cast<double>(done_) / mib, static_cast<double>(total_) / mib, rate / mib,
                static_cast<double>(total_ - done_) / rate);
  log_ << (terminal_ ? "\r\x1b[K" : "") << text << (terminal_ ? "" : "\n") << std::flush;
}

}  // namespace nibble
