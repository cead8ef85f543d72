// The program gguf-convert: options in, convert() called, exit codes out (0 done, 1 failed, 2 wrong
// usage, 130 interrupted).
#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <iostream>

#include "engine/os.h"
#include "gguf-convert/convert.h"
#include "gguf-convert/suggest.h"

namespace {

using nibble::ConvertRequest;

struct Arguments {
  ConvertRequest request;
  std::string type, head, no_quant;
  bool no_double_quant = false;
  int threads = 0;
};

void declare(CLI::App& app, Arguments& a) {
  app.add_option("SRC", a.request.source,
                 "Hugging Face directory, .gguf file, random:CONFIG.json, or an adapter")
      ->required();
  app.add_option("DST", a.request.destination,
                 "a name ending in .gguf, otherwise a Hugging Face or PEFT directory")
      ->required();
  app.add_option("--type", a.type,
                 "nf4, f32, f16, bf16 or q8_0 [nf4 for .gguf, bf16 for a directory]");
  app.add_option("--block", a.request.options.quant.block,
                 "elements that share a scale in NF4: 32, 64, ... 4096")
      ->capture_default_str();
  app.add_flag("--no-double-quant", a.no_double_quant, "keep the scales of NF4 in F32");
  app.add_option(
      "--no-quant", a.no_quant,
      "regular expression: matrices, by GGUF or Hugging Face name, to leave as they are");
  app.add_option("--head", a.head, "type of the matrix that makes the logits");
  app.add_option("--adapter", a.request.adapter, "merge this LoRA adapter");
  app.add_option("--base", a.request.base,
                 "what an adapter was trained on: directory, .gguf or config.json");
  app.add_option("--threads,-t", a.threads, "threads [all cores]")->check(CLI::Range(1, 1024));
  app.add_flag("--verify", a.request.verify, "read the result back and print its errors");
  app.add_flag("--dry-run", a.request.dry_run, "print what would be written");
  app.add_flag("--json", a.request.json, "one JSON object on standard output");
}

// "; did you mean --type?" for the first flag on the command line that does not exist.
std::string suggestion(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> known;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  }
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    flag = flag.substr(0, flag.find('='));
    const bool is_flag = flag.size() > 2 && flag.compare(0, 2, "--") == 0;
    if (!is_flag || std::find(known.begin(), known.end(), flag) != known.end()) continue;
    return "; did you mean " + nibble::nearest(flag, known) + "?";
  }
  return "; see gguf-convert --help";
}

ConvertRequest resolve(Arguments& a) {
  nibble::ConvertOptions& options = a.request.options;
  const bool gguf = std::filesystem::path(a.request.destination).extension() == ".gguf";
  options.container = gguf ? nibble::Container::gguf : nibble::Container::huggingface;
  options.type = nibble::output_type(a.type.empty() ? (gguf ? "nf4" : "bf16") : a.type);
  options.quant.double_quant = !a.no_double_quant;
  if (!a.head.empty()) options.head = nibble::output_type(a.head);
  if (!a.no_quant.empty()) options.no_quant = nibble::name_pattern(a.no_quant);
  const std::int32_t block = options.quant.block;
  if (block < 32 || block > 4096 || (block & (block - 1)) != 0) {
    throw nibble::UsageError("--block " + std::to_string(block) +
                             " is not a power of two from 32 to 4096");
  }
  a.request.threads = a.threads > 0 ? a.threads : nibble::os::physical_cores();
  a.request.terminal = nibble::os::is_terminal(2);
  return a.request;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Converts models and LoRA adapters between Hugging Face directories and GGUF files.",
               "gguf-convert");
  Arguments arguments;
  declare(app, arguments);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);
    std::cerr << "gguf-convert: " << e.what() << suggestion(app, argc, argv) << "\n";
    return 2;
  }
  nibble::os::catch_interrupt();
  try {
    return nibble::convert(resolve(arguments), std::cout, std::cerr);
  } catch (const nibble::UsageError& e) {
    std::cerr << "gguf-convert: " << e.what() << "\n";
    return 2;
  } catch (const std::bad_alloc&) {
    std::cerr << "gguf-convert: the host's memory ran out and nothing was written; close other "
                 "programs, raise the limit (ulimit -v, the container's memory), or use fewer "
                 "--threads\n";
    return 1;
  } catch (const std::exception& e) {
    std::cerr << "gguf-convert: " << e.what() << "\n";
    return 1;
  }
}
