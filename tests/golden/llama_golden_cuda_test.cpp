// The PyTorch goldens on a GPU: logits, gradients, ten AdamW steps, for adapters and for all
// weights, in F32 and BF16; every rung and several runs the same bytes; predicted bytes are
// allocated bytes.
#include "tests/golden/adamw8bit_checks.h"
#include "tests/golden/llama_golden.h"
#include "tests/golden/paging_checks.h"
#include "tests/gpu_main.h"

using namespace nibble;
using namespace nibble::golden;

NIBBLE_GPU_MAIN("golden-cuda")

namespace {

std::unique_ptr<Backend> cuda_backend(bool hopper = true) {
  return cuda::open_cuda({.device = 0, .memory_limit = 0, .hopper_kernels = hopper});
}

}  // namespace

TEST_CASE("the tiny llama agrees with PyTorch on the GPU") {
  for (const bool hopper : {true, false}) {
    for (const char* variant : {"tied", "untied", "llama3"}) {
      const Golden golden(variant);
      for (const DType compute : {DType::F32, DType::BF16}) {
        for (const Method method : {Method::full, Method::lora}) {
          CAPTURE(variant);
          CAPTURE(name(compute));
          const std::string prefix = method == Method::full ? "full" : "lora";
          Setup s(golden, method, compute, {Rung::store}, cuda_backend(hopper));
          check_logits(golden, s, prefix, compute);
          check_training(golden, s, prefix, compute);
        }
      }
    }
  }
}

TEST_CASE("every storage rung gives the same gradients on the GPU, bit for bit, run after run") {
  const Golden golden("tied");
  for (const DType compute : {DType::F32, DType::BF16}) {
    for (const Method method : {Method::full, Method::lora}) {
      std::vector<std::vector<float>> first;
      for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
        Setup s(golden, method, compute, {rung}, cuda_backend());
        for (int step = 0; step < 4; ++step) {  // plain, recorded, replayed
          s.trainer->micro(golden.batch(step));
          s.trainer->apply(1e-2);
        }
        s.trainer->micro(golden.batch(0));
        std::vector<std::vector<float>> now;
        for (const ParameterSegment& p : s.trainer->parameters().segments()) {
          now.push_back(s.trainer->gradient(p.name));
        }
        if (first.empty()) first = now;
        CHECK(now == first);
      }
    }
  }
}

TEST_CASE("what fit() predicts is what is allocated on the GPU, to the byte") {
  const Golden golden("tied");
  for (const DType compute : {DType::F32, DType::BF16}) {
    Setup s(golden, Method::lora, compute, {Rung::store}, cuda_backend());
    CHECK(s.trainer->fit().total_bytes() + s.loaded->weight_bytes() ==
          s.backend->allocated_bytes());
  }
}

TEST_CASE("the optimizer's arrays give the same bytes wherever they lie, on the GPU") {
  for (const Optimizer optimizer : {Optimizer::adamw, Optimizer::adamw8bit}) {
    check_paging([] { return cuda_backend(); }, {DType::F32, DType::BF16}, optimizer);
    check_split_segment([] { return cuda_backend(); }, {DType::F32, DType::BF16}, optimizer);
  }
}

TEST_CASE("moments in 8 bits train like those in F32, on the GPU") {
  check_small_moments([] { return cuda_backend(); }, {DType::F32, DType::BF16});
}

TEST_CASE("adamw8bit gives the codes of its NumPy twin on the GPU") {
  const auto backend = cuda_backend();
  check_adamw8bit(*backend);
  check_huge_gradient(*backend);
}

TEST_CASE("block inputs give the same bytes wherever they wait, on the GPU") {
  check_offload([] { return cuda_backend(); }, {DType::F32, DType::BF16});
}

TEST_CASE("weights that come from the host for each use give the same bytes, on the GPU") {
  check_streaming([] { return cuda_backend(); }, {DType::F32, DType::BF16});
}

TEST_CASE("an MLP gives the same bytes for any number of rows at a time, on the GPU") {
  check_mlp_rows([] { return cuda_backend(); }, {DType::F32, DType::BF16});
}
