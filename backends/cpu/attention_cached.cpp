// Appending to the key-value cache, and attention over it (engine/ops/attention_cached.cpp).
//
// The lanes of a tile are (row, query head of the group) pairs of one key-value head: generating
// one token with grouped heads fills several lanes, a chunk of the prompt all of them. Few pairs
// take a tile one vector wide; the bits are the same (attention_tile.h).
#include <cstring>

#include "backends/cpu/attention_tile.h"
#include "backends/cpu/fail.h"
#include "backends/cpu/kernel.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

std::int64_t read_position(const char* op, const std::int32_t* position, std::int64_t rows,
                           std::int64_t context) {
  if (*position < 0 || *position > context - rows) {
    fail("%s: position is %lld for %lld rows, and the cache has a context of %lld", op,
         static_cast<long long>(*position), static_cast<long long>(rows),
         static_cast<long long>(context));
  }
  return *position;
}

bool supports_append(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

void run_append(const OpCall& call, ThreadPool&) {
  const Shape cache = call.out_types[0].shape;
  const std::int64_t rows = call.in_types[1].shape[0], heads = cache[0];
  const std::int64_t position =
      read_position("kv_append", call.input<std::int32_t>(2), rows, cache[1]);
  const std::int64_t bytes = cache[2] * info(call.out_types[0].dtype).block_bytes;
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t t = 0; t < rows; ++t) {
      std::memcpy(call.output<std::byte>(0) + (head * cache[1] + position + t) * bytes,
                  call.input<std::byte>(1) + (t * heads + head) * bytes,
                  static_cast<std::size_t>(bytes));
    }
  }
}

bool supports(const OpCall& call) { return is_computable(call.out_types[0].dtype); }

struct Plan {
  explicit Plan(const OpCall& call)
      : d(call.node->get<AttentionParams>().head_dim),
        rows(call.in_types[0].shape[0]),
        heads(call.in_types[0].shape[1] / d),
        kv_heads(call.in_types[1].shape[0]),
        context(call.in_types[1].shape[1]),
        group(heads / kv_heads) {}
  template <class T>
  std::int64_t width() const {
    return rows * group <= Simd<T>::lanes ? Simd<T>::lanes : kTile;
  }
  std::int64_t d, rows, heads, kv_heads, context, group;
};

template <class T>
AttendScratch<T> thread_scratch(Scratch& scratch, const Plan& plan) {
  return {scratch, plan.d, plan.width<T>(), plan.context};
}

// Per thread: the context x the lanes of scores (64, or one vector), and 192 rows of a head.
std::int64_t scratch_bytes(const OpCall& call, int threads) {
  Scratch scratch;
  with_type(call.out_types[0].dtype,
            [&](auto s) { thread_scratch<Arith<decltype(s)>>(scratch, Plan(call)); });
  return scratch.used() * threads;
}

template <class S>
void run_typed(const OpCall& call, ThreadPool& pool, std::int64_t bytes_per_thread) {
  using T = Arith<S>;
  const Plan plan(call);
  const std::int64_t d = plan.d, width = plan.width<T>(), pairs = plan.rows * plan.group;
  const std::int64_t position =
      read_position("attention_cached", call.input<std::int32_t>(3), plan.rows, plan.context);
  const std::int64_t tiles = task_count(pairs, width);
  const auto params = call.node->get<AttentionParams>();
  pool.parallel_for(tiles * plan.kv_heads, [&](std::int64_t task, int thread) {
    const std::int64_t tile = tiles - 1 - task / plan.kv_heads, kv_head = task % plan.kv_heads;
    Queries<S> queries;
    for (std::int64_t pair = tile * width; pair < std::min(pairs, (tile + 1) * width); ++pair) {
      const std::int64_t t = pair / plan.group;
      const std::int64_t head = kv_head * plan.group + pair % plan.group;
      const std::int64_t at = (t * plan.heads + head) * d;
      queries.add(call.input<S>(0) + at, call.output<S>(0) + at, nullptr, 0, position + t);
    }
    const std::int64_t kv = kv_head * plan.context * d;
    Scratch scratch(static_cast<std::byte*>(call.scratch) + thread * bytes_per_thread);
    attend<S>(queries, {call.input<S>(1) + kv, call.input<S>(2) + kv, d}, d,
              {params.scale, params.soft_cap}, width, thread_scratch<T>(scratch, plan));
  });
}

void run(const OpCall& call, ThreadPool& pool) {
  with_type(call.out_types[0].dtype,
            [&](auto s) { run_typed<decltype(s)>(call, pool, scratch_bytes(call, 1)); });
}

}  // namespace

extern const Kernel kv_append_kernel{supports_append, nullptr, run_append};
extern const Kernel attention_cached_kernel{supports, scratch_bytes, run};

}  // namespace nibble::cpu::NIBBLE_ISA
