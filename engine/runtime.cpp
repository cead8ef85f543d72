#include "engine/runtime.h"

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/quantize.h"

namespace nibble {

int Runtime::add(std::unique_ptr<Graph> graph) {
  Program program;
  PlaceHint hint{arena_bytes()};
  if (!programs_.empty()) hint.search = programs_.front().plan.search;
  program.plan = make_plan(*graph, backend_, layout_, hint);
  for (std::int32_t id = 0; id < graph->size(); ++id) {
    const Node& n = graph->node(id);
    if (n.kind == NodeKind::op) continue;
    const std::string& name = graph->name(id);
    const auto [at, is_new] = numbers_.try_emplace(name, leaves_.size());
    if (is_new) leaves_.push_back({name, n.kind});
    Leaf& leaf = leaves_[at->second];
    if (leaf.kind != n.kind) throw Error("leaf \"" + name + "\" has two kinds");
    leaf.bytes = std::max(leaf.bytes, bytes(n.outputs[0]));
  }
  program.graph = std::move(graph);
  programs_.push_back(std::move(program));
  return static_cast<int>(programs_.size()) - 1;
}

void Runtime::bind(std::string_view name, std::byte* address) {
  bound_.insert_or_assign(std::string(name), address);
}

std::int64_t Runtime::unbound_bytes(NodeKind kind) const {
  const std::int64_t alignment = backend_.info().alignment;
  std::int64_t sum = 0;
  for (const Leaf& leaf : leaves_) {
    if (leaf.kind == kind && !bound_.contains(leaf.name)) sum += round_up(leaf.bytes, alignment);
  }
  return sum;
}

std::int64_t Runtime::input_bytes() const {
  return round_up(unbound_bytes(NodeKind::input), backend_.info().allocation_bytes);
}
std::int64_t Runtime::state_bytes() const {
  return round_up(unbound_bytes(NodeKind::state), backend_.info().allocation_bytes);
}
std::int64_t Runtime::page_bytes() const { return unbound_bytes(NodeKind::page); }

std::int64_t Runtime::arena_bytes() const {
  std::int64_t most = 0;
  for (const Program& p : programs_) most = std::max(most, p.plan.arena_bytes);
  return round_up(most, backend_.info().allocation_bytes);
}

std::int64_t Runtime::steps() const {
  std::int64_t sum = 0;
  for (const Program& p : programs_) sum += std::ssize(p.plan.steps);
  return sum;
}

void Runtime::prepare() {
  for (Program& p : programs_) p.executable->prepare();
}

void Runtime::clear_states() { backend_.clear(states_->data(), states_->size()); }

void Runtime::allocate() {
  if (layout_ != Layout::search) throw Error("a draft has no layout to allocate");
  arena_ = backend_.allocate(arena_bytes(), "arena");
  inputs_ = backend_.allocate(input_bytes(), "inputs");
  states_ = backend_.allocate(state_bytes(), "states");
  backend_.clear(inputs_->data(), inputs_->size());
  clear_states();
  if (page_bytes() > 0) pages_ = backend_.allocate_host(page_bytes(), "pages");
  const std::int64_t alignment = backend_.info().alignment;
  std::map<NodeKind, std::byte*> next = {{NodeKind::input, inputs_->data()},
                                         {NodeKind::state, states_->data()},
                                         {NodeKind::page, pages_ ? pages_->data() : nullptr}};
  for (Leaf& leaf : leaves_) {
    if (const auto found = bound_.find(leaf.name);
        found != bound_.end() && found->second != nullptr) {
      leaf.address = found->second;
      leaf.bound = true;
      continue;
    }
    if (bound_.contains(leaf.name) || !next.contains(leaf.kind)) {
      throw Error("\"" + leaf.name + "\" is read by the program but has no memory bound to it");
    }
    std::byte*& address = next[leaf.kind];
    leaf.address = address;
    address += round_up(leaf.bytes, alignment);
  }
  for (Program& p : programs_) {
    Bindings bindings;
    bindings.arena = arena_->data();
    bindings.leaves.resize(static_cast<std::size_t>(p.graph->size()));
    for (std::int32_t id = 0; id < p.graph->size(); ++id) {
      if (p.graph->node(id).kind != NodeKind::op) {
        bindings.leaves[static_cast<std::size_t>(id)] =
            leaves_[numbers_.at(p.graph->name(id))].address;
      }
    }
    p.executable = backend_.compile(p.plan, bindings);
  }
}

const Runtime::Leaf& Runtime::leaf(std::string_view name, std::size_t size) const {
  const auto found = numbers_.find(name);
  if (found == numbers_.end()) throw Error("no program has a leaf \"" + std::string(name) + "\"");
  const Leaf& leaf = leaves_[found->second];
  if (static_cast<std::int64_t>(size) > leaf.bytes) {
    throw ShapeError("leaf \"" + leaf.name + "\" holds " + std::to_string(leaf.bytes) +
                     " bytes, not " + std::to_string(size));
  }
  return leaf;
}

void Runtime::write(std::string_view name, std::span<const std::byte> bytes) {
  backend_.upload(leaf(name, bytes.size()).address, bytes);
}

void Runtime::read(std::string_view name, std::span<std::byte> bytes) const {
  backend_.download(bytes, leaf(name, bytes.size()).address);
}

void Runtime::read(int program, Ref ref, std::span<std::byte> out) const {
  const Program& p = programs_[static_cast<std::size_t>(program)];
  const Location& location = p.plan.at(ref);
  if (static_cast<std::int64_t>(out.size()) > bytes(p.graph->type(ref))) {
    throw ShapeError("read past the end of %" + std::to_string(ref.node));
  }
  switch (location.kind) {
    case Location::Kind::arena:
      backend_.download(out, arena_->data() + location.offset);
      return;
    case Location::Kind::leaf:
      backend_.download(out, leaf(p.graph->name(location.leaf), out.size()).address);
      return;
    case Location::Kind::none:
      break;
  }
  throw Error("%" + std::to_string(ref.node) + " was not kept: keep() it before planning");
}

std::vector<std::byte> encode(const TensorType& type, std::span<const double> values) {
  if (static_cast<std::int64_t>(values.size()) != type.elements()) {
    throw ShapeError(type.str() + " cannot hold " + std::to_string(values.size()) + " values");
  }
  std::vector<std::byte> out(static_cast<std::size_t>(bytes(type)));
  const auto each = [&](auto convert) {
    using T = decltype(convert(0.0));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const T value = convert(values[i]);
      std::memcpy(out.data() + i * sizeof(T), &value, sizeof(T));
    }
  };
  switch (type.dtype) {
    case DType::F64:
      each([](double v) { return v; });
      break;
    case DType::F32:
      each([](double v) { return static_cast<float>(v); });
      break;
    case DType::BF16:
      each([](double v) { return to_bf16(static_cast<float>(v)); });
      break;
    case DType::F16:
      each([](double v) { return to_f16(static_cast<float>(v)); });
      break;
    case DType::I64:
      each([](double v) { return static_cast<std::int64_t>(v); });
      break;
    case DType::I32:
      each([](double v) { return static_cast<std::int32_t>(v); });
      break;
    case DType::I8:
      each([](double v) { return static_cast<std::int8_t>(v); });
      break;
    case DType::U8:
      each([](double v) { return static_cast<std::uint8_t>(v); });
      break;
    default: {
      const std::vector<float> narrow(values.begin(), values.end());
      quantize(type, narrow, out);
    }
  }
  return out;
}

std::vector<double> decode(const TensorType& type, const std::byte* data) {
  std::vector<double> out(static_cast<std::size_t>(type.elements()));
  const auto each = [&](auto widen, auto example) {
    using T = decltype(example);
    for (std::size_t i = 0; i < out.size(); ++i) {
      T value;
      std::memcpy(&value, data + i * sizeof(T), sizeof(T));
      out[i] = static_cast<double>(widen(value));
    }
  };
  const auto same = [](auto v) { return v; };
  switch (type.dtype) {
    case DType::F64:
      each(same, 0.0);
      break;
    case DType::I64:
      each(same, std::int64_t{});
      break;
    case DType::I32:
      each(same, std::int32_t{});
      break;
    case DType::I8:
      each(same, std::int8_t{});
      break;
    case DType::U8:
      each(same, std::uint8_t{});
      break;
    default: {
      std::vector<float> values(out.size());
      dequantize(type, data, 0, values);
      std::copy(values.begin(), values.end(), out.begin());
    }
  }
  return out;
}

std::vector<std::vector<double>> eval(Backend& backend, Graph& graph,
                                      std::span<const Tensor> outputs,
                                      const std::map<std::string, std::vector<double>>& feeds) {
  for (const Tensor& t : outputs) graph.keep(t);
  const Plan plan = make_plan(graph, backend);
  std::vector<std::unique_ptr<Buffer>> buffers;
  Bindings bindings;
  bindings.leaves.resize(static_cast<std::size_t>(graph.size()));
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    const Node& n = graph.node(id);
    if (n.kind == NodeKind::op) continue;
    buffers.push_back(
        backend.allocate(std::max<std::int64_t>(bytes(n.outputs[0]), 1), graph.name(id)));
    bindings.leaves[static_cast<std::size_t>(id)] = buffers.back()->data();
    const auto feed = feeds.find(graph.name(id));
    if (feed != feeds.end()) {
      backend.upload(buffers.back()->data(), encode(n.outputs[0], feed->second));
    } else if (n.kind == NodeKind::state || n.kind == NodeKind::page) {
      backend.clear(buffers.back()->data(), buffers.back()->size());
    } else {
      throw Error("eval: no value was given for \"" + graph.name(id) + "\"");
    }
  }
  const auto arena = backend.allocate(std::max<std::int64_t>(plan.arena_bytes, 1), "arena");
  bindings.arena = arena->data();
  backend.compile(plan, bindings)->run();
  std::vector<std::vector<double>> results;
  for (const Tensor& t : outputs) {
    const Location& location = plan.at({t.node, t.output});
    const std::byte* address = location.kind == Location::Kind::arena
                                   ? arena->data() + location.offset
                                   : bindings.leaves[static_cast<std::size_t>(location.leaf)];
    std::vector<std::byte> host(static_cast<std::size_t>(bytes(t.type())));
    backend.download(host, address);
    results.push_back(decode(t.type(), host.data()));
  }
  return results;
}

}  // namespace nibble
