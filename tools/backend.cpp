#include "tools/backend.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>

#include "backends/cpu/cpu.h"
#include "backends/cuda/load.h"
#include "engine/error.h"
#include "engine/os.h"
#include "tools/cards.h"
#include "tools/text.h"

namespace nibble {
namespace {

int cpu_threads(const BackendChoice& choice) {
  return choice.threads > 0 ? choice.threads : os::physical_cores();
}

// The number in "cuda:N", 0 for "cuda"; empty for any other name.
std::optional<int> cuda_number(const std::string& name) {
  if (name == "cuda") return 0;
  if (!name.starts_with("cuda:") || name.size() > 8) return std::nullopt;
  const std::string digits = name.substr(5);
  if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  return std::stoi(digits);
}

}  // namespace

void add_backend_flags(CLI::App& command, BackendChoice& choice, const std::string& group) {
  command
      .add_option("--backend,--device", choice.name, "auto | cpu | cuda[:N]; see nibble devices")
      ->group(group)
      ->capture_default_str();
  command
      .add_option("--kernels", choice.kernels,
                  "auto | sm80: only CUDA kernels that run on every supported card")
      ->group(group)
      ->check(CLI::IsMember({"auto", "sm80"}))
      ->capture_default_str();
  command.add_option("--threads,-t", choice.threads, "CPU threads; default: all cores")
      ->group(group);
}

std::unique_ptr<Backend> open_backend(const BackendChoice& choice, std::int64_t memory_limit,
                                      std::int64_t host_memory_limit) {
  const auto cpu = [&] {
    return cpu::make_cpu_backend({.threads = cpu_threads(choice),
                                  .isa = {},
                                  .memory_limit = memory_limit,
                                  .host_memory_limit = host_memory_limit});
  };
  const auto cuda = [&](int device) {
    return cuda::open_cuda({.device = device,
                            .memory_limit = memory_limit,
                            .host_memory_limit = host_memory_limit,
                            .hopper_kernels = choice.kernels != "sm80"});
  };
  if (choice.name == "cpu") return cpu();
  if (choice.name == "auto") return cuda::find_cuda_devices().list.empty() ? cpu() : cuda(0);
  const std::optional<int> number = cuda_number(choice.name);
  if (!number) {
    throw Unsupported("--backend " + choice.name +
                      ": there are cpu, cuda and cuda:N, see nibble devices");
  }
  return cuda(*number);
}

std::unique_ptr<Backend> open_planning_backend(const BackendChoice& choice,
                                               const CardFigures& card) {
  cuda::DeviceDescription device;
  device.name = card.part;
  device.capability = card.capability;
  device.multiprocessors = card.multiprocessors;
  device.memory_bytes = card.memory_bytes;
  return cuda::open_cuda({.hopper_kernels = choice.kernels != "sm80", .planned_for = &device});
}

bool is_cuda(const BackendInfo& info) { return info.name.starts_with("cuda"); }
int device_number(const BackendInfo& info) { return cuda_number(info.name).value_or(0); }

std::string resolve_compute(const std::string& compute, const BackendInfo& info) {
  if (!compute.empty()) return compute;
  return is_cuda(info) ? "bf16" : "f32";
}

DType compute_dtype(const std::string& name) { return name == "bf16" ? DType::BF16 : DType::F32; }

void add_devices_flags(CLI::App& command, DevicesRequest& request) {
  command.add_flag("--json", request.json, "one JSON object");
}

int devices_command(const DevicesRequest& request, std::ostream& out) {
  const auto cpu = open_backend({.name = "cpu"}, 0);
  const cuda::Devices devices = cuda::find_cuda_devices(cuda::FreeMemory::read);
  if (request.json) {
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    rows.push_back({{"backend", "cpu"},
                    {"name", cpu->info().description},
                    {"memory_bytes", os::memory_bytes()}});
    for (const cuda::DeviceDescription& d : devices.list) {
      rows.push_back({{"backend", "cuda:" + std::to_string(d.number)},
                      {"name", d.name},
                      {"compute_capability", format("%d.%d", d.capability / 10, d.capability % 10)},
                      {"multiprocessors", d.multiprocessors},
                      {"memory_bytes", d.memory_bytes},
                      {"free_bytes", d.free_bytes}});
    }
    nlohmann::ordered_json all = {{"devices", rows}};
    if (!devices.unavailable.empty()) all["cuda_unavailable"] = devices.unavailable;
    out << all.dump() << "\n";
    return 0;
  }
  out << format("%-8s %s, %s of memory\n", "cpu", cpu->info().description.c_str(),
                size_text(os::memory_bytes()).c_str());
  for (const cuda::DeviceDescription& d : devices.list) {
    out << format("%-8s %s, compute capability %d.%d, %d multiprocessors, %s of memory, %s free\n",
                  ("cuda:" + std::to_string(d.number)).c_str(), d.name.c_str(), d.capability / 10,
                  d.capability % 10, d.multiprocessors, size_text(d.memory_bytes).c_str(),
                  size_text(d.free_bytes).c_str());
  }
  if (!devices.unavailable.empty()) out << devices.unavailable << "\n";
  return 0;
}

}  // namespace nibble
