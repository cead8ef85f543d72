#include "gguf-convert/staged_directory.h"

#include <filesystem>
#include <vector>

#include "engine/error.h"
#include "engine/os.h"

namespace nibble {

namespace fs = std::filesystem;

namespace {

// Fails when `path` is a directory with files but without `marker`, or not a directory.
void check_destination(const fs::path& path, const std::string& marker) {
  if (!fs::exists(path)) return;
  if (!fs::is_directory(path)) {
    throw Error(path.string() + ": exists and is not a directory; name another destination");
  }
  if (!fs::is_empty(path) && !fs::exists(path / marker)) {
    throw Error(path.string() + ": the directory has files but no " + marker +
                "; name an empty or new directory");
  }
}

[[noreturn]] void rethrow(const fs::filesystem_error& e) {
  throw DeviceError(e.path1().string() + ": " + e.code().message(), e.code().value());
}

bool is_weights(const fs::path& file) {
  const std::string name = file.filename().string();
  return file.extension() == ".safetensors" || name == "model.safetensors.index.json";
}

}  // namespace

StagedDirectory::StagedDirectory(const std::string& path, const std::string& marker) try {
  fs::path target = fs::absolute(path).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();
  check_destination(target, marker);
  path_ = target.string();
  fs::create_directories(target.parent_path());
  const std::string stem = (target.parent_path() / ("." + target.filename().string())).string();
  for (int i = 0; staging_.empty(); ++i) {
    std::string candidate = stem + ".partial" + std::to_string(i);
    if (fs::create_directory(candidate)) staging_ = std::move(candidate);
  }
} catch (const fs::filesystem_error& e) {
  rethrow(e);
}

StagedDirectory::~StagedDirectory() {
  std::error_code ignored;
  if (!staging_.empty()) fs::remove_all(staging_, ignored);
}

void StagedDirectory::commit() try {
  if (!fs::exists(path_)) {
    fs::rename(staging_, path_);
  } else {
    std::vector<fs::path> stale;
    for (const std::string& name : os::directory_entries(path_)) {
      if (is_weights(name) && !fs::exists(fs::path(staging_) / name)) {
        stale.push_back(fs::path(path_) / name);
      }
    }
    for (const std::string& name : os::directory_entries(staging_)) {
      fs::rename(fs::path(staging_) / name, fs::path(path_) / name);
    }
    for (const fs::path& file : stale) fs::remove(file);
    fs::remove_all(staging_);
  }
  staging_.clear();
  os::sync_directory(fs::path(path_).parent_path().string());
} catch (const fs::filesystem_error& e) {
  rethrow(e);
}

}  // namespace nibble
