// Hostile files, made from good ones by seeded changes, and the promise that every reader makes
// about them: it reads the file or throws a nibble::Error, never anything else, and asks for no
// memory that the file's size does not justify.
//
// Sequences depend only on the seed, so a failure is repeated by running the test again; it prints
// the number of the change that caused it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace nibble::test {

// Random changes of a file: bits and bytes, 32- and 64-bit extremes, digits, and pieces copied,
// moved, doubled or removed. Most land in the first `header_bytes`.
class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : seed_(seed) {}
  // Change number `index` of the sequence: one to four of the above at once.
  std::string mutate(std::string bytes, std::size_t header_bytes, std::uint64_t index) const;

 private:
  std::uint64_t seed_;
};

struct Outcomes {
  int read = 0;     // files that were read without complaint
  int refused = 0;  // FormatError, Unsupported or another nibble::Error
};

// Opens the file at the path and uses all of it.
using Reader = std::function<void(const std::string& path)>;

// Reads the file once. Anything but success or a nibble::Error fails the running test, and so do a
// FormatError whose offset lies past the end and a single allocation above 64 KiB plus 64 times
// the file's size. `what` says what was done to the file.
void read_hostile(const std::string& path, const std::string& what, const Reader& reader,
                  Outcomes& outcomes);

// Puts `count` mutations of `bytes` at `path`, one after the other, and reads each.
Outcomes read_mutations(const std::string& path, const std::string& bytes, std::size_t header_bytes,
                        int count, std::uint64_t seed, const Reader& reader);

// Cuts `bytes` at every length below `header_bytes` and at `samples` seeded lengths from there to
// the end, and reads each. All of bytes.size() is never tried.
Outcomes read_prefixes(const std::string& path, const std::string& bytes, std::size_t header_bytes,
                       int samples, std::uint64_t seed, const Reader& reader);

}  // namespace nibble::test
