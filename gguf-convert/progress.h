// Progress of a long command on its log: one line that is rewritten in place on a terminal, a plain
// line every ten seconds elsewhere. Not thread safe.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>

namespace nibble {

class Progress {
 public:
  // `what` names the activity, "writing". Borrows `log`.
  Progress(std::string what, std::int64_t total_bytes, bool terminal, std::ostream& log);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();  // clears the line on a terminal

  void advance(std::int64_t bytes);

 private:
  std::string what_;
  std::int64_t total_, done_ = 0;
  bool terminal_;
  std::ostream& log_;
  double start_, printed_;
};

}  // namespace nibble
