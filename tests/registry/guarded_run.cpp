#include "tests/registry/guarded_run.h"

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "tests/registry/case.h"

namespace nibble::registry {
namespace {

constexpr std::byte kPoison{0xff};
constexpr std::int64_t kGuard = 1024;  // bytes on each side, more than any vector or tile row

std::size_t index(std::int32_t i) { return static_cast<std::size_t>(i); }

// Bytes of a leaf on the backend, and where each plane of the host layout goes there.
std::int64_t device_bytes(const TensorType& type, std::int64_t alignment) {
  return is_plane(type.dtype) ? planes(type, alignment).bytes : bytes(type);
}

struct Move {
  std::int64_t host, device, bytes;
};
std::vector<Move> moves(const TensorType& type, std::int64_t alignment) {
  if (!is_plane(type.dtype)) return {{0, 0, bytes(type)}};
  const Planes h = planes(type), d = planes(type, alignment);
  return {{h.codes, d.codes, h.codes_bytes},
          {h.absmax, d.absmax, h.absmax_bytes},
          {h.scale, d.scale, h.scale_bytes},
          {h.offset, d.offset, h.offset_bytes},
          {h.map, d.map, h.map_bytes}};
}

bool all_poison(const std::vector<std::byte>& bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == kPoison; });
}

}  // namespace

std::byte* GuardedRun::Region::body() const { return buffer->data() + front; }

GuardedRun::GuardedRun(Backend& backend, const Plan& plan,
                       std::vector<std::vector<std::byte>> leaves)
    : backend_(backend), plan_(plan), contents_(std::move(leaves)) {
  const Graph& graph = *plan.graph;
  const std::int64_t plane_alignment = backend.info().plane_alignment;
  contents_.resize(index(graph.size()));
  leaves_.resize(index(graph.size()));
  Bindings bindings;
  bindings.leaves.resize(index(graph.size()));
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    const Node& node = graph.node(id);
    if (node.kind == NodeKind::op) continue;
    if (static_cast<std::int64_t>(contents_[index(id)].size()) != bytes(node.outputs[0])) {
      throw Error("no contents for leaf \"" + graph.name(id) + "\"");
    }
    leaves_[index(id)] =
        make_region(device_bytes(node.outputs[0], plane_alignment), graph.name(id));
    bindings.leaves[index(id)] = leaves_[index(id)].body();
  }
  arena_ = make_region(plan.arena_bytes, "arena");
  bindings.arena = arena_.body();
  executable_ = backend.compile(plan, bindings);
  reset();
}

GuardedRun::Region GuardedRun::make_region(std::int64_t bytes, const std::string& purpose) const {
  const std::int64_t alignment = backend_.info().alignment;
  Region region;
  region.bytes = bytes;
  // Buffers may be aligned better than promised: an odd multiple shows kernels that rely on it.
  region.front = round_up(kGuard, alignment);
  if (region.front / alignment % 2 == 0) region.front += alignment;
  region.buffer = backend_.allocate(region.front + bytes + kGuard, purpose);
  return region;
}

void GuardedRun::poison(const Region& region) const {
  const std::vector<std::byte> fill(static_cast<std::size_t>(region.buffer->size()), kPoison);
  backend_.upload(region.buffer->data(), fill);
}

void GuardedRun::reset() {
  poison(arena_);
  for (std::int32_t id = 0; id < plan_.graph->size(); ++id) {
    if (plan_.graph->node(id).kind != NodeKind::op) set_leaf(id, std::move(contents_[index(id)]));
  }
}

void GuardedRun::set_leaf(std::int32_t node, std::vector<std::byte> contents) {
  const Region& region = leaves_[index(node)];
  poison(region);
  const TensorType& type = plan_.graph->node(node).outputs[0];
  for (const Move& m : moves(type, backend_.info().plane_alignment)) {
    if (m.bytes == 0) continue;
    backend_.upload(region.body() + m.device,
                    {contents.data() + m.host, static_cast<std::size_t>(m.bytes)});
  }
  contents_[index(node)] = std::move(contents);
}

std::vector<std::byte> GuardedRun::download(const std::byte* from, std::int64_t bytes) const {
  std::vector<std::byte> host(static_cast<std::size_t>(bytes));
  backend_.download(host, from);
  return host;
}

std::vector<std::byte> GuardedRun::value(Ref ref) const {
  const Location& at = plan_.at(ref);
  if (at.kind == Location::Kind::leaf) return leaf(at.leaf);
  if (at.kind == Location::Kind::none) throw Error("the plan has no place for this value");
  return download(arena_.body() + at.offset, bytes(plan_.graph->type(ref)));
}

std::vector<std::byte> GuardedRun::leaf(std::int32_t node) const {
  const TensorType& type = plan_.graph->node(node).outputs[0];
  const std::vector<std::byte> all =
      download(leaves_[index(node)].body(), leaves_[index(node)].bytes);
  std::vector<std::byte> host(static_cast<std::size_t>(bytes(type)));
  for (const Move& m : moves(type, backend_.info().plane_alignment)) {
    std::copy_n(all.begin() + m.device, m.bytes, host.begin() + m.host);
  }
  return host;
}

bool GuardedRun::guards_intact(const Region& region) const {
  const std::byte* end = region.body() + region.bytes;
  return all_poison(download(region.buffer->data(), region.front)) &&
         all_poison(download(end, kGuard));
}

std::vector<bool> GuardedRun::writable_leaves() const {
  const Graph& graph = *plan_.graph;
  std::vector<bool> writable(index(graph.size()));
  for (const std::int32_t id : plan_.steps) {
    const Node& node = graph.node(id);
    for (int i = 0; i < node.n_inputs; ++i) {
      if ((written_inputs(node.op) >> i & 1) == 0) continue;
      writable[index(state_root(graph, node.inputs[static_cast<std::size_t>(i)]).node)] = true;
    }
    for (int o = 0; o < node.n_outputs; ++o) {  // a plan may place a value in a leaf
      const Location& at = plan_.at({id, o});
      if (at.kind == Location::Kind::leaf) writable[index(at.leaf)] = true;
    }
  }
  return writable;
}

std::string GuardedRun::damage() const {
  const Graph& graph = *plan_.graph;
  const std::vector<bool> writable = writable_leaves();
  for (std::int32_t id = 0; id < graph.size(); ++id) {
    if (graph.node(id).kind != NodeKind::op) {
      if (!guards_intact(leaves_[index(id)]))
        return "wrote outside leaf \"" + graph.name(id) + "\"";
      if (!writable[index(id)] && leaf(id) != contents_[index(id)]) {
        return "changed leaf \"" + graph.name(id) + "\", which it may only read";
      }
    }
  }
  if (!guards_intact(arena_)) return "wrote outside the arena";
  std::vector<std::byte> arena = download(arena_.body(), arena_.bytes);
  const auto allow = [&](std::int64_t offset, std::int64_t count) {
    std::fill_n(arena.begin() + offset, count, kPoison);
  };
  for (const std::int32_t id : plan_.steps) {
    for (int o = 0; o < graph.node(id).n_outputs; ++o) {
      const Location& at = plan_.at({id, o});
      if (at.kind == Location::Kind::arena) allow(at.offset, bytes(graph.type({id, o})));
    }
    const std::int64_t scratch = plan_.scratch[index(id)];
    if (scratch >= 0) allow(scratch, backend_.scratch_bytes(describe(graph, id)));
  }
  const auto bad =
      std::find_if(arena.begin(), arena.end(), [](std::byte b) { return b != kPoison; });
  if (bad == arena.end()) return {};
  return "wrote byte " + std::to_string(bad - arena.begin()) +
         " of the arena, which belongs to no value and no scratch";
}

}  // namespace nibble::registry
