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
  // The largest program first: its arena is enough for the others. A draft is of it alone.
  for (auto rows = options_.buckets.rbegin(); rows != options_.buckets.rend(); ++rows) {
    for (auto share = kLossShares.rbegin(); share != kLossShares.rend(); ++share) {
      const std::int64_t loss_rows = std::max<std::int64_t>(1, *rows / *share);
      if (options_.training) add_program(*rows, loss_rows, true);
      if (options_.evaluates) add_program(*rows, loss_rows, false);
      if (options_.draft) break;
    }
    if (options_.draft) break;
  }
  std::reverse(micro_.begin(), micro_.end());
  std::reverse(evaluate_.begin(), evaluate_.end());
  resident_ = parameters_.elements();
  if (options_.training) {
    choose_pages();
    apply_ = add_apply();
  }
  bind_leaves();
}

// Two pages are in the arena at a time, one coming and one being worked on and leaving, and of the
// page before them the array that left last: a copy keeps its memory until the next has started.
void Trainer::choose_pages() {
  const std::int64_t paged = std::min(options_.paged_elements, resident_);
  resident_ = (resident_ - paged) / kParameterBlock * kParameterBlock;
  page_ = options_.page_elements;
  if (page_ < 0 || page_ % kParameterBlock != 0) {
    throw Error("page_elements is " + std::to_string(page_) + ", but pages are whole blocks: give" +
                " a multiple of " + std::to_string(kParameterBlock) + ", or 0 to have it chosen");
  }
  if (page_ > 0) return;
  page_ = kLargestPage;
  const std::int64_t block_bytes =
      2 * pageable_bytes_per_block() + bytes(moment_type(kParameterBlock));
  while (page_ > kSmallestPage && page_ / kParameterBlock * block_bytes >= runtime_.arena_bytes()) {
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

std::int64_t Trainer::pageable_bytes_per_block() const {
  const std::int64_t masters = pages_masters() ? kParameterBlock * element_bytes() : 0;
  return masters + 2 * bytes(moment_type(kParameterBlock));
}

std::vector<Trainer::Page> Trainer::pages() const {
  std::vector<Page> all;
  const std::int64_t total = parameters_.elements();
  for (std::int64_t begin = 0; begin < total; begin += all.back().count) {
    const bool paged = begin >= resident_;
    const std::int64_t end = paged ? total : resident_;
    const bool chosen = options_.page_elements == 0;
    const std::int64_t most = chosen && !paged ? kParameterPage : page_;
    all.push_back({begin, std::min(most, end - begin), paged});
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
    const auto leaf = [&](const char* name, const TensorType& type, bool pageable) {
      return page.paged && pageable ? graph->page(name + page.suffix(), type)
                                    : graph->state(name + page.suffix(), type);
    };
    const TensorType moment = moment_type(page.count);
    return Values{leaf("master", {stat, {page.count}, {}}, pages_masters()),
                  leaf("m", moment, true), leaf("v", moment, true)};
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
    const auto take_step = options_.optimizer == Optimizer::adamw8bit ? adamw8bit : adamw;
    const Tensor master =
        take_step(values.master, values.first, values.second, gradient(page), table, scalars, norm);
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

std::int64_t Trainer::element_bytes() const { return options_.compute == DType::F64 ? 8 : 4; }

TensorType Trainer::moment_type(std::int64_t count) const {
  if (options_.optimizer == Optimizer::adamw8bit) {
    return {DType::U8, {count / kParameterBlock * kMomentBlockBytes}, {}};
  }
  return {options_.compute == DType::F64 ? DType::F64 : DType::F32, {count}, {}};
}

FitReport Trainer::fit() const {
  FitReport report;
  const std::int64_t alignment = backend_.info().allocation_bytes;
  const std::int64_t array = round_up(parameters_.elements() * element_bytes(), alignment);
  const std::int64_t resident = round_up(resident_ * element_bytes(), alignment);
  report.device.push_back({"masters", pages_masters() ? resident : array});
  if (options_.compute == DType::BF16) {
    report.device.push_back({"adapters", round_up(2 * parameters_.elements(), alignment)});
  }
  if (options_.training) {
    report.device.push_back({"gradients", array});
    report.device.push_back({"moments", 2 * round_up(bytes(moment_type(resident_)), alignment)});
  }
  if (paged_elements() > 0) {
    report.pinned.push_back({"optimizer pages", paged_bytes()});
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
  return 2 * parameters_.elements() / kParameterBlock * element_bytes();
}

std::byte* Trainer::address(const FlatArray& array, std::int64_t at) const {
  const auto offset = [&](std::int64_t elements) {
    return elements / kParameterBlock * array.block_bytes;
  };
  if (array.host && at >= resident_) return array.host->data() + offset(at - resident_);
  return array.device ? array.device->data() + offset(at) : nullptr;
}

// Before the arrays exist this promises the addresses; allocate() calls it again to give them.
void Trainer::bind_leaves() {
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
         in_buffer(block_table_, 2 * element_bytes() * (page.begin / kParameterBlock)));
  }
}

Trainer::FlatArray Trainer::allocate_array(std::int64_t block_bytes, bool pageable,
                                           std::string_view purpose) {
  const std::int64_t all = parameters_.elements() / kParameterBlock;
  const std::int64_t resident = pageable ? resident_ / kParameterBlock : all;
  FlatArray array;
  array.block_bytes = block_bytes;
  array.device = backend_.allocate(
      round_up(resident * block_bytes, backend_.info().allocation_bytes), purpose);
  backend_.clear(array.device->data(), array.device->size());
  if (all > resident) array.host = backend_.allocate_host((all - resident) * block_bytes, purpose);
  return array;
}

void Trainer::allocate() {
  const std::int64_t alignment = backend_.info().allocation_bytes;
  const std::int64_t block = kParameterBlock * element_bytes();
  const std::int64_t moment_block = bytes(moment_type(kParameterBlock));
  master_ = allocate_array(block, pages_masters(), "masters");
  if (options_.compute == DType::BF16) {
    copy_ = backend_.allocate(round_up(2 * parameters_.elements(), alignment), "adapters");
    backend_.clear(copy_->data(), copy_->size());
  }
  if (options_.training) {
    gradient_ = allocate_array(block, false, "gradients");
    first_moment_ = allocate_array(moment_block, true, "first moments");
    second_moment_ = allocate_array(moment_block, true, "second moments");
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

// Calls f(address, first, count) for the pieces of a segment's first `size` bytes that lie
// together.
template <class F>
void Trainer::for_pieces(const FlatArray& array, const ParameterSegment& s, std::size_t size,
                         F f) const {
  std::size_t split = size;
  if (array.host) {
    const std::int64_t blocks = std::max<std::int64_t>(0, resident_ - s.offset) / kParameterBlock;
    split = std::min(size, static_cast<std::size_t>(blocks * array.block_bytes));
  }
  if (split > 0) f(address(array, s.offset), std::size_t{0}, split);
  if (split < size) f(address(array, std::max(s.offset, resident_)), split, size - split);
}

void Trainer::read_bytes(const FlatArray& array, const ParameterSegment& s,
                         std::span<std::byte> to) const {
  for_pieces(array, s, to.size(), [&](const std::byte* from, std::size_t first, std::size_t count) {
    backend_.download(to.subspan(first, count), from);
  });
}

void Trainer::write_bytes(const FlatArray& array, const ParameterSegment& s,
                          std::span<const std::byte> from) {
  for_pieces(array, s, from.size(), [&](std::byte* to, std::size_t first, std::size_t count) {
    backend_.upload(to, from.subspan(first, count));
  });
}

void Trainer::write_array(const FlatArray& array, const ParameterSegment& s,
                          std::span<const float> values) {
  if (static_cast<std::int64_t>(values.size()) != s.elements()) {
    throw ShapeError("parameter \"" + s.name + "\" has " + std::to_string(s.elements()) +
                     " elements, not " + std::to_string(values.size()));
  }
  const std::vector<double> wide(values.begin(), values.end());
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  write_bytes(array, s, encode({stat, {s.elements()}, {}}, wide));
}

std::vector<float> Trainer::read_array(const FlatArray& array, const ParameterSegment& s) const {
  const DType stat = options_.compute == DType::F64 ? DType::F64 : DType::F32;
  const TensorType type{stat, {s.elements()}, {}};
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  read_bytes(array, s, host);
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

// How a checkpoint holds an 8-bit moment of a segment: all of its blocks.
TensorType stored_moment(const ParameterSegment& s) {
  return {DType::I8,
          {round_up(s.elements(), kParameterBlock) / kParameterBlock, kMomentBlockBytes},
          {}};
}

}  // namespace

void Trainer::save(StateSink& sink) const {
  if (tokens_ != 0) throw Error("training state is saved between steps only");
  const std::int64_t step = step_;
  sink.write("step", {DType::I64, {1}, {}}, std::as_bytes(std::span<const std::int64_t>(&step, 1)));
  for (const ParameterSegment& s : parameters_.segments()) {
    const auto write_floats = [&](const char* suffix, const FlatArray& array) {
      std::vector<float> values = read_array(array, s);
      sink.write(s.name + suffix, {DType::F32, {s.rows, s.cols}, {}}, bytes_of(values));
    };
    const auto write_moment = [&](const char* suffix, const FlatArray& array) {
      if (options_.optimizer == Optimizer::adamw) return write_floats(suffix, array);
      const TensorType type = stored_moment(s);
      std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
      read_bytes(array, s, host);
      sink.write(s.name + suffix, type, host);
    };
    write_floats("", master_);
    write_moment(".m", first_moment_);
    write_moment(".v", second_moment_);
  }
}

void Trainer::load(StateSource& source) {
  std::int64_t step = 0;
  source.read("step", {DType::I64, {1}, {}},
              std::as_writable_bytes(std::span<std::int64_t>(&step, 1)));
  for (const ParameterSegment& s : parameters_.segments()) {
    std::vector<float> values(static_cast<std::size_t>(s.elements()));
    const auto read_floats = [&](const char* suffix) {
      source.read(s.name + suffix, {DType::F32, {s.rows, s.cols}, {}}, bytes_of(values));
    };
    const auto read_moment = [&](const char* suffix, const FlatArray& array) {
      if (options_.optimizer == Optimizer::adamw) {
        read_floats(suffix);
        return write_array(array, s, values);
      }
      const TensorType type = stored_moment(s);
      std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
      source.read(s.name + suffix, type, host);
      write_bytes(array, s, host);
    };
    read_floats("");
    set_parameter(s.name, values);
    read_moment(".m", first_moment_);
    read_moment(".v", second_moment_);
  }
  step_ = step;
}

std::int64_t Trainer::recorded_steps() const {
  std::int64_t steps = runtime_.steps();
  if (!options_.draft) return steps;
  const std::int64_t left_out = std::ssize(options_.buckets) * std::ssize(kLossShares) - 1;
  for (const std::vector<Program>* programs : {&micro_, &evaluate_}) {
    for (const Program& p : *programs) {
      steps += left_out * std::ssize(runtime_.plan(p.number).steps);
    }
  }
  return steps;
}

}  // namespace nibble
