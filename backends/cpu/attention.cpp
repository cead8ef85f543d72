// o = softmax(scale q k^T) v within documents, and lse (engine/ops/attention.cpp).
//
// A task is kTile consecutive queries of one head; its keys run from the first that any of them
// sees to the last query itself, so the work follows the documents' lengths. Late tiles of a long
// document have the most keys and are handed out first.
#include "backends/cpu/attention_tile.h"
#include "backends/cpu/kernel.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

bool supports(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

template <class T>
AttendScratch<T> thread_scratch(Scratch& scratch, const OpCall& call) {
  return {scratch, call.node->get<AttentionParams>().head_dim, kTile, call.in_types[0].shape[0]};
}

// Per thread: T rows x 64 lanes of scores, and 192 rows of a head.
std::int64_t scratch_bytes(const OpCall& call, int threads) {
  Scratch scratch;
  with_type(call.out_types[0].dtype,
            [&](auto s) { thread_scratch<Arith<decltype(s)>>(scratch, call); });
  return scratch.used() * threads;
}

template <class S>
void run_typed(const OpCall& call, ThreadPool& pool, std::int64_t bytes_per_thread) {
  using T = Arith<S>;
  const auto params = call.node->get<AttentionParams>();
  const std::int64_t d = params.head_dim, rows = call.in_types[0].shape[0];
  const std::int64_t stride = call.in_types[0].shape[1], kv_stride = call.in_types[1].shape[1];
  const std::int64_t heads = stride / d, group = heads / (kv_stride / d);
  const auto* span_begin = call.input<std::int32_t>(3);
  check_spans("attention", span_begin, rows);
  const std::int64_t tiles = task_count(rows, kTile);
  pool.parallel_for(tiles * heads, [&](std::int64_t task, int thread) {
    const std::int64_t tile = tiles - 1 - task / heads, head = task % heads;
    Queries<S> queries;
    for (std::int64_t t = tile * kTile; t < std::min(rows, (tile + 1) * kTile); ++t) {
      queries.add(call.input<S>(0) + t * stride + head * d,
                  call.output<S>(0) + t * stride + head * d, call.output<T>(1) + t * heads + head,
                  span_begin[t], t);
    }
    const std::int64_t kv = head / group * d;
    Scratch scratch(static_cast<std::byte*>(call.scratch) + thread * bytes_per_thread);
    attend<S>(queries, {call.input<S>(1) + kv, call.input<S>(2) + kv, kv_stride}, d,
              {params.scale, params.soft_cap}, kTile, thread_scratch<T>(scratch, call));
  });
}

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype,
            [&](auto s) { run_typed<decltype(s)>(call, pool, scratch_bytes(call, 1)); });
}

}  // namespace

extern const Kernel attention_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cpu::NIBBLE_ISA
