// A directory of its own for a test, removed with all its files when the object goes.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <system_error>

namespace nibble::test {

class Scratch {
 public:
  Scratch() {
    std::random_device seed;
    do {
      path_ = std::filesystem::temp_directory_path() / ("nibble-test-" + std::to_string(seed()));
    } while (!std::filesystem::create_directory(path_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }
  // Files in the directory, hidden ones included.
  int entries() const {
    const std::filesystem::directory_iterator all(path_);
    return static_cast<int>(std::distance(begin(all), end(all)));
  }

 private:
  std::filesystem::path path_;
};

// Plain reading and writing, apart from the code under test.
inline void put(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

inline std::string get(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace nibble::test
