// page_in and page_out (engine/ops/page.cpp), slice_rows (engine/ops/rows.cpp): copies.
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

void run_slice(const OpCall& call, ThreadPool& pool) {
  const auto p = call.node->get<RowsParams>();
  const std::int64_t size = bytes(call.out_types[0]);
  const std::int64_t skipped = p.count == 0 ? 0 : size / p.count * p.first;
  copy(call.out[0], call.input<std::byte>(0) + skipped, size, pool);
}

}  // namespace

extern const Kernel page_in_kernel{supports, nullptr, run_in};
extern const Kernel page_out_kernel{supports, nullptr, run_out};
extern const Kernel slice_rows_kernel{supports, nullptr, run_slice};

}  // namespace nibble::cpu::NIBBLE_ISA
