// y[t] = table[ids[t]], and acc[ids[t]] += dy[t] (engine/ops/embedding.cpp).
//
// Forward: a task is kRows rows, each decoded from whatever the table is stored as. Backward: a
// task is kChannels channels of all rows, so that each sum runs over t in order on one thread
// however often an id repeats.
#include <algorithm>

#include "backends/cpu/decode.h"
#include "backends/cpu/fail.h"
#include "backends/cpu/kernel.h"
#include "backends/cpu/lanes.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

constexpr std::int64_t kRows = 16;
constexpr std::int64_t kChannels = 64;

void check_id(const char* op, std::int64_t t, std::int32_t id, std::int64_t entries) {
  if (id < 0 || id >= entries) {
    fail("%s: ids[%lld] is %lld, wanted 0 to %lld, the rows of the table", op,
         static_cast<long long>(t), static_cast<long long>(id),
         static_cast<long long>(entries - 1));
  }
}

bool supports(const OpCall& call) {
  return is_computable(call.out_types[0].dtype) && can_decode(call.in_types[1].dtype);
}

// One decoded row per thread; rows of F32 and F64 are decoded where they belong.
std::int64_t scratch_bytes(const OpCall& call, int threads) {
  if (call.out_types[0].dtype != DType::BF16) return 0;
  return call.out_types[0].shape[1] * threads * static_cast<std::int64_t>(sizeof(float));
}

void run(const OpCall& call, ThreadPool& pool) {
  const StoredMatrix table = stored_matrix(call.in_types[1], call.input<std::byte>(1));
  const std::int64_t rows = call.out_types[0].shape[0], channels = call.out_types[0].shape[1];
  const auto* ids = call.input<std::int32_t>(0);
  const DType out = call.out_types[0].dtype;
  pool.parallel_for(task_count(rows, kRows), [&](std::int64_t task, int thread) {
    for (std::int64_t t = task * kRows; t < std::min(rows, (task + 1) * kRows); ++t) {
      check_id("embedding", t, ids[t], table.rows);
      const std::int64_t at = t * channels;
      if (out == DType::F64) {
        decode_row(kIsa, table, ids[t], 0, channels, call.output<double>(0) + at);
      } else if (out == DType::F32) {
        decode_row(kIsa, table, ids[t], 0, channels, call.output<float>(0) + at);
      } else {
        float* row = static_cast<float*>(call.scratch) + thread * channels;
        decode_row(kIsa, table, ids[t], 0, channels, row);
        bf16* y = call.output<bf16>(0) + at;
        for_vectors<bf16>(channels, [=](std::int64_t i, auto lanes) {
          store(y + i, load(row + i, lanes), lanes);
        });
      }
    }
  });
}

bool supports_dw(const OpCall& call) { return is_computable(call.in_types[2].dtype); }

void run_dw(const OpCall& call, ThreadPool& pool) {
  const std::int64_t rows = call.in_types[2].shape[0], channels = call.in_types[2].shape[1];
  const std::int64_t entries = call.out_types[0].shape[0];
  const auto* ids = call.input<std::int32_t>(1);
  with_type(call.in_types[2].dtype, [&](auto s) {
    using S = decltype(s);
    pool.parallel_for(task_count(channels, kChannels), [&](std::int64_t task, int) {
      const std::int64_t begin = task * kChannels;
      const std::int64_t count = std::min(kChannels, channels - begin);
      for (std::int64_t t = 0; t < rows; ++t) {
        check_id("embedding_dw", t, ids[t], entries);
        const S* from = call.input<S>(2) + t * channels + begin;
        Arith<S>* to = call.output<Arith<S>>(0) + ids[t] * channels + begin;
        for_vectors<S>(count, [=](std::int64_t i, auto lanes) {
          store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes);
        });
      }
    });
  });
}

}  // namespace

extern const Kernel embedding_kernel{supports, scratch_bytes, run};
extern const Kernel embedding_dw_kernel{supports_dw, nullptr, run_dw};

}  // namespace nibble::cpu::NIBBLE_ISA
