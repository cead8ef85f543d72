#include "tools/inspect.h"

#include <CLI/CLI.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>

#include "engine/error.h"
#include "gguf-convert/adapter.h"
#include "gguf-convert/gguf.h"
#include "tools/text.h"
#include "tools/tiny_model.h"

namespace nibble {
namespace {

using Json = nlohmann::ordered_json;

std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

Json value_json(const GgufValue& value) {
  if (const auto* array = std::get_if<GgufArray>(&value)) {
    return std::visit(
        [](const auto& items) {
          Json list = Json::array();
          for (std::size_t i = 0; i < items.size() && i < 8; ++i) list.push_back(Json(items[i]));
          if (items.size() > 8) list.push_back("... " + std::to_string(items.size()) + " in all");
          return list;
        },
        array->items);
  }
  return std::visit(
      [](const auto& v) -> Json {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, GgufArray>) {
          return nullptr;
        } else {
          return v;
        }
      },
      value);
}

void print_metadata(const GgufFile& file, std::ostream& out) {
  for (const auto& [key, value] : file.metadata()) {
    out << "  " << key << " = " << one_line(dump(value_json(value)), 160) << "\n";
  }
}

int inspect_adapter(const InspectRequest& r, std::ostream& out) {
  const AdapterFile adapter = read_adapter(r.path);
  if (r.json) {
    Json tensors = Json::array();
    for (const AdapterTensor& t : adapter.tensors) {
      tensors.push_back({{"name", t.name},
                         {"in", t.in},
                         {"out", t.out},
                         {"rank", t.rank},
                         {"scale", adapter.scale(t)}});
    }
    out << dump({{"kind", "adapter"}, {"tensors", tensors}}) << "\n";
    return 0;
  }
  std::int64_t elements = 0;
  for (const AdapterTensor& t : adapter.tensors) {
    elements += t.rank * (t.in + t.out);
    out << format("  %-32s A [%lld, %lld]  B [%lld, %lld]  scale %g\n", t.name.c_str(),
                  static_cast<long long>(t.rank), static_cast<long long>(t.in),
                  static_cast<long long>(t.out), static_cast<long long>(t.rank), adapter.scale(t));
  }
  out << r.path << ": LoRA adapter, " << adapter.tensors.size() << " linears, "
      << count_text(elements) << " parameters\n";
  return 0;
}

int inspect_plain_gguf(const InspectRequest& r, const GgufFile& file, std::ostream& out) {
  if (r.json) {
    Json tensors = Json::array();
    for (const GgufTensor& t : file.tensors()) {
      tensors.push_back({{"name", t.name}, {"type", t.type.str()}, {"bytes", t.bytes.size()}});
    }
    out << dump({{"kind", "gguf"}, {"tensors", tensors}}) << "\n";
    return 0;
  }
  print_metadata(file, out);
  for (const GgufTensor& t : file.tensors()) {
    out << format("  %-40s %s\n", t.name.c_str(), t.type.str().c_str());
  }
  out << r.path << ": GGUF, " << file.tensors().size() << " tensors\n";
  return 0;
}

Json config_json(const ModelConfig& c) {
  return {{"architecture", c.architecture},
          {"name", c.name},
          {"vocab", c.vocab},
          {"hidden", c.hidden},
          {"feed_forward", c.feed_forward},
          {"layers", c.layers},
          {"heads", c.heads},
          {"kv_heads", c.kv_heads},
          {"head_dim", c.head_dim},
          {"context", c.context},
          {"rms_eps", c.rms_eps},
          {"rope_theta", c.rope_theta},
          {"rope_pairs", c.rope_style == RopeStyle::half ? "half" : "adjacent"},
          {"tied_embeddings", c.tied_embeddings}};
}

int inspect_model(const InspectRequest& r, const Checkpoint& model, std::ostream& out) {
  std::int64_t elements = 0, total = 0;
  std::map<std::string, std::pair<std::int64_t, std::int64_t>> by_type;  // tensors, bytes
  Json tensors = Json::array();
  for (const Checkpoint::Tensor& t : model.tensors()) {
    elements += t.type.elements();
    total += bytes(t.type);
    auto& [count, size] = by_type[std::string(name(t.type.dtype))];
    ++count;
    size += bytes(t.type);
    if (r.json) {
      tensors.push_back({{"name", t.name}, {"type", t.type.str()}, {"bytes", bytes(t.type)}});
    } else {
      out << format("  %-32s %-24s %12s\n", t.name.c_str(), t.type.str().c_str(),
                    size_text(bytes(t.type)).c_str());
    }
  }
  if (r.json) {
    out << dump({{"kind", "model"},
                 {"config", config_json(model.config())},
                 {"parameters", elements},
                 {"bytes", total},
                 {"tensors", tensors}})
        << "\n";
    return 0;
  }
  const Json config = config_json(model.config());
  for (const auto& [key, value] : config.items()) {
    out << "  " << key << " = " << dump(value) << "\n";
  }
  if (model.has_tokenizer()) {
    const TokenizerSpec t = model.tokenizer();
    out << "  tokenizer = " << t.model << (t.pre.empty() ? "" : " / " + t.pre) << ", "
        << t.tokens.size() << " tokens" << (t.chat_template.empty() ? "" : ", chat template")
        << "\n";
  }
  out << r.path << ": " << count_text(elements) << " parameters, " << size_text(total) << " (";
  bool first = true;
  for (const auto& [type, sum] : by_type) {
    out << (first ? "" : ", ") << sum.first << " x " << type << " " << size_text(sum.second);
    first = false;
  }
  out << ")\n";
  return 0;
}

}  // namespace

void add_inspect_flags(CLI::App& command, InspectRequest& r) {
  command.add_option("FILE", r.path, "model, adapter, checkpoint, random:CONFIG.json or tiny")
      ->required();
  command.add_flag("--metadata", r.metadata, "show a GGUF file's keys");
  command.add_flag("--json", r.json, "one JSON object");
}

int inspect_command(const InspectRequest& r, std::ostream& out, std::ostream&) {
  if (is_adapter(r.path)) return inspect_adapter(r, out);
  if (r.path.ends_with(".gguf")) {
    const GgufFile file(r.path);
    if (!file.has("general.architecture")) return inspect_plain_gguf(r, file, out);
    if (r.metadata && !r.json) print_metadata(file, out);
  }
  return inspect_model(r, *open_model_source(r.path), out);
}

}  // namespace nibble
