// The paged optimizer on any backend: wherever its arrays lie, the same bytes come out, and what
// fit() predicts is what is allocated on both sides.
#pragma once

#include "tests/golden/llama_golden.h"

namespace nibble::golden {

// Training state in memory, in the order in which it was written.
struct MemoryState final : StateSink, StateSource {
  std::map<std::string, std::vector<std::byte>, std::less<>> tensors;
  void write(std::string_view name, const TensorType&, std::span<const std::byte> bytes) override {
    tensors[std::string(name)].assign(bytes.begin(), bytes.end());
  }
  void read(std::string_view name, const TensorType&, std::span<std::byte> bytes) override {
    const auto found = tensors.find(name);
    REQUIRE(found != tensors.end());
    REQUIRE(found->second.size() == bytes.size());
    std::copy(found->second.begin(), found->second.end(), bytes.begin());
  }
};

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
            "attention,offload:gate:1", "block,offload:inputs:1"}) {
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
                         std::initializer_list<DType> computes) {
  const Golden golden("tied");
  for (const DType compute : computes) {
    for (const Method method : {Method::full, Method::lora}) {
      CAPTURE(name(compute));
      Setup resident(golden, method, compute, {Rung::store}, make_backend());
      const std::int64_t all = resident.trainer->parameters().elements();
      train(golden, resident, 0, 3);
      const MemoryState half_way = saved(resident);
      train(golden, resident, 3, 6);
      const MemoryState wanted = saved(resident);
      for (const std::int64_t paged : {std::int64_t{1}, all / 3, all}) {
        CAPTURE(paged);
        Setup s(golden, method, compute, {Rung::store}, make_backend(), paged);
        CHECK(s.trainer->paged_elements() >= paged);
        CHECK(s.trainer->paged_elements() < paged + kParameterBlock);
        const FitReport fit = s.trainer->fit();
        CHECK(fit.total_bytes() + s.loaded->weight_bytes() == s.backend->allocated_bytes());
        CHECK(fit.pinned_bytes() == s.backend->host_allocated_bytes());
        CHECK(fit.pinned_bytes() ==
              s.trainer->paged_elements() * s.trainer->pageable_bytes_per_element());
        train(golden, s, 0, 6);
        CHECK(saved(s).tensors == wanted.tensors);
        // Resuming under another cap goes on bit for bit; checkpoints hold F32.
        if (compute == DType::F64) continue;
        Setup resumed(golden, method, compute, {Rung::store}, make_backend(), paged);
        MemoryState state = half_way;
        resumed.trainer->load(state);
        train(golden, resumed, 3, 6);
        CHECK(saved(resumed).tensors == wanted.tensors);
      }
    }
  }
}

}  // namespace nibble::golden
