// The tiny llama of make_llama_goldens.py against the engine: logits, the loss, every stored
// gradient and ten AdamW steps, for adapters and for all weights, in F64 and F32.

#include "tests/golden/llama_golden.h"
#include "tests/golden/adamw8bit_checks.h"
#include "tests/golden/paging_checks.h"

#include "backends/cpu/cpu.h"

using namespace nibble;
using namespace nibble::golden;

namespace {

std::unique_ptr<Backend> cpu_backend(int threads = 2) {
  return cpu::make_cpu_backend({.threads = threads, .isa = {}, .memory_limit = 0});
}

}  // namespace

TEST_CASE("the tiny llama agrees with PyTorch: logits, gradients, ten AdamW steps") {
  for (const char* variant : {"tied", "untied", "llama3"}) {
    const Golden golden(variant);
    for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
      for (const Method method : {Method::full, Method::lora}) {
        CAPTURE(variant);
        CAPTURE(name(compute));
        const std::string prefix = method == Method::full ? "full" : "lora";
        Setup s(golden, method, compute, {Rung::store}, cpu_backend());
        check_logits(golden, s, prefix, compute);
        const int gradients = check_training(golden, s, prefix, compute);
        // One variant holds them all, the others what differs in them.
        if (std::string(variant) == "tied")
          CHECK(gradients == std::ssize(s.trainer->parameters().segments()));
      }
    }
  }
}

TEST_CASE("every storage rung gives the same gradients, bit for bit") {
  const Golden golden("tied");
  for (const DType compute : {DType::F64, DType::F32, DType::BF16}) {
    for (const Method method : {Method::full, Method::lora}) {
      std::vector<std::vector<float>> first;
      for (const Rung rung : {Rung::store, Rung::cheap, Rung::attention, Rung::block}) {
        Setup s(golden, method, compute, {rung}, cpu_backend());
        s.trainer->micro(golden.batch(0));
        std::vector<std::vector<float>> now;
        for (const ParameterSegment& p : s.trainer->parameters().segments()) {
          now.push_back(s.trainer->gradient(p.name));
        }
        if (rung == Rung::store) first = now;
        CHECK(now == first);
      }
    }
  }
}

TEST_CASE("any number of threads gives the same parameters, bit for bit") {
  const Golden golden("untied");
  std::vector<std::vector<float>> first;
  for (const int threads : {1, 2, 5}) {
    Setup s(golden, Method::full, DType::F32, {Rung::store}, cpu_backend(threads));
    for (int step = 0; step < 3; ++step) {
      s.trainer->micro(golden.batch(step));
      s.trainer->apply(1e-2);
    }
    std::vector<std::vector<float>> now;
    for (const ParameterSegment& p : s.trainer->parameters().segments()) {
      now.push_back(s.trainer->parameter(p.name));
    }
    if (first.empty()) first = now;
    CHECK(now == first);
  }
}

TEST_CASE("several micros and one apply equal one step over all of them") {
  // The same three documents, once in one microbatch and once in three: sums differ only in the
  // order of F32 additions.
  const Golden golden("tied");
  const Microbatch all = golden.batch(0);
  Setup whole(golden, Method::lora, DType::F32, {Rung::store}, cpu_backend()),
      parts(golden, Method::lora, DType::F32, {Rung::store}, cpu_backend());
  whole.trainer->micro(all);
  for (std::size_t begin = 0; begin < kRows;) {
    std::size_t end = begin + 1;
    while (end < kRows && all.span_begin[end] == all.span_begin[begin]) ++end;
    Microbatch part;
    for (std::size_t i = begin; i < end; ++i) {
      part.tokens.push_back(all.tokens[i]);
      part.positions.push_back(all.positions[i]);
      part.labels.push_back(all.labels[i]);
      part.span_begin.push_back(0);
    }
    for (std::int32_t i = static_cast<std::int32_t>(end - begin); i < kRows; ++i) {
      part.tokens.push_back(0);
      part.positions.push_back(0);
      part.labels.push_back(-1);
      part.span_begin.push_back(i);
    }
    part.ordinal.resize(kRows);
    parts.trainer->micro(part);
    begin = end;
  }
  for (const ParameterSegment& p : whole.trainer->parameters().segments()) {
    const std::vector<float> wanted = whole.trainer->gradient(p.name);
    CHECK(error(parts.trainer->gradient(p.name), {wanted.begin(), wanted.end()}) < 1e-5);
  }
  const StepResult a = whole.trainer->apply(1e-2), b = parts.trainer->apply(1e-2);
  CHECK(a.tokens == b.tokens);
  CHECK(a.loss == doctest::Approx(b.loss).epsilon(1e-6));
}

TEST_CASE("what fit() predicts is what is allocated, to the byte") {
  const Golden golden("tied");
  for (const DType compute : {DType::F32, DType::BF16}) {
    Setup s(golden, Method::lora, compute, {Rung::store}, cpu_backend());
    CHECK(s.trainer->fit().total_bytes() + s.loaded->weight_bytes() ==
          s.backend->allocated_bytes());
  }
}

TEST_CASE("the optimizer's arrays give the same bytes wherever they lie") {
  for (const Optimizer optimizer : {Optimizer::adamw, Optimizer::adamw8bit}) {
    check_paging([] { return cpu_backend(); }, {DType::F64, DType::F32, DType::BF16}, optimizer);
    check_split_segment([] { return cpu_backend(); }, {DType::F32, DType::BF16}, optimizer);
  }
}

TEST_CASE("moments in 8 bits train like those in F32") {
  check_small_moments([] { return cpu_backend(); }, {DType::F64, DType::F32, DType::BF16});
}

TEST_CASE("adamw8bit gives the codes of its NumPy twin with every instruction set") {
  for (const cpu::Isa isa : {cpu::Isa::Portable, cpu::Isa::Avx2, cpu::Isa::Avx512}) {
    if (!cpu::is_supported(isa)) continue;
    CAPTURE(cpu::name(isa));
    const auto backend = cpu::make_cpu_backend({.threads = 2, .isa = isa, .memory_limit = 0});
    check_adamw8bit(*backend);
    check_huge_gradient(*backend);
  }
}

TEST_CASE("block inputs give the same bytes wherever they wait") {
  check_offload([] { return cpu_backend(); }, {DType::F64, DType::F32, DType::BF16});
}

TEST_CASE("weights that come from the host for each use give the same bytes") {
  check_streaming([] { return cpu_backend(); }, {DType::F64, DType::F32, DType::BF16});
}

TEST_CASE("an MLP gives the same bytes for any number of rows at a time") {
  check_mlp_rows([] { return cpu_backend(); }, {DType::F32, DType::BF16});
}
