#include "tools/run_directory.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/gguf.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

// First pass over the state: only names and types, which a GGUF header needs before any data.
struct CollectTypes final : StateSink {
  explicit CollectTypes(GgufWriter& writer) : writer(writer) {}
  void write(std::string_view name, const TensorType& type, std::span<const std::byte>) override {
    writer.add(std::string(name), type);
  }
  GgufWriter& writer;
};

struct WriteData final : StateSink {
  explicit WriteData(GgufWriter& writer) : writer(writer) {}
  void write(std::string_view, const TensorType&, std::span<const std::byte> bytes) override {
    writer.write(bytes);
  }
  GgufWriter& writer;
};

struct ReadData final : StateSource {
  explicit ReadData(const GgufFile& file) : file(file) {}
  void read(std::string_view name, const TensorType& type, std::span<std::byte> out) override {
    const GgufTensor* tensor = file.find(name);
    if (tensor == nullptr || !(tensor->type == type)) {
      throw Error(file.path() + ": " +
                  (tensor == nullptr ? "\"" + std::string(name) + "\" is missing"
                                     : "\"" + std::string(name) + "\" is " + tensor->type.str() +
                                           ", the run needs " + type.str()) +
                  "; the checkpoint is of another recipe");
    }
    std::memcpy(out.data(), tensor->bytes.data(), out.size());
  }
  const GgufFile& file;
};

// What a run writes into its directory; nothing else there is ever removed.
constexpr std::array<const char*, 9> kRunFiles = {"config.json", "log.jsonl",    "loss.png",
                                                  "adapter",     "adapter.gguf", "checkpoints",
                                                  "model.gguf",  "model",        "events"};

// The checkpoints of a run, oldest first. Past a million steps the names grow longer.
std::vector<std::string> checkpoint_files(const std::string& directory) {
  std::vector<std::string> files;
  for (const std::string& name : os::directory_entries(directory)) {
    if (name.starts_with("step-") && name.ends_with(".gguf")) {
      files.push_back(directory + "/" + name);
    }
  }
  std::stable_sort(files.begin(), files.end(),
                   [](const std::string& a, const std::string& b) { return a.size() < b.size(); });
  return files;
}

// Removes the temporary files of checkpoints that a kill cut short.
void remove_unfinished(const std::string& directory) {
  std::error_code error;
  for (const std::string& name : os::directory_entries(directory)) {
    if (name.starts_with(".step-")) fs::remove(directory + "/" + name, error);
  }
}

std::string stem(const std::string& path) {
  fs::path p(path.starts_with("random:") ? path.substr(7) : path);
  if (!p.has_filename()) p = p.parent_path();
  std::string name = p.stem().string();
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_') c = '-';
  }
  return name.empty() ? "run" : name;
}

}  // namespace

std::string json_text(const nlohmann::ordered_json& value, int indent) {
  return value.dump(indent, ' ', /*ensure_ascii=*/false,
                    nlohmann::ordered_json::error_handler_t::replace);
}

RunDirectory::RunDirectory(const std::string& path, Open open) : path_(path) {
  std::error_code error;
  if (fs::exists(path_, error) && !fs::is_directory(path_, error)) {
    throw Error(path_ + " is a file; --out needs a directory");
  }
  if (open == Open::overwrite) {
    for (const char* name : kRunFiles) fs::remove_all(fs::path(path_) / name, error);
  }
  if (open == Open::fresh && fs::exists(path_, error) && !fs::is_empty(path_, error)) {
    throw Error(path_ +
                " is not empty: --resume goes on with the run in it, --overwrite replaces "
                "it, or choose another --out");
  }
  fs::create_directories(fs::path(path_) / "checkpoints", error);
  if (error) throw Error(path_ + ": cannot create the run directory: " + error.message());
  if (open == Open::resume) remove_unfinished(file("checkpoints"));
}

std::optional<nlohmann::ordered_json> RunDirectory::config() const {
  if (!fs::exists(file("config.json"))) return std::nullopt;
  try {
    return nlohmann::ordered_json::parse(os::read_file(file("config.json")));
  } catch (const nlohmann::json::exception& e) {
    throw Error(file("config.json") + ": " + e.what());
  }
}

void RunDirectory::write_config(const nlohmann::ordered_json& config) const {
  os::write_file(file("config.json"), json_text(config, 2) + "\n");
}

void RunDirectory::log(const nlohmann::ordered_json& row) const {
  os::append_file(file("log.jsonl"), json_text(row) + "\n");
}

std::vector<nlohmann::ordered_json> RunDirectory::read_log() const {
  std::vector<nlohmann::ordered_json> rows;
  if (!fs::exists(file("log.jsonl"))) return rows;
  const std::string text = os::read_file(file("log.jsonl"));
  for (std::size_t begin = 0; begin < text.size();) {
    std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // a row that a kill cut short
    auto row = nlohmann::ordered_json::parse(text.substr(begin, end - begin), nullptr, false);
    if (!row.is_discarded()) rows.push_back(std::move(row));
    begin = end + 1;
  }
  return rows;
}

void RunDirectory::cut_log(std::int64_t step) const {
  std::string text;
  for (const nlohmann::ordered_json& row : read_log()) {
    if (row.value("step", std::int64_t{0}) <= step) text += json_text(row) + "\n";
  }
  os::write_file(file("log.jsonl"), text);
}

std::string RunDirectory::save_checkpoint(const Trainer& trainer, std::int64_t keep) const {
  char name[64];
  std::snprintf(name, sizeof name, "checkpoints/step-%06lld.gguf",
                static_cast<long long>(trainer.step()));
  const std::string path = file(name);
  GgufWriter writer(path);
  writer.set_string("general.type", "nibble-checkpoint");
  CollectTypes collect(writer);
  trainer.save(collect);
  writer.begin();
  WriteData write(writer);
  trainer.save(write);
  writer.finish();
  std::vector<std::string> files = checkpoint_files(file("checkpoints"));
  std::error_code error;
  while (static_cast<std::int64_t>(files.size()) > keep) {
    fs::remove(files.front(), error);
    files.erase(files.begin());
  }
  return path;
}

std::optional<std::string> RunDirectory::newest_checkpoint() const {
  const std::vector<std::string> files = checkpoint_files(file("checkpoints"));
  if (files.empty()) return std::nullopt;
  return files.back();
}

void load_checkpoint(const std::string& path, Trainer& trainer) {
  const GgufFile file(path);
  ReadData source(file);
  trainer.load(source);
}

bool would_overwrite(const std::string& directory, const std::string& path) {
  std::error_code error;
  const fs::path read = fs::weakly_canonical(path, error);
  for (const char* name : kRunFiles) {
    const fs::path removed = fs::weakly_canonical(fs::path(directory) / name, error);
    const auto [end, at] = std::mismatch(removed.begin(), removed.end(), read.begin(), read.end());
    if (end == removed.end() && fs::exists(removed, error)) return true;
  }
  return false;
}

std::string default_run_directory(const std::string& model, const std::string& data) {
  for (int number = 1;; ++number) {
    char suffix[16];
    std::snprintf(suffix, sizeof suffix, "-%02d", number);
    const std::string path = "runs/" + stem(model) + "-" + stem(data) + suffix;
    if (!fs::exists(path)) return path;
  }
}

}  // namespace nibble
