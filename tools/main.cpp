// The program `nibble`: one sub-command each, their flags declared where the command lives. Exit
// codes: 0 done, 1 it failed, 2 wrong usage, 130 interrupted.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <iostream>
#include <new>

#include "engine/error.h"
#include "engine/os.h"
#include "gguf-convert/suggest.h"
#include "tools/backend.h"
#include "tools/bench.h"
#include "tools/finetune.h"
#include "tools/inspect.h"
#include "tools/sampling.h"
#include "tools/tokens.h"

#ifndef NIBBLE_VERSION
#define NIBBLE_VERSION "unknown"
#endif

namespace {

using namespace nibble;

// The sub-command that the command line names, also by another name; nullptr: none.
const CLI::App* command_of(const CLI::App& app, int argc, char** argv) {
  for (const CLI::App* sub : app.get_subcommands({})) {
    if (argc > 1 && sub->check_name(argv[1])) return sub;
  }
  return nullptr;
}

// The known word nearest to the first unknown flag or command on the command line.
std::string suggestion(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> commands, flags;
  for (const CLI::App* sub : app.get_subcommands({})) commands.push_back(sub->get_name());
  const CLI::App* named = command_of(app, argc, argv);
  const CLI::App* command = named != nullptr ? named : &app;
  for (const CLI::Option* option : command->get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  if (command == &app && argc > 1 && argv[1][0] != '-') {
    return "; did you mean nibble " + nearest(argv[1], commands) + "?";
  }
  for (int i = 1; i < argc; ++i) {
    const std::string flag = std::string(argv[i]).substr(0, std::string(argv[i]).find('='));
    if (flag.size() < 3 || flag.compare(0, 2, "--") != 0) continue;
    if (std::find(flags.begin(), flags.end(), flag) == flags.end()) {
      return "; did you mean " + nearest(flag, flags) + "?";
    }
  }
  return command == &app ? "; see nibble --help"
                         : "; see nibble " + command->get_name() + " --help";
}

// The option that a word of the command line names, if it does.
const CLI::Option* option_of(const CLI::App& command, const std::string& word) {
  if (!word.starts_with("-")) return nullptr;
  const std::string name = word.substr(0, word.find('='));
  for (const CLI::Option* option : command.get_options()) {
    if (option->check_name(name)) return option;
  }
  return nullptr;
}

// Flags of a configuration without those that the user gives as well: the user's win, and lists
// would grow otherwise.
std::vector<std::string> without(const std::vector<std::string>& flags,
                                 const std::vector<std::string>& own, const CLI::App& command) {
  std::vector<std::string> kept;
  bool keeps = true;
  for (const std::string& word : flags) {
    if (const CLI::Option* option = option_of(command, word)) {
      keeps = std::none_of(own.begin(), own.end(), [&](const std::string& given) {
        return option_of(command, given) == option;
      });
    }
    if (keeps) kept.push_back(word);
  }
  return kept;
}

// The command line with the flags of --config FILE put in front of the user's own. In reverse
// order, as CLI11 takes it.
std::vector<std::string> arguments(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  const CLI::App* command = command_of(app, argc, argv);
  for (std::size_t i = 1; command != nullptr && i < words.size(); ++i) {
    std::string path;
    if (words[i] == "--config" && i + 1 < words.size()) path = words[i + 1];
    if (words[i].starts_with("--config=")) path = words[i].substr(9);
    if (path.empty()) continue;
    const std::vector<std::string> flags = without(config_flags(path), words, *command);
    words.insert(words.begin() + 1, flags.begin(), flags.end());
    break;
  }
  std::reverse(words.begin(), words.end());
  return words;
}

int run_command(int argc, char** argv) {
  CLI::App app("Nibble finetunes large language models in 4 bits (QLoRA).", "nibble");
  app.set_version_flag("--version", std::string("nibble ") + NIBBLE_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(44);
  std::function<int()> run;
  const auto command = [&](const char* name, const char* help, auto& request, auto add, auto call) {
    CLI::App* sub = app.add_subcommand(name, help);
    sub->option_defaults()->take_last();  // a flag given again replaces the first
    add(*sub, request);
    sub->callback([&run, &request, call] { run = [&request, call] { return call(request); }; });
  };
  Recipe finetune_recipe, fit_recipe;
  SamplingRequest generate_request, chat_request;
  InspectRequest inspect_request;
  TokensRequest tokens_request;
  BenchRequest bench_request;
  DevicesRequest devices_request;
  command(
      "finetune", "Finetune a model on rows of data", finetune_recipe,
      [](CLI::App& sub, Recipe& r) { add_recipe_flags(sub, r); },
      [](const Recipe& r) { return finetune(r, std::cout, std::cerr); });
  command("fit", "Say what a finetune with the same flags will use", fit_recipe, add_fit_flags,
          [](const Recipe& r) { return fit(r, std::cout, std::cerr); });
  command("generate", "Continue a prompt", generate_request, add_generate_flags,
          [](const SamplingRequest& r) { return generate_command(r, std::cout, std::cerr); });
  command("chat", "Talk to a chat model", chat_request, add_chat_flags,
          [](const SamplingRequest& r) { return chat_command(r, std::cin, std::cout, std::cerr); });
  command("tokens", "Show what the trainer will see, or the tokens of a text", tokens_request,
          add_tokens_flags,
          [](const TokensRequest& r) { return tokens_command(r, std::cout, std::cerr); });
  command("inspect", "Show what a model or adapter file holds", inspect_request, add_inspect_flags,
          [](const InspectRequest& r) { return inspect_command(r, std::cout, std::cerr); });
  command("bench", "Measure ops, training steps or decoding", bench_request, add_bench_flags,
          [](const BenchRequest& r) { return bench_command(r, std::cout, std::cerr); });
  command("devices", "List what --backend can name", devices_request, add_devices_flags,
          [](const DevicesRequest& r) { return devices_command(r, std::cout); });
  try {
    app.parse(arguments(app, argc, argv));
  } catch (const Error& e) {
    std::cerr << "nibble: " << e.what() << "\n";
    return 2;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);
    std::cerr << "nibble: " << e.what() << suggestion(app, argc, argv) << "\n";
    return 2;
  }
  os::catch_interrupt();
  return run();
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run_command(argc, argv);
  } catch (const std::bad_alloc&) {
    std::cerr
        << "nibble: the host's memory ran out; what was saved is intact. Close other programs, "
           "raise the limit (ulimit -v, the container's memory), or use fewer --threads\n";
  } catch (const std::exception& e) {
    std::cerr << "nibble: " << e.what() << "\n";
  }
  return 1;
}
