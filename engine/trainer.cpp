#include "engine/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>

#include "engine/autograd.h"
#include "engine/error.h"
#include "engine/float16.h"
#include "engine/ops.h"

namespace nibble {
namespace {

// An executable exists per bucket and per share of its rows that carry a label.
constexpr std::array<std::int64_t, 4> kLossShares = {8, 4, 2, 1};
// Elements of a page in host memory: 16 MiB of F32, less where the arena has less room.
constexpr std::int64_t kLargestPage = 4 << 20, kSmallestPage = 16 << 10;

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
      runtime_(backend, options.draft ? Layout::bound : Layout::search) {
  for (const std::int64_t rows : options_.buckets) {
    if (options_.draft && rows != options_.buckets.back()) continue;
    for (const std::int64_t share : kLossShares) {
      if (options_.draft && share != kLossShares.back()) continue;
      const std::int64_t loss_rows = std::max<std::int64_t>(1, rows / share);
      if (options_.training) add_program(rows, loss_rows, true);
      if (options_.evaluates) add_program(rows, loss_rows, false);
    }
  }
  resident_ = parameters_.elements();
  if (options_.training) {
    choose_pages();
    apply_ = add_apply();
  }
  bind_leaves();
}

// Two pages are in the arena at a time, one coming and one being worked on and leaving.
void Trainer::choose_pages() {
  const std::int64_t paged = std::min(options_.paged_elements, resident_);
  resident_ = (resident_ - paged) / kParameterBlock * kParameterBlock;
  page_ = kLargestPage;
  while (page_ > kSmallestPage &&
         2 * page_ * pageable_bytes_per_element() > runtime_.arena_bytes()) {
    page_ /= 2;
  }
}

double Trainer::estimate_step(const DeviceRates& rates, double average_span, double rows) const {
  const Program& largest = micro_.back();
  return rows / static_cast<double>(largest.rows) *
             estimate_seconds(runtime_.plan(largest.number), rates, average_span) +
         estimate_seconds(runtime_.plan(apply_), rates, average_span);
}

double Trainer::estimate_evaluation(const DeviceRates& rates, double average_span,
                                    double rows) const {
  if (evaluate_.empty()) return 0;
  const Program& largest = evaluate_.back();
  return rows / static_cast<double>(largest.rows) *
         estimate_seconds(runtime_.plan(largest.number), rates, average_span);
}

std::int64_t Trainer::pageable_bytes_per_element() const {
  return (pages_masters() ? 3 : 2) * static_cast<std::int64_t>(array_element_bytes());
}

std::vector<Trainer::Page> Trainer::pages() const {
  std::vector<Page> all;
  const std::int64_t total = parameters_.elements();
  for (std::int64_t begin = 0; begin < total; begin += all.back().count) {
    const bool paged = begin >= resident_;
    const std::int64_t end = paged ? total : resident_;
    all.push_back({begin, std::min(paged ? page_ : kParameterPage, end - begin), paged});
  }
  return all;
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

// The optimizer walks the flat arrays page by page. Pages from host memory pass through the arena:
// each comes in while the one before it is worked on, and leaves while the next is. Cutting the
// arrays elsewhere changes no bit.
int Trainer::add_apply() {
  auto graph = std::make_unique<Graph>(options_.compute);
  const DType stat = graph->accumulate();
  const Tensor scalars = graph->input("scalars", {stat, {8}, {}});
  const std::vector<Page> all = pages();
  struct Values {
    Tensor master, first, second;
  };
  const auto stored = [&](const Page& page) {
    const auto leaf = [&](const char* name, bool pageable) {
      const TensorType type{stat, {page.count}, {}};
      return page.paged && pageable ? graph->page(name + page.suffix(), type)
                                    : graph->state(name + page.suffix(), type);
    };
    return Values{leaf("master", pages_masters()), leaf("m", true), leaf("v", true)};
  };
  const auto come = [&](const Page& page) {
    Values values = stored(page);
    if (pages_masters()) values.master = page_in(values.master);
    values.first = page_in(values.first);
    values.second = page_in(values.second);
    return values;
  };
  std::size_t next = 0;  // page to come in
  std::deque<Values> arrived;
  const auto prefetch = [&] {
    while (next < all.size() && !all[next].paged) ++next;
    if (next < all.size()) arrived.push_back(come(all[next++]));
  };
  prefetch();
  prefetch();
  const auto gradient = [&](const Page& page) {
    return graph->state("gradient" + page.suffix(), {stat, {page.count}, {}});
  };
  Tensor norm = fill(*graph, {DType::F64, {1}, {}}, 0.0);
  for (const Page& page : all) norm = sum_squares(norm, gradient(page));
  for (const Page& page : all) {
    const Values at_home = stored(page);
    Values values = at_home;
    if (page.paged) {
      values = arrived.front();
      arrived.pop_front();
    }
    const Tensor table =
        graph->input("blocks" + page.suffix(), {stat, {page.count / kParameterBlock, 2}, {}});
    const Tensor master =
        adamw(values.master, values.first, values.second, gradient(page), table, scalars, norm);
    if (options_.compute == DType::BF16) {
      convert(graph->state("copy" + page.suffix(), {DType::BF16, {page.count}, {}}), master);
    }
    if (!page.paged) continue;
    if (pages_masters()) page_out(at_home.master, master);
    page_out(at_home.first, values.first);
    page_out(at_home.second, values.second);
    prefetch();
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
  const std::int64_t alignment = backend_.info().allocation_bytes;
  const std::int64_t array = round_up(
      parameters_.elements() * static_cast<std::int64_t>(array_element_bytes()), alignment);
  const auto pageable = [&](std::int64_t arrays) {
    return arrays *
           round_up(resident_ * static_cast<std::int64_t>(array_element_bytes()), alignment);
  };
  report.device.push_back({"masters", pages_masters() ? pageable(1) : array});
  if (options_.compute == DType::BF16) {
    report.device.push_back({"adapters", round_up(2 * parameters_.elements(), alignment)});
  }
  if (options_.training) {
    report.device.push_back({"gradients", array});
    report.device.push_back({"moments", pageable(2)});
  }
  if (paged_elements() > 0) {
    report.pinned.push_back({"optimizer pages", paged_elements() * pageable_bytes_per_element()});
  }
  if (runtime_.page_bytes() > 0) {
    report.pinned.push_back({"offloaded activations", runtime_.page_bytes()});
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

std::byte* Trainer::address(const FlatArray& array, std::int64_t at) const {
  const auto size = static_cast<std::int64_t>(array_element_bytes());
  if (array.host && at >= resident_) return array.host->data() + size * (at - resident_);
  return array.device ? array.device->data() + size * at : nullptr;
}

// Before the arrays exist this promises the addresses; allocate() calls it again to give them.
void Trainer::bind_leaves() {
  const auto stat = static_cast<std::int64_t>(array_element_bytes());
  const auto bind = [&](const std::string& name, std::byte* where) { runtime_.bind(name, where); };
  const auto in_buffer = [](const std::unique_ptr<Buffer>& buffer, std::int64_t offset) {
    return buffer ? buffer->data() + offset : nullptr;
  };
  const bool has_copy = options_.compute == DType::BF16;
  for (const ParameterSegment& s : parameters_.segments()) {
    bind(s.name, has_copy ? in_buffer(copy_, 2 * s.offset) : address(master_, s.offset));
    if (options_.training) bind(s.name + ".grad", address(gradient_, s.offset));
  }
  if (!options_.training) return;
  for (const Page& page : pages()) {
    bind("master" + page.suffix(), address(master_, page.begin));
    bind("m" + page.suffix(), address(first_moment_, page.begin));
    bind("v" + page.suffix(), address(second_moment_, page.begin));
    bind("gradient" + page.suffix(), address(gradient_, page.begin));
    if (has_copy) bind("copy" + page.suffix(), in_buffer(copy_, 2 * page.begin));
    bind("blocks" + page.suffix(),
         in_buffer(block_table_, 2 * stat * (page.begin / kParameterBlock)));
  }
}

Trainer::FlatArray Trainer::allocate_array(bool pageable, std::string_view purpose) {
  const auto size = static_cast<std::int64_t>(array_element_bytes());
  const std::int64_t resident = pageable ? resident_ : parameters_.elements();
  FlatArray array;
  array.device =
      backend_.allocate(round_up(resident * size, backend_.info().allocation_bytes), purpose);
  backend_.clear(array.device->data(), array.device->size());
  const std::int64_t paged = parameters_.elements() - resident;
  if (paged > 0) array.host = backend_.allocate_host(paged * size, purpose);
  return array;
}

void Trainer::allocate() {
  const std::int64_t alignment = backend_.info().allocation_bytes;
  master_ = allocate_array(pages_masters(), "masters");
  if (options_.compute == DType::BF16) {
    copy_ = backend_.allocate(round_up(2 * parameters_.elements(), alignment), "adapters");
    backend_.clear(copy_->data(), copy_->size());
  }
  if (options_.training) {
    gradient_ = allocate_array(false, "gradients");
    first_moment_ = allocate_array(true, "first moments");
    second_moment_ = allocate_array(true, "second moments");
    block_table_ = backend_.allocate(round_up(block_table_bytes(), alignment), "optimizer blocks");
    const std::vector<float> table = parameters_.block_table();
    const std::vector<double> wide(table.begin(), table.end());
    const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
    const auto count = static_cast<std::int64_t>(table.size());
    backend_.upload(block_table_->data(), encode({stat, {count}, {}}, wide));
  }
  bind_leaves();
  runtime_.allocate();
}

// The smallest bucket serves: what matters is that every kind of kernel has run.
void Trainer::warm_up() {
  runtime_.prepare();
  for (const std::vector<Program>* programs : {&micro_, &evaluate_}) {
    const auto smallest = std::find_if(programs->begin(), programs->end(),
                                       [](const Program& p) { return p.rows == p.loss_rows; });
    if (smallest != programs->end()) runtime_.run(smallest->number);
  }
  if (apply_ >= 0) runtime_.run(apply_);
  for (const FlatArray* array : {&master_, &gradient_, &first_moment_, &second_moment_}) {
    for (const std::unique_ptr<Buffer>* buffer : {&array->device, &array->host}) {
      if (*buffer) backend_.clear((*buffer)->data(), (*buffer)->size());
    }
  }
  if (copy_) backend_.clear(copy_->data(), copy_->size());
  runtime_.clear_states();
}

// Calls f(address, first, count) for the pieces of a segment that lie together.
template <class F>
void Trainer::for_pieces(const FlatArray& array, const ParameterSegment& s, F f) const {
  const std::int64_t split =
      array.host ? std::clamp(resident_ - s.offset, std::int64_t{0}, s.elements()) : s.elements();
  if (split > 0) f(address(array, s.offset), std::int64_t{0}, split);
  if (split < s.elements()) f(address(array, s.offset + split), split, s.elements() - split);
}

void Trainer::write_array(const FlatArray& array, const ParameterSegment& s,
                          std::span<const float> values) {
  if (static_cast<std::int64_t>(values.size()) != s.elements()) {
    throw ShapeError("parameter \"" + s.name + "\" has " + std::to_string(s.elements()) +
                     " elements, not " + std::to_string(values.size()));
  }
  const std::vector<double> wide(values.begin(), values.end());
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  const std::vector<std::byte> host = encode({stat, {s.elements()}, {}}, wide);
  const std::size_t size = array_element_bytes();
  for_pieces(array, s, [&](std::byte* to, std::int64_t first, std::int64_t count) {
    backend_.upload(to, std::span(host).subspan(static_cast<std::size_t>(first) * size,
                                                static_cast<std::size_t>(count) * size));
  });
}

std::vector<float> Trainer::read_array(const FlatArray& array, const ParameterSegment& s) const {
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  const TensorType type{stat, {s.elements()}, {}};
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  const std::size_t size = array_element_bytes();
  for_pieces(array, s, [&](const std::byte* from, std::int64_t first, std::int64_t count) {
    backend_.download(std::span(host).subspan(static_cast<std::size_t>(first) * size,
                                              static_cast<std::size_t>(count) * size),
                      from);
  });
  const std::vector<double> wide = decode(type, host.data());
  return {wide.begin(), wide.end()};
}

void Trainer::set_parameter(std::string_view name, std::span<const float> values) {
  const ParameterSegment& s = parameters_.at(name);
  write_array(master_, s, values);
  if (!copy_) return;
  std::vector<bf16> rounded;
  for (const float v : values) rounded.push_back(to_bf16(v));
  backend_.upload(copy_->data() + 2 * s.offset, std::as_bytes(std::span<const bf16>(rounded)));
}

std::vector<float> Trainer::parameter(std::string_view name) const {
  return read_array(master_, parameters_.at(name));
}

std::vector<float> Trainer::gradient(std::string_view name) const {
  return read_array(gradient_, parameters_.at(name));
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
  copied_bytes_ += runtime_.plan(program.number).copied_bytes;
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
  result.apply_copied_bytes = runtime_.plan(apply_).copied_bytes;
  result.copied_bytes = copied_bytes_ + result.apply_copied_bytes;
  if (!hook) result.apply_seconds = runtime_.seconds(apply_);
  runtime_.write("loss_sum", encode(one, std::array<double, 1>{0.0}));
  tokens_ = copied_bytes_ = 0;
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
    const auto write = [&](const char* suffix, const FlatArray& array) {
      std::vector<float> values = read_array(array, s);
      sink.write(s.name + suffix, type, bytes_of(values));
    };
    write("", master_);
    write(".m", first_moment_);
    write(".v", second_moment_);
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
    write_array(first_moment_, s, values);
    source.read(s.name + ".v", type, bytes_of(values));
    write_array(second_moment_, s, values);
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
