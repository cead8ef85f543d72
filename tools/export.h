// What a run leaves behind: adapters as PEFT and GGUF, trained weights as a GGUF model.
#pragma once

#include <string>
#include <vector>

#include "gguf-convert/adapter.h"
#include "tools/finetune_setup.h"

namespace nibble {

// The trainer's adapter, in the row order of the loaded base.
AdapterFile trained_adapter(const FinetuneSetup& setup);

// Makes an adapter the trainer's parameters. Throws Error when a parameter is missing in it.
void set_adapter(Trainer& trainer, const AdapterFile& adapter);

// DIR/adapter (PEFT) and DIR/adapter.gguf, or DIR/model.gguf in F32. Return the paths.
std::vector<std::string> export_adapter(const FinetuneSetup& setup, const std::string& directory);
std::vector<std::string> export_model(const FinetuneSetup& setup, const std::string& directory);

}  // namespace nibble
