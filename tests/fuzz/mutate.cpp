// The changes of tests/fuzz/mutate.h, and a count of allocations: this file replaces operator new,
// so it belongs in test programs only.
#include "tests/fuzz/mutate.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <new>
#include <vector>

#include "engine/error.h"
#include "engine/philox.h"
#include "tests/unit/scratch.h"

namespace {

std::size_t largest_allocation = 0;

void* counted(std::size_t size) {
  largest_allocation = std::max(largest_allocation, size);
  return std::malloc(size == 0 ? 1 : size);
}

}  // namespace

void* operator new(std::size_t size) {
  if (void* memory = counted(size)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return counted(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

namespace nibble::test {
namespace {

// A stream of random numbers from one philox key and counter.
class Random {
 public:
  Random(std::uint64_t key, std::uint64_t stream) : key_(key), stream_(stream) {}
  std::uint64_t next() {
    const PhiloxBlock block = philox(key_, {count_++, 0, static_cast<std::uint32_t>(stream_),
                                            static_cast<std::uint32_t>(stream_ >> 32)});
    return block[0] | static_cast<std::uint64_t>(block[1]) << 32;
  }
  // In [0, bound), 0 for a bound of 0.
  std::size_t below(std::size_t bound) {
    return bound == 0 ? 0 : static_cast<std::size_t>(next() % bound);
  }

 private:
  std::uint64_t key_, stream_;
  std::uint32_t count_ = 0;
};

std::uint64_t extreme(Random& random, std::size_t file_bytes) {
  const std::uint64_t values[] = {0,
                                  1,
                                  2,
                                  31,
                                  255,
                                  0x7fffffff,
                                  0x80000000,
                                  0xffffffff,
                                  std::uint64_t{1} << 32,
                                  std::uint64_t{1} << 40,
                                  std::uint64_t{1} << 61,
                                  std::uint64_t{1} << 62,
                                  (std::uint64_t{1} << 63) - 1,
                                  std::uint64_t{1} << 63,
                                  ~std::uint64_t{0} - 7,
                                  ~std::uint64_t{0},
                                  file_bytes,
                                  file_bytes + 1,
                                  file_bytes / 2,
                                  random.next()};
  return values[random.below(std::size(values))];
}

void change_once(std::string& bytes, std::size_t header_bytes, Random& random) {
  const std::size_t size = bytes.size();
  const std::size_t reach = random.below(8) == 0 ? size : std::min(header_bytes, size);
  const std::size_t at = random.below(reach);
  const std::size_t length = std::min(size - at, 1 + random.below(random.below(4) == 0 ? 300 : 16));
  switch (random.below(9)) {
    case 0:
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8)));
      break;
    case 1:
      bytes[at] = static_cast<char>(random.next());
      break;
    case 2:
      bytes[at] = "\0\1\x7f\x80\xff\"{}[],:"[random.below(12)];
      break;
    case 3: {
      const std::uint64_t value = extreme(random, size);
      const std::size_t width = random.below(2) == 0 ? 4 : 8;
      std::memcpy(bytes.data() + at, &value, std::min(width, size - at));
      break;
    }
    case 4:
      bytes.erase(at, length);
      break;
    case 5:
      bytes.insert(random.below(reach), std::string(bytes, at, length));
      break;
    case 6:
      bytes.replace(random.below(reach), length, std::string(bytes, at, length));
      break;
    case 7:
      bytes.insert(at, std::string(1 + random.below(40), static_cast<char>(random.next())));
      break;
    default: {  // numbers in text: the next digit becomes another, or many
      const std::size_t digit = bytes.find_first_of("0123456789", at);
      if (digit == std::string::npos) break;
      const std::string digits = std::to_string(extreme(random, size));
      bytes.replace(digit, 1, random.below(2) == 0 ? digits.substr(0, 1) : digits);
    }
  }
}

std::size_t position_in(const std::string& path) {
  return static_cast<std::size_t>(std::filesystem::file_size(path));
}

}  // namespace

std::string Mutator::mutate(std::string bytes, std::size_t header_bytes,
                            std::uint64_t index) const {
  Random random(seed_, index);
  const std::size_t changes = 1 + random.below(4);
  for (std::size_t i = 0; i < changes && !bytes.empty(); ++i) {
    change_once(bytes, header_bytes, random);
  }
  return bytes;
}

void read_hostile(const std::string& path, const std::string& what, const Reader& reader,
                  Outcomes& outcomes) {
  const std::size_t size = position_in(path);
  CAPTURE(what);
  largest_allocation = 0;
  try {
    reader(path);
    ++outcomes.read;
  } catch (const FormatError& error) {
    ++outcomes.refused;
    if (error.file == path) CHECK_MESSAGE(error.offset <= size, std::string(error.what()));
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
  } catch (const Error&) {
    ++outcomes.refused;
  } catch (const std::exception& error) {
    FAIL_CHECK("not a nibble::Error: " << error.what());
  }
  CHECK(largest_allocation <= (std::size_t{1} << 16) + 64 * size);
}

Outcomes read_mutations(const std::string& path, const std::string& bytes, std::size_t header_bytes,
                        int count, std::uint64_t seed, const Reader& reader) {
  Outcomes outcomes;
  const Mutator mutator(seed);
  for (int i = 0; i < count; ++i) {
    // Rewriting a file in place makes some file systems flush it to disk every time.
    std::filesystem::remove(path);
    put(path, mutator.mutate(bytes, header_bytes, static_cast<std::uint64_t>(i)));
    read_hostile(path, "mutation " + std::to_string(i), reader, outcomes);
  }
  return outcomes;
}

Outcomes read_prefixes(const std::string& path, const std::string& bytes, std::size_t header_bytes,
                       int samples, std::uint64_t seed, const Reader& reader) {
  header_bytes = std::min(header_bytes, bytes.size());
  std::vector<std::size_t> lengths;
  for (std::size_t length = 0; length < header_bytes; ++length) lengths.push_back(length);
  Random random(seed, 0);
  for (int i = 0; i < samples && header_bytes < bytes.size(); ++i) {
    lengths.push_back(header_bytes + random.below(bytes.size() - header_bytes));
  }
  std::sort(lengths.rbegin(), lengths.rend());
  Outcomes outcomes;
  put(path, bytes);
  for (const std::size_t length : lengths) {
    std::filesystem::resize_file(path, length);
    read_hostile(path, "the first " + std::to_string(length) + " bytes", reader, outcomes);
  }
  return outcomes;
}

}  // namespace nibble::test
