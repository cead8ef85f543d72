// The paged optimizer on any backend: wherever its arrays lie, the same bytes come out, and what
// fit() predicts is what is allocated on both sides.
#pragma once

#include "engine/error.h"
#include "engine/ops.h"
#include "tests/golden/llama_golden.h"
#include "tests/unit/memory_state.h"

namespace nibble::golden {

using test::MemoryState;

inline MemoryState saved(const Setup& s) {
  MemoryState state;
  s.trainer->save(state);
  return state;
}

inline void train(const Golden& golden, Setup& s, int first, int end) {
  for (int step = first; step < end; ++step) {
    s.trainer->micro(golden.batch(step));
    s.trainer->apply(1e-2);
  }
}

// Block inputs that wait on the host change no bit, on any rung.
inline void check_offload(const std::function<std::unique_ptr<Backend>()>& make_backend,
                          std::initializer_list<DType> computes) {
  const Golden golden("tied");
  for (const DType compute : computes) {
    for (const Method method : {Method::full, Method::lora}) {
      CAPTURE(name(compute));
      std::map<std::string, std::vector<std::byte>, std::less<>> wanted;
      for (const char* text :
           {"store", "store,offload:inputs", "cheap,offload:attention",
            "block:1+cheap,offload:gate", "block,offload:inputs", "block,offload:gate",
            "block,offload:inputs+gate", "attention,offload:inputs+gate:1", "block,offload:up",
            "cheap,offload:inputs+gate+up:1", "attention,offload:gate:1",
            "block,offload:inputs:1"}) {
        CAPTURE(text);
        Setup s(golden, method, compute, StoragePolicy::parse(text).value(), make_backend());
        const FitReport fit = s.trainer->fit();
        CHECK(fit.total_bytes() + s.loaded->weight_bytes() == s.backend->allocated_bytes());
        CHECK(fit.pinned_bytes() == s.backend->host_allocated_bytes());
        CHECK((fit.pinned_bytes() > 0) == (std::string_view(text) != "store"));
        train(golden, s, 0, 4);
        if (wanted.empty()) wanted = saved(s).tensors;
        CHECK(saved(s).tensors == wanted);
      }
    }
  }
}

// An MLP that works on some rows at a time changes no bit, on any rung, with dropout and without.
inline void check_mlp_rows(const std::function<std::unique_ptr<Backend>()>& make_backend,
                           std::initializer_list<DType> computes) {
  constexpr std::int64_t kLong = 1100;  // parts of 512 and 588
  const Golden golden("tied");
  for (const DType compute : computes) {
    for (const auto& [method, dropout] :
         {std::pair{Method::full, 0.0}, {Method::lora, 0.0}, {Method::qlora, 0.25}}) {
      CAPTURE(name(compute));
      CAPTURE(dropout);
      std::map<std::string, std::vector<std::byte>, std::less<>> wanted;
      std::vector<float> losses;
      for (const char* text :
           {"block", "block,mlp:512", "store,mlp:512", "cheap,offload:inputs,mlp:512",
            "block:1+attention,offload:gate,stream:1,mlp:512"}) {
        CAPTURE(text);
        if (method == Method::full && std::string_view(text).find("stream") != std::string::npos) {
          continue;
        }
        Setup s(golden, method, compute, StoragePolicy::parse(text).value(), make_backend(), 0,
                Optimizer::adamw, kLong, dropout);
        s.trainer->micro(golden.long_batch(0, kLong));
        s.trainer->apply(1e-2);
        const std::vector<float> scored = s.trainer->evaluate(golden.long_batch(3, kLong));
        if (wanted.empty()) {
          wanted = saved(s).tensors;
          losses = scored;
        }
        CHECK(saved(s).tensors == wanted);
        CHECK(scored == losses);
      }
    }
  }
}

// Weights that come from the host for each use change no bit: trained, scored and decoded.
inline void check_streaming(const std::function<std::unique_ptr<Backend>()>& make_backend,
                            std::initializer_list<DType> computes) {
  const Golden golden("untied");
  for (const DType compute : computes) {
    CAPTURE(name(compute));
    std::map<std::string, std::vector<std::byte>, std::less<>> wanted;
    std::vector<float> losses, logits;
    std::int64_t device_bytes = 0;
    for (const char* text : {"store", "store,stream:1", "block,stream:2", "attention,stream:1",
                             "block:1+attention,offload:inputs,stream:2"}) {
      CAPTURE(text);
      Setup s(golden, Method::qlora, compute, StoragePolicy::parse(text).value(), make_backend());
      CHECK(s.fit.total_bytes() + s.loaded->weight_bytes() == s.backend->allocated_bytes());
      CHECK(s.fit.pinned_bytes() + s.loaded->streamed_bytes() == s.backend->host_allocated_bytes());
      CHECK((s.loaded->streamed_bytes() > 0) == (std::string_view(text) != "store"));
      train(golden, s, 0, 4);
      const std::vector<float> scored = s.trainer->evaluate(golden.batch(0));
      const std::vector<float> decoded = s.decoder->append({&golden.batch(0).tokens[0], 3});
      if (wanted.empty()) {
        wanted = saved(s).tensors;
        losses = scored;
        logits = decoded;
        device_bytes = s.loaded->weight_bytes();
      }
      CHECK(saved(s).tensors == wanted);
      CHECK(scored == losses);
      CHECK(decoded == logits);
      CHECK(s.loaded->weight_bytes() + s.loaded->streamed_bytes() >= device_bytes);
    }
  }
}

inline void check_paging(const std::function<std::unique_ptr<Backend>()>& make_backend,
                         std::initializer_list<DType> computes, Optimizer optimizer) {
  const Golden golden("tied");
  for (const DType compute : computes) {
    for (const Method method : {Method::full, Method::lora}) {
      CAPTURE(name(compute));
      const auto set_up = [&](std::int64_t paged) {
        return Setup(golden, method, compute, {Rung::store}, make_backend(), paged, optimizer);
      };
      Setup resident = set_up(0);
      const std::int64_t all = resident.trainer->parameters().elements();
      train(golden, resident, 0, 3);
      const MemoryState half_way = saved(resident);
      train(golden, resident, 3, 6);
      const MemoryState wanted = saved(resident);
      for (const std::int64_t paged : {std::int64_t{1}, all / 3, all}) {
        CAPTURE(paged);
        Setup s = set_up(paged);
        CHECK(s.trainer->paged_elements() >= paged);
        CHECK(s.trainer->paged_elements() < paged + kParameterBlock);
        const FitReport fit = s.trainer->fit();
        CHECK(fit.total_bytes() + s.loaded->weight_bytes() == s.backend->allocated_bytes());
        CHECK(fit.pinned_bytes() == s.backend->host_allocated_bytes());
        CHECK(fit.pinned_bytes() == s.trainer->paged_bytes());
        train(golden, s, 0, 6);
        CHECK(saved(s).tensors == wanted.tensors);
        // Resuming under another cap goes on bit for bit; checkpoints hold F32.
        if (compute == DType::F64) continue;
        Setup resumed = set_up(paged);
        MemoryState state = half_way;
        resumed.trainer->load(state);
        train(golden, resumed, 3, 6);
        CHECK(saved(resumed).tensors == wanted.tensors);
      }
    }
  }
}

// A segment of three blocks of which the last, or the last two, are on the host: trained, saved
// half way and gone on with under another split.
inline void check_split_segment(const std::function<std::unique_ptr<Backend>()>& make_backend,
                                std::initializer_list<DType> computes, Optimizer optimizer) {
  constexpr std::int64_t kVocabulary = 40, kChannels = 256, kTokens = 16;
  Microbatch batch;
  for (std::int32_t i = 0; i < kTokens; ++i) {
    batch.tokens.push_back(i * 7 % kVocabulary);
    batch.positions.push_back(i);
    batch.labels.push_back((i + 1) * 7 % kVocabulary);
    batch.span_begin.push_back(0);
    batch.ordinal.push_back(i);
  }
  std::vector<float> initial;
  for (int i = 0; i < kVocabulary * kChannels; ++i) {
    initial.push_back(static_cast<float>(i * 37 % 101 - 50) / 100);
  }
  for (const DType compute : computes) {
    std::optional<MemoryState> half_way, wanted;
    for (const std::int64_t paged : {0, 1, 2}) {
      CAPTURE(name(compute));
      CAPTURE(paged);
      const auto backend = make_backend();
      TrainerOptions options;
      options.compute = compute;
      options.optimizer = optimizer;
      options.buckets = {kTokens};
      options.paged_elements = paged * kParameterBlock;
      ParameterTable table;
      table.add("w", kVocabulary, kChannels, 1, 0.01f);
      const auto build = [&](Graph& g, const LossInputs& in) {
        const Tensor w = g.parameter("w", {compute, {kVocabulary, kChannels}, {}});
        return linear_cross_entropy(embedding(in.tokens, w), w, in.labels, in.loss_rows,
                                    in.training);
      };
      Trainer trainer(*backend, table, build, options);
      trainer.allocate();
      const auto steps = [&](int count) {
        for (int i = 0; i < count; ++i) {
          trainer.micro(batch);
          trainer.apply(1e-2);
        }
        MemoryState state;
        trainer.save(state);
        return state;
      };
      trainer.set_parameter("w", initial);
      CHECK(trainer.parameter("w") == initial);
      const MemoryState early = steps(2);
      if (!half_way) half_way = early;
      CHECK(early.tensors == half_way->tensors);
      steps(1);
      trainer.load(*half_way);
      const MemoryState late = steps(2);
      if (!wanted) wanted = late;
      CHECK(late.tensors == wanted->tensors);
      CHECK(late.tensors != early.tensors);
    }
  }
}

// Moments in 8 bits, in a trainer: what they take, that they train like moments in F32, and that
// neither kind of checkpoint is taken for the other.
inline void check_small_moments(const std::function<std::unique_ptr<Backend>()>& make_backend,
                                std::initializer_list<DType> computes) {
  const Golden golden("tied");
  const auto line = [](const Setup& s, std::string_view name) {
    for (const FitReport::Line& l : s.trainer->fit().device) {
      if (l.name == name) return l.bytes;
    }
    return std::int64_t{-1};
  };
  for (const DType compute : computes) {
    for (const Method method : {Method::full, Method::lora}) {
      CAPTURE(name(compute));
      Setup plain(golden, method, compute, {Rung::store}, make_backend());
      Setup small(golden, method, compute, {Rung::store}, make_backend(), 0, Optimizer::adamw8bit);
      const std::int64_t blocks = small.trainer->parameters().elements() / kParameterBlock;
      CHECK(line(small, "moments") ==
            2 * round_up(blocks * kMomentBlockBytes, small.backend->info().allocation_bytes));
      CHECK(small.trainer->pageable_bytes_per_block() <
            plain.trainer->pageable_bytes_per_block() * 2 / 3);
      for (int step = 0; step < 10; ++step) {
        for (Setup* s : {&plain, &small}) s->trainer->micro(golden.batch(step));
        const double wanted = plain.trainer->apply(1e-2).loss;
        CHECK(small.trainer->apply(1e-2).loss == doctest::Approx(wanted).epsilon(0.02));
      }
      MemoryState plain_state = saved(plain), small_state = saved(small);
      CHECK(plain_state.tensors != small_state.tensors);
      CHECK_THROWS_AS(plain.trainer->load(small_state), Error);
      CHECK_THROWS_AS(small.trainer->load(plain_state), Error);
    }
  }
}

}  // namespace nibble::golden
