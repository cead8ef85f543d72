#include "engine/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/autograd.h"
#include "engine/error.h"
#include "engine/float16.h"
#include "engine/ops.h"

namespace nibble {
namespace {

// An executable exists per bucket and per share of its rows that carry a label.
constexpr std::array<std::int64_t, 4> kLossShares = {8, 4, 2, 1};

LossInputs declare_inputs(Graph& graph, std::int64_t rows, std::int64_t loss_rows) {
  LossInputs in;
  const auto index = [&](std::string_view name, std::int64_t n) {
    return graph.input(name, {DType::I32, {n}, {}});
  };
  in.tokens = index("tokens", rows);
  in.positions = index("positions", rows);
  in.labels = index("labels", rows);
  in.span_begin = index("span_begin", rows);
  in.ordinal = index("ordinal", rows);
  in.loss_rows = index("loss_rows", loss_rows);
  in.rng = graph.input("rng", {DType::I64, {2}, {}});
  return in;
}

}  // namespace

std::int64_t Microbatch::label_count() const {
  return std::count_if(labels.begin(), labels.end(), [](std::int32_t l) { return l >= 0; });
}

Trainer::Trainer(Backend& backend, ParameterTable parameters, BuildLoss build_loss,
                 const TrainerOptions& options)
    : backend_(backend),
      parameters_(std::move(parameters)),
      build_loss_(std::move(build_loss)),
      options_(options),
      runtime_(backend) {
  for (const std::int64_t rows : options_.buckets) {
    for (const std::int64_t share : kLossShares) {
      const std::int64_t loss_rows = std::max<std::int64_t>(1, rows / share);
      if (options_.training) add_program(rows, loss_rows, true);
      if (options_.evaluates) add_program(rows, loss_rows, false);
    }
  }
  if (options_.training) apply_ = add_apply();
  bind_leaves();
}

int Trainer::add_program(std::int64_t rows, std::int64_t loss_rows, bool training) {
  auto graph = std::make_unique<Graph>(options_.compute);
  LossInputs in = declare_inputs(*graph, rows, loss_rows);
  in.storage = options_.storage;
  in.training = training;
  const Tensor loss = build_loss_(*graph, in);
  Program program{rows, loss_rows, -1, {loss.node, 1}};
  const TensorType stat{graph->accumulate(), {1}, {}};
  if (training) {
    const Seed seed{loss, fill(*graph, stat, 1.0)};
    append_backward(*graph, {&seed, 1});
    accumulate(graph->state("loss_sum", stat), loss);
  } else {
    graph->keep(graph->output_of(loss, 1));
  }
  program.number = runtime_.add(std::move(graph));
  (training ? micro_ : evaluate_).push_back(program);
  return program.number;
}

// The optimizer walks the flat arrays page by page; each page is a set of leaves of its own, so
// that pages can later live elsewhere between their turns.
int Trainer::add_apply() {
  auto graph = std::make_unique<Graph>(options_.compute);
  const DType stat = graph->accumulate();
  const Tensor scalars = graph->input("scalars", {stat, {8}, {}});
  const std::int64_t total = parameters_.elements();
  struct Page {
    Tensor master, first, second, gradient, copy, table;
  };
  std::vector<Page> pages;
  for (std::int64_t begin = 0; begin < total; begin += kParameterPage) {
    const std::int64_t n = std::min(kParameterPage, total - begin);
    const std::string suffix = "." + std::to_string(begin / kParameterPage);
    const TensorType type{stat, {n}, {}};
    Page page;
    page.master = graph->state("master" + suffix, type);
    page.first = graph->state("m" + suffix, type);
    page.second = graph->state("v" + suffix, type);
    page.gradient = graph->state("gradient" + suffix, type);
    if (options_.compute == DType::BF16) {
      page.copy = graph->state("copy" + suffix, {DType::BF16, {n}, {}});
    }
    page.table = graph->input("blocks" + suffix, {stat, {n / kParameterBlock, 2}, {}});
    pages.push_back(page);
  }
  Tensor norm = fill(*graph, {DType::F64, {1}, {}}, 0.0);
  for (const Page& page : pages) norm = sum_squares(norm, page.gradient);
  for (const Page& page : pages) {
    const Tensor master =
        adamw(page.master, page.first, page.second, page.gradient, page.table, scalars, norm);
    if (page.copy) convert(page.copy, master);
  }
  graph->keep(norm);
  norm_ = {norm.node, norm.output};
  return runtime_.add(std::move(graph));
}

std::size_t Trainer::array_element_bytes() const {
  return options_.compute == DType::F64 ? sizeof(double) : sizeof(float);
}

FitReport Trainer::fit() const {
  FitReport report;
  const std::int64_t alignment = backend_.info().alignment;
  const std::int64_t array = round_up(
      parameters_.elements() * static_cast<std::int64_t>(array_element_bytes()), alignment);
  report.device.push_back({"masters", array});
  if (options_.compute == DType::BF16) {
    report.device.push_back({"adapters", round_up(2 * parameters_.elements(), alignment)});
  }
  if (options_.training) {
    report.device.push_back({"gradients", array});
    report.device.push_back({"moments", 2 * array});
  }
  report.device.push_back({"arena", runtime_.arena_bytes()});
  report.device.push_back({"inputs", runtime_.input_bytes() + runtime_.state_bytes() +
                                         round_up(block_table_bytes(), alignment)});
  report.storage = options_.storage.str();
  return report;
}

std::int64_t Trainer::block_table_bytes() const {
  if (!options_.training) return 0;
  return 2 * parameters_.elements() / kParameterBlock *
         static_cast<std::int64_t>(array_element_bytes());
}

// Before the arrays exist this promises the addresses; allocate() calls it again to give them.
void Trainer::bind_leaves() {
  const auto stat = static_cast<std::int64_t>(array_element_bytes());
  const auto bind = [&](const std::string& name, const std::unique_ptr<Buffer>& array,
                        std::int64_t offset) {
    runtime_.bind(name, array ? array->data() + offset : nullptr);
  };
  const bool has_copy = options_.compute == DType::BF16;
  for (const ParameterSegment& s : parameters_.segments()) {
    bind(s.name, has_copy ? copy_ : master_, (has_copy ? 2 : stat) * s.offset);
    if (options_.training) bind(s.name + ".grad", gradient_, stat * s.offset);
  }
  if (!options_.training) return;
  for (std::int64_t begin = 0; begin < parameters_.elements(); begin += kParameterPage) {
    const std::string suffix = "." + std::to_string(begin / kParameterPage);
    bind("master" + suffix, master_, stat * begin);
    bind("m" + suffix, first_moment_, stat * begin);
    bind("v" + suffix, second_moment_, stat * begin);
    bind("gradient" + suffix, gradient_, stat * begin);
    if (has_copy) bind("copy" + suffix, copy_, 2 * begin);
    bind("blocks" + suffix, block_table_, 2 * stat * (begin / kParameterBlock));
  }
}

void Trainer::allocate() {
  const std::int64_t alignment = backend_.info().alignment;
  const std::int64_t bytes = round_up(
      parameters_.elements() * static_cast<std::int64_t>(array_element_bytes()), alignment);
  const auto array = [&](std::int64_t size, std::string_view purpose) {
    auto buffer = backend_.allocate(size, purpose);
    backend_.clear(buffer->data(), buffer->size());
    return buffer;
  };
  master_ = array(bytes, "masters");
  if (options_.compute == DType::BF16) {
    copy_ = array(round_up(2 * parameters_.elements(), alignment), "adapters");
  }
  if (options_.training) {
    gradient_ = array(bytes, "gradients");
    first_moment_ = array(bytes, "first moments");
    second_moment_ = array(bytes, "second moments");
    block_table_ = array(round_up(block_table_bytes(), alignment), "optimizer blocks");
    const std::vector<float> table = parameters_.block_table();
    const std::vector<double> wide(table.begin(), table.end());
    const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
    const auto count = static_cast<std::int64_t>(table.size());
    backend_.upload(block_table_->data(), encode({stat, {count}, {}}, wide));
  }
  bind_leaves();
  runtime_.allocate();
}

void Trainer::write_array(Buffer& array, const ParameterSegment& s, std::span<const float> values) {
  if (static_cast<std::int64_t>(values.size()) != s.elements()) {
    throw ShapeError("parameter \"" + s.name + "\" has " + std::to_string(s.elements()) +
                     " elements, not " + std::to_string(values.size()));
  }
  const std::vector<double> wide(values.begin(), values.end());
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  backend_.upload(array.data() + static_cast<std::int64_t>(array_element_bytes()) * s.offset,
                  encode({stat, {s.elements()}, {}}, wide));
}

std::vector<float> Trainer::read_array(Buffer& array, const ParameterSegment& s) const {
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  const TensorType type{stat, {s.elements()}, {}};
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  backend_.download(host,
                    array.data() + static_cast<std::int64_t>(array_element_bytes()) * s.offset);
  const std::vector<double> wide = decode(type, host.data());
  return {wide.begin(), wide.end()};
}

void Trainer::set_parameter(std::string_view name, std::span<const float> values) {
  const ParameterSegment& s = parameters_.at(name);
  write_array(*master_, s, values);
  if (!copy_) return;
  std::vector<bf16> rounded;
  for (const float v : values) rounded.push_back(to_bf16(v));
  backend_.upload(copy_->data() + 2 * s.offset, std::as_bytes(std::span<const bf16>(rounded)));
}

std::vector<float> Trainer::parameter(std::string_view name) const {
  return read_array(*master_, parameters_.at(name));
}

std::vector<float> Trainer::gradient(std::string_view name) const {
  return read_array(*gradient_, parameters_.at(name));
}

const Trainer::Program& Trainer::write_inputs(const std::vector<Program>& programs,
                                              const Microbatch& batch) {
  const auto rows = static_cast<std::int64_t>(batch.tokens.size());
  const std::int64_t labels = batch.label_count();
  for (const Program& p : programs) {
    if (p.rows != rows || p.loss_rows < labels) continue;
    std::vector<std::int32_t> loss_rows(static_cast<std::size_t>(p.loss_rows), -1);
    std::size_t next = 0;
    for (std::size_t row = 0; row < batch.labels.size(); ++row) {
      if (batch.labels[row] >= 0) loss_rows[next++] = static_cast<std::int32_t>(row);
    }
    const auto write = [&](std::string_view name, const std::vector<std::int32_t>& values) {
      runtime_.write(name, std::span<const std::int32_t>(values));
    };
    write("tokens", batch.tokens);
    write("positions", batch.positions);
    write("labels", batch.labels);
    write("span_begin", batch.span_begin);
    write("loss_rows", loss_rows);
    return p;
  }
  throw ShapeError("a microbatch of " + std::to_string(rows) + " rows is in none of the buckets");
}

void Trainer::micro(const Microbatch& batch, const Executable::Hook& hook) {
  const Program& program = write_inputs(micro_, batch);
  runtime_.write("ordinal", std::span<const std::int32_t>(batch.ordinal));
  const std::array<std::int64_t, 2> rng = {static_cast<std::int64_t>(options_.seed), step_};
  runtime_.write("rng", std::span<const std::int64_t>(rng));
  if (hook) {
    runtime_.run_checked(program.number, hook);
  } else {
    runtime_.run(program.number);
  }
  tokens_ += batch.label_count();
}

StepResult Trainer::apply(double lr, const Executable::Hook& hook) {
  if (tokens_ == 0) throw Error("apply() without a label token since the last step");
  StepResult result;
  result.tokens = tokens_;
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  const TensorType one{stat, {1}, {}};
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(one)));
  const auto tokens = static_cast<double>(tokens_);
  const auto t = static_cast<double>(step_ + 1);
  const std::array<double, 8> scalars = {lr,
                                         options_.beta1,
                                         options_.beta2,
                                         options_.eps,
                                         1 - std::pow(options_.beta1, t),
                                         1 - std::pow(options_.beta2, t),
                                         1 / tokens,
                                         options_.clip};
  runtime_.write("scalars", encode({stat, {8}, {}}, scalars));
  if (hook) {
    runtime_.run_checked(apply_, hook);
  } else {
    runtime_.run(apply_);
  }
  // The only place where a step waits for the device; the second read finds it done.
  double norm = 0;
  runtime_.read(apply_, norm_, std::as_writable_bytes(std::span<double>(&norm, 1)));
  result.grad_norm = std::sqrt(norm) / tokens;
  runtime_.read("loss_sum", host);
  result.loss = decode(one, host.data())[0] / tokens;
  runtime_.write("loss_sum", encode(one, std::array<double, 1>{0.0}));
  tokens_ = 0;
  ++step_;
  return result;
}

std::vector<float> Trainer::evaluate(const Microbatch& batch) {
  const Program& program = write_inputs(evaluate_, batch);
  const TensorType type = runtime_.graph(program.number).type(program.row_losses);
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  runtime_.run(program.number);
  runtime_.read(program.number, program.row_losses, host);
  std::vector<double> losses = decode(type, host.data());
  losses.resize(static_cast<std::size_t>(batch.label_count()));
  return {losses.begin(), losses.end()};
}

namespace {

template <class T>
std::span<std::byte> bytes_of(std::vector<T>& values) {
  return std::as_writable_bytes(std::span<T>(values));
}

}  // namespace

void Trainer::save(StateSink& sink) const {
  if (tokens_ != 0) throw Error("training state is saved between steps only");
  const std::int64_t step = step_;
  sink.write("step", {DType::I64, {1}, {}}, std::as_bytes(std::span<const std::int64_t>(&step, 1)));
  for (const ParameterSegment& s : parameters_.segments()) {
    const TensorType type{DType::F32, {s.rows, s.cols}, {}};
    const auto write = [&](const char* suffix, Buffer& array) {
      std::vector<float> values = read_array(array, s);
      sink.write(s.name + suffix, type, bytes_of(values));
    };
    write("", *master_);
    write(".m", *first_moment_);
    write(".v", *second_moment_);
  }
}

void Trainer::load(StateSource& source) {
  std::int64_t step = 0;
  source.read("step", {DType::I64, {1}, {}},
              std::as_writable_bytes(std::span<std::int64_t>(&step, 1)));
  for (const ParameterSegment& s : parameters_.segments()) {
    const TensorType type{DType::F32, {s.rows, s.cols}, {}};
    std::vector<float> values(static_cast<std::size_t>(s.elements()));
    source.read(s.name, type, bytes_of(values));
    set_parameter(s.name, values);
    source.read(s.name + ".m", type, bytes_of(values));
    write_array(*first_moment_, s, values);
    source.read(s.name + ".v", type, bytes_of(values));
    write_array(*second_moment_, s, values);
  }
  step_ = step;
}

double Trainer::plan_ratio() const {
  double worst = 1;
  for (const std::vector<Program>* programs : {&micro_, &evaluate_}) {
    for (const Program& p : *programs) {
      const Plan& plan = runtime_.plan(p.number);
      worst = std::max(worst,
                       static_cast<double>(plan.arena_bytes) /
                           static_cast<double>(std::max<std::int64_t>(plan.lower_bound_bytes, 1)));
    }
  }
  return worst;
}

}  // namespace nibble
