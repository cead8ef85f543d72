// A run on disk: DIR/config.json, DIR/log.jsonl, DIR/checkpoints/step-NNNNNN.gguf, and what the run
// leaves at its end. Checkpoints appear by rename; log.jsonl is cut back to the checkpoint that a
// run resumes from, so that a run killed at any moment reads like one that was not.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "engine/trainer.h"

namespace nibble {

// `value` on one line, or indented; bytes that are no UTF-8, as file names may have, become U+FFFD.
std::string json_text(const nlohmann::ordered_json& value, int indent = -1);

class RunDirectory {
 public:
  enum class Open { fresh, overwrite, resume };
  // Creates or opens `path`. Throws Error when it holds files and `open` is fresh; with overwrite
  // removes a previous run's files, and only those.
  RunDirectory(const std::string& path, Open open);

  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

  std::optional<nlohmann::ordered_json> config() const;  // of the run that is there
  void write_config(const nlohmann::ordered_json& config) const;

  void log(const nlohmann::ordered_json& row) const;
  std::vector<nlohmann::ordered_json> read_log() const;
  // Drops rows of later steps, a "config" row aside.
  void cut_log(std::int64_t step) const;

  // Saves the trainer's state and removes all but the newest `keep` checkpoints.
  std::string save_checkpoint(const Trainer& trainer, std::int64_t keep) const;
  std::optional<std::string> newest_checkpoint() const;

 private:
  std::string path_;
};

// Restores what save_checkpoint() wrote. Throws FormatError or Error naming the file.
void load_checkpoint(const std::string& file, Trainer& trainer);

// Whether overwriting `directory` would delete `path` or what holds it.
bool would_overwrite(const std::string& directory, const std::string& path);

// runs/MODEL-DATA-NN, the first that does not exist.
std::string default_run_directory(const std::string& model, const std::string& data);

}  // namespace nibble
