// The paged optimizer on drawn cases: models with segments of less than a block up to many, cut at
// drawn elements into what stays in device memory and what waits on the host, and into pages of
// drawn sizes. Wherever the cuts are, training gives the same bytes, takes the memory that was
// predicted and never more, and the arena holds two pages and the array that leaves last.
#include <doctest/doctest.h>

#include <random>

#include "backends/cpu/cpu.h"
#include "engine/error.h"
#include "engine/ops.h"
#include "engine/trainer.h"
#include "tests/unit/memory_state.h"
#include "tests/unit/plan_checks.h"

using namespace nibble;
using namespace nibble::test;

namespace {

constexpr std::int64_t kRows = 8;
constexpr std::size_t kSteps = 4, kHalfWay = 2;

class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}
  // From low to high, both included.
  std::int64_t operator()(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random_()) % (high - low + 1);
  }
  template <class T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[(*this)(0, std::ssize(choices) - 1)];
  }
  float weight() { return static_cast<float>((*this)(-100, 100)) / 200; }

 private:
  std::mt19937 random_;
};

// An embedding, then norms and linear layers by turns, then the head; every parameter gets a
// gradient.
struct Model {
  std::vector<std::int64_t> widths;  // of the activations; the vocabulary at both ends
  ParameterTable table;
  TrainerOptions options;
  std::vector<std::vector<float>> initial;              // by segment
  std::array<std::vector<Microbatch>, kSteps> batches;  // by step

  Model() {
    options.buckets = {kRows};
    options.evaluates = false;
  }
  std::size_t layers() const { return widths.size() - 2; }
  static std::string matrix(std::size_t layer) { return "matrix." + std::to_string(layer); }
  static std::string norm(std::size_t layer) { return "norm." + std::to_string(layer); }

  Tensor loss(Graph& g, const LossInputs& in) const {
    const auto weight = [&](std::size_t layer) {
      const ParameterSegment& s = table.at(matrix(layer));
      return g.parameter(s.name, {options.compute, {s.rows, s.cols}, {}});
    };
    Tensor x = embedding(in.tokens, weight(0));
    for (std::size_t layer = 1; layer <= layers(); ++layer) {
      const Tensor factors = g.parameter(norm(layer), {options.compute, {widths[layer]}, {}});
      x = rms_norm(x, factors, 1e-5f);
      if (layer < layers()) x = linear(x, weight(layer));
    }
    return linear_cross_entropy(x, weight(layers()), in.labels, in.loss_rows, in.training);
  }
};

Microbatch draw_batch(Draw& draw, std::int64_t vocabulary) {
  Microbatch batch;
  for (std::int32_t i = 0; i < kRows; ++i) {
    batch.tokens.push_back(static_cast<std::int32_t>(draw(0, vocabulary - 1)));
    batch.positions.push_back(i);
    batch.labels.push_back(static_cast<std::int32_t>(draw(i == 0 ? 0 : -5, vocabulary - 1)));
    if (batch.labels.back() < 0) batch.labels.back() = -1;
    batch.span_begin.push_back(0);
    batch.ordinal.push_back(i);
  }
  return batch;
}

// The segments of a model lie in any order.
void add_segments(Model& model, Draw& draw) {
  struct Segment {
    std::string name;
    std::int64_t rows, cols;
  };
  std::vector<Segment> segments = {{Model::matrix(0), model.widths[0], model.widths[1]}};
  for (std::size_t layer = 1; layer <= model.layers(); ++layer) {
    segments.push_back({Model::norm(layer), 1, model.widths[layer]});
    segments.push_back({Model::matrix(layer), model.widths[layer + 1], model.widths[layer]});
  }
  while (!segments.empty()) {
    const auto next = segments.begin() + draw(0, std::ssize(segments) - 1);
    model.table.add(next->name, next->rows, next->cols, draw.of({1.0f, 0.5f, 2.0f}),
                    draw.of({0.0f, 0.01f}));
    segments.erase(next);
  }
}

Model draw_model(Draw& draw) {
  Model model;
  const std::int64_t vocabulary = draw(9, 70);
  model.widths = {vocabulary};
  for (std::int64_t n = draw(1, 4); n > 0; --n) {
    model.widths.push_back(draw(0, 2) == 0 ? draw(3, 40) : draw(60, 260));
  }
  model.widths.push_back(vocabulary);
  add_segments(model, draw);
  for (const ParameterSegment& s : model.table.segments()) {
    std::vector<float>& values = model.initial.emplace_back();
    for (std::int64_t i = 0; i < s.elements(); ++i) values.push_back(draw.weight());
  }
  for (std::vector<Microbatch>& step : model.batches) {
    for (std::int64_t n = draw(1, 2); n > 0; --n) step.push_back(draw_batch(draw, vocabulary));
  }
  model.options.compute = draw.of({DType::F32, DType::BF16, DType::BF16, DType::F64});
  model.options.optimizer = draw.of({Optimizer::adamw, Optimizer::adamw8bit});
  model.options.clip = draw.of({0.0, 0.05});
  return model;
}

// Where the optimizer's arrays are cut.
struct Cut {
  std::int64_t paged = 0, page = 0;  // elements
};

Cut draw_cut(Draw& draw, std::int64_t elements) {
  Cut cut;
  const std::int64_t some = draw(1, elements), all = elements + draw(0, 1);
  cut.paged = draw.of<std::int64_t>({some, some, some, some, all, 0});
  cut.page = kParameterBlock *
             draw.of<std::int64_t>({1, 2, 3, draw(1, elements / kParameterBlock + 2), 0});
  return cut;
}

std::unique_ptr<Backend> make_backend(std::int64_t limit = 0, std::int64_t host_limit = 0) {
  return cpu::make_cpu_backend({.isa = {}, .memory_limit = limit, .host_memory_limit = host_limit});
}

// A trainer of a model, not yet allocated.
struct Run {
  Run(const Model& model, const Cut& cut, std::unique_ptr<Backend> on = make_backend())
      : model(model), backend(std::move(on)) {
    TrainerOptions options = model.options;
    options.paged_elements = cut.paged;
    options.page_elements = cut.page;
    trainer = std::make_unique<Trainer>(
        *backend, model.table,
        [this](Graph& g, const LossInputs& in) { return this->model.loss(g, in); }, options);
  }

  void set_parameters() {
    for (std::size_t i = 0; i < model.initial.size(); ++i) {
      trainer->set_parameter(model.table.segments()[i].name, model.initial[i]);
    }
  }
  MemoryState train(std::size_t first, std::size_t end) {
    for (std::size_t step = first; step < end; ++step) {
      for (const Microbatch& batch : model.batches[step]) trainer->micro(batch);
      trainer->apply(1e-2);
    }
    return state();
  }
  MemoryState state() const {
    MemoryState saved;
    trainer->save(saved);
    return saved;
  }

  const Model& model;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Trainer> trainer;
};

// Empty, or the first tensor whose bytes differ.
std::string difference(const MemoryState& a, const MemoryState& b) {
  if (a.tensors.size() != b.tensors.size()) return "the number of tensors";
  for (const auto& [name, bytes] : a.tensors) {
    const auto other = b.tensors.find(name);
    if (other == b.tensors.end() || other->second != bytes) return name;
  }
  return {};
}

// Empty, or the first tensor, the step left out, that is not all zeros.
std::string nonzero(const MemoryState& state) {
  for (const auto& [name, bytes] : state.tensors) {
    const bool zero =
        std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{}; });
    if (name != "step" && !zero) return name;
  }
  return {};
}

// The limits of one run, of which one is a byte short: refused, before anything is trained.
void check_refused(const Model& model, const Cut& cut, std::int64_t limit, std::int64_t host_limit,
                   MemoryKind kind) {
  Run run(model, cut, make_backend(limit, host_limit));
  try {
    run.trainer->allocate();
    FAIL("nothing was refused");
  } catch (const OutOfMemory& e) {
    CHECK(e.kind == kind);
  }
  run.trainer.reset();
  CHECK(run.backend->allocated_bytes() == 0);
  CHECK(run.backend->host_allocated_bytes() == 0);
}

// How many pages pass through the arena.
std::int64_t passing_pages(const Trainer& trainer, const Model& model) {
  const Plan& plan = trainer.apply_plan();
  const auto copies = std::count_if(plan.steps.begin(), plan.steps.end(), [&](std::int32_t id) {
    return plan.graph->node(id).op == OpId::page_in;
  });
  return copies / (model.options.compute == DType::BF16 ? 3 : 2);
}

// What the arena of the optimizer's program may hold: two pages, of one before them its second
// moment, which leaves last, and the small things that kernels need.
std::int64_t most_in_arena(const Trainer& trainer, const Model& model, std::int64_t page) {
  constexpr std::int64_t kSmall = 1024;
  const std::int64_t block = trainer.pageable_bytes_per_block();
  const std::int64_t master = model.options.compute == DType::BF16 ? 4 * kParameterBlock : 0;
  const std::int64_t pages = passing_pages(trainer, model);
  const std::int64_t left = pages > 2 ? (block - master) / 2 : 0;
  return page / kParameterBlock * (std::min<std::int64_t>(pages, 2) * block + left) + kSmall;
}

bool inside_segment(const ParameterTable& table, std::int64_t border) {
  return std::any_of(table.segments().begin(), table.segments().end(), [&](const auto& s) {
    return s.offset < border && border < s.offset + s.elements();
  });
}

// Cases of each kind among the drawn ones, so that none is left out unnoticed.
struct Seen {
  int cut_segments = 0, cut_by_pages = 0, turns = 0, all_paged = 0, resident_pages = 0;
  void count(const ParameterTable& table, const Cut& cut) {
    const std::int64_t paged = round_up(std::min(cut.paged, table.elements()), kParameterBlock);
    const std::int64_t resident = table.elements() - paged;
    cut_segments += inside_segment(table, resident);
    all_paged += resident == 0;
    if (cut.page == 0) return;
    turns += paged > 2 * cut.page;
    resident_pages += resident > cut.page;
    for (std::int64_t at = resident + cut.page; at < table.elements(); at += cut.page) {
      if (!inside_segment(table, at)) continue;
      ++cut_by_pages;
      break;
    }
  }
};

// What the plan of a cut promises, before anything is allocated.
void check_plan(const Run& run, const Cut& cut) {
  const Trainer& trainer = *run.trainer;
  const std::int64_t paged = trainer.paged_elements();
  CHECK(paged >= std::min(cut.paged, trainer.parameters().elements()));
  CHECK(paged < cut.paged + kParameterBlock);
  CHECK(wrong_with(trainer.apply_plan(), *run.backend) == "");
  if (cut.page == 0) return;
  CHECK(passing_pages(trainer, run.model) == (paged + cut.page - 1) / cut.page);
  CHECK(trainer.apply_plan().arena_bytes <=
        most_in_arena(trainer, run.model, std::min(paged, cut.page)));
}

// Trains under limits of exactly what was predicted.
void check_training(const Model& model, const Cut& cut, const MemoryState& half_way,
                    const MemoryState& wanted) {
  const FitReport fit = Run(model, cut).trainer->fit();
  Run run(model, cut, make_backend(fit.total_bytes(), fit.pinned_bytes()));
  check_plan(run, cut);
  run.trainer->allocate();
  run.trainer->warm_up();
  run.set_parameters();
  CHECK(difference(run.train(0, kHalfWay), half_way) == "");
  CHECK(difference(run.train(kHalfWay, kSteps), wanted) == "");
  CHECK(run.backend->allocated_bytes() == fit.total_bytes());
  CHECK(run.backend->host_allocated_bytes() == fit.pinned_bytes());
  run.trainer->warm_up();
  CHECK(nonzero(run.state()) == "");
  check_refused(model, cut, fit.total_bytes() - 1, 0, MemoryKind::device);
  if (fit.pinned_bytes() > 0) {
    check_refused(model, cut, 0, fit.pinned_bytes() - 1, MemoryKind::host);
  }
}

}  // namespace

TEST_CASE("drawn tables, cuts and pages: the same bytes, within the predicted ones") {
  Draw draw(29);
  Seen seen;
  for (int table = 0; table < 14; ++table) {
    const Model model = draw_model(draw);
    CAPTURE(table);
    CAPTURE(name(model.options.compute));
    Run resident(model, {});
    resident.trainer->allocate();
    resident.set_parameters();
    MemoryState half_way = resident.train(0, kHalfWay);
    const MemoryState wanted = resident.train(kHalfWay, kSteps);
    for (const auto& [tensor, bytes] : wanted.tensors) {
      CHECK_MESSAGE(bytes != half_way.tensors.at(tensor), tensor);
    }
    for (int n = 0; n < 3; ++n) {
      const Cut cut = draw_cut(draw, model.table.elements());
      CAPTURE(cut.paged);
      CAPTURE(cut.page);
      check_training(model, cut, half_way, wanted);
      seen.count(model.table, cut);
      if (model.options.compute == DType::F64) continue;  // checkpoints hold F32
      Run resumed(model, draw_cut(draw, model.table.elements()));
      resumed.trainer->allocate();
      resumed.trainer->load(half_way);
      CHECK(difference(resumed.train(kHalfWay, kSteps), wanted) == "");
    }
  }
  CHECK(seen.cut_segments > 6);
  CHECK(seen.cut_by_pages > 6);
  CHECK(seen.turns > 6);
  CHECK(seen.all_paged > 6);
  CHECK(seen.resident_pages > 6);
}

TEST_CASE("a chosen page is the largest with which the arena need not grow") {
  Draw draw(31);
  Model model;
  model.widths = {300, 400, 400, 300};
  add_segments(model, draw);
  for (const DType compute : {DType::F32, DType::BF16}) {
    model.options.compute = compute;
    for (std::int64_t rows = 64; rows <= 512; rows += 32) {
      CAPTURE(name(compute));
      CAPTURE(rows);
      model.options.buckets = {rows};
      const Run resident(model, {});
      const Run paged(model, {.paged = model.table.elements()});
      const std::int64_t arena = resident.trainer->runtime().arena_bytes();
      CHECK(paged.trainer->runtime().arena_bytes() == arena);
      const std::int64_t pages = passing_pages(*paged.trainer, model);
      if (pages > 2) CHECK(2 * paged.trainer->apply_plan().arena_bytes > arena);
    }
  }
}

TEST_CASE("a page is whole blocks") {
  Draw draw(37);
  const Model model = draw_model(draw);
  for (const std::int64_t page : {5000, 1, -4096}) {
    try {
      const Run run(model, {.page = page});
      FAIL("pages of " << page << " elements were accepted");
    } catch (const Error& e) {
      CHECK(std::string(e.what()).starts_with("page_elements is " + std::to_string(page)));
    }
  }
}
