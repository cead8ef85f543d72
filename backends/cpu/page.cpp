// page_in and page_out: copies (engine/ops/page.cpp).
#include <cstring>

#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kPiece = 1 << 20;  // bytes of a task

bool supports(const OpCall&) { return true; }

void copy(void* to, const void* from, std::int64_t count, ThreadPool& pool) {
  pool.parallel_for(task_count(count, kPiece), [&](std::int64_t piece, int) {
    const std::int64_t at = piece * kPiece;
    std::memcpy(static_cast<std::byte*>(to) + at, static_cast<const std::byte*>(from) + at,
                static_cast<std::size_t>(task_size(piece, count, kPiece)));
  });
}

void run_in(const OpCall& call, ThreadPool& pool) {
  copy(call.out[0], call.in[0], bytes(call.out_types[0]), pool);
}
void run_out(const OpCall& call, ThreadPool& pool) {
  copy(call.out[0], call.in[1], bytes(call.out_types[0]), pool);
}

}  // namespace

extern const Kernel page_in_kernel{supports, nullptr, run_in};
extern const Kernel page_out_kernel{supports, nullptr, run_out};

}  // namespace nibble::cpu::NIBBLE_ISA
