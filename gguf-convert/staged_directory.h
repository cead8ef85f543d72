// A directory whose files appear together: they are written to a hidden sibling, and commit()
// moves them into place once the last byte of the last file is on disk. Until then, and when
// anything throws, what was there before stays as it was.
//
// Into a directory that exists already, files are renamed one by one over their older versions;
// nothing else in it is touched but weight shards that the new files do not include.
#pragma once

#include <string>

namespace nibble {

class StagedDirectory {
 public:
  // `marker` is the file that says a directory holds what is about to be written (config.json,
  // adapter_config.json): a directory with files but without it is refused, so that a mistyped
  // destination loses nothing.
  StagedDirectory(const std::string& path, const std::string& marker);
  StagedDirectory(const StagedDirectory&) = delete;
  StagedDirectory& operator=(const StagedDirectory&) = delete;
  ~StagedDirectory();  // without commit(): removes what was written

  // Where to write the file `name` now.
  std::string file(const std::string& name) const { return staging_ + "/" + name; }
  void commit();

 private:
  std::string path_, staging_;
};

}  // namespace nibble
