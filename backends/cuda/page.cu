// page_in and page_out: copies by the card's copy engines (engine/ops/page.cpp). The executable
// runs them on streams of their own.
#include "backends/cuda/kernel.h"

namespace nibble::cuda {
namespace {

bool supports(const OpCall&) { return true; }

void copy(const char* what, void* to, const void* from, const OpCall& call, const Launch& launch) {
  const auto count = static_cast<std::size_t>(bytes(call.out_types[0]));
  if (count == 0) return;
  check(cudaMemcpyAsync(to, from, count, cudaMemcpyDefault, launch.stream), what);
}

void run_in(const OpCall& call, const Launch& launch) {
  copy("page_in", call.out[0], call.in[0], call, launch);
}
void run_out(const OpCall& call, const Launch& launch) {
  copy("page_out", call.out[0], call.in[1], call, launch);
}

}  // namespace

extern const Kernel page_in_kernel{supports, nullptr, run_in};
extern const Kernel page_out_kernel{supports, nullptr, run_out};

}  // namespace nibble::cuda
