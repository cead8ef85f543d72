// The main function of test programs that need a GPU: without one they report themselves skipped,
// by name and with the reason, which Meson counts apart (exit status 77).
#pragma once

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "backends/cuda/load.h"

#define NIBBLE_GPU_MAIN(program)                                              \
  int main(int argc, char** argv) {                                           \
    const nibble::cuda::Devices devices = nibble::cuda::find_cuda_devices();  \
    if (devices.list.empty()) {                                               \
      std::printf("skipped: " program ": %s\n", devices.unavailable.c_str()); \
      return 77;                                                              \
    }                                                                         \
    std::printf(program " on %s\n", devices.list.front().name.c_str());       \
    return doctest::Context(argc, argv).run();                                \
  }
