// The registry checks on the CPU backend: three test cases per op, made from engine/ops.def.
//
// Each instruction set that this machine has is a family of its own, with 1, 2 and 3 threads. The
// families need not agree with each other to the bit, only with the reference. As the kernel checks
// run they print a table of the largest error of each op, as a share of the tolerance.
#include <doctest/doctest.h>

#include <cstdio>

#include "backends/cpu/cpu.h"
#include "engine/runtime.h"
#include "tests/registry/guarded_run.h"
#include "tests/registry/registry.h"

using namespace nibble;
using namespace nibble::registry;

namespace {

const std::vector<Family>& cpu_families() {
  static const std::vector<Family> families = [] {
    std::vector<Family> all;
    for (const cpu::Isa isa : {cpu::Isa::Portable, cpu::Isa::Avx2, cpu::Isa::Avx512}) {
      if (!cpu::is_supported(isa)) continue;
      Family family;
      for (const int threads : {1, 2, 3}) {
        cpu::CpuOptions options;
        options.threads = threads;
        options.isa = isa;
        family.push_back({"cpu " + std::string(cpu::name(isa)) + ", " + std::to_string(threads) +
                              (threads == 1 ? " thread" : " threads"),
                          cpu::make_cpu_backend(options)});
      }
      all.push_back(std::move(family));
    }
    return all;
  }();
  return families;
}

Backend& one_thread() { return *cpu_families().back().front().backend; }

void report(const Problems& problems) {
  for (const std::string& problem : problems) FAIL_CHECK(problem);
}

void kernels(OpId op) {
  WorstRatios worst;
  report(check_kernels(op, cpu_families(), worst));
  std::printf("  %-24s largest error / tolerance:", std::string(op_def(op).name).c_str());
  for (const DType compute : kComputes) {
    CHECK(worst.contains(compute));
    std::printf("  %s %.3f", std::string(name(compute)).c_str(), worst[compute]);
  }
  std::printf("\n");
}

void gradients(OpId op) {
  int checked = 0;
  report(check_gradients(op, one_thread(), checked));
}

}  // namespace

#define NIBBLE_OP(name) \
  TEST_CASE("shape rule: " #name) { report(check_shape_rule(OpId::name)); }
#include "engine/ops.def"
#undef NIBBLE_OP

#define NIBBLE_OP(name) \
  TEST_CASE("gradient: " #name) { gradients(OpId::name); }
#include "engine/ops.def"
#undef NIBBLE_OP

#define NIBBLE_OP(name) \
  TEST_CASE("kernel: " #name) { kernels(OpId::name); }
#include "engine/ops.def"
#undef NIBBLE_OP
