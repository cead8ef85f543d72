// Running a conversion: pieces of tensors are encoded on a few threads and written in order, so
// that memory is a few pieces and the bytes do not depend on the number of threads.
//
// A piece is some rows of a tensor, or a whole tensor of planes, whose double quantization needs
// the mean over all blocks. Source pages are dropped after the last piece of a tensor.
#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>

#include "engine/os.h"
#include "engine/parallel.h"
#include "gguf-convert/convert.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/model_writer.h"
#include "gguf-convert/progress.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kPieceElements = std::int64_t{1} << 22;  // 16 MiB of F32

struct Piece {
  std::size_t tensor;
  std::int64_t begin, end;  // rows
  std::int64_t bytes;       // encoded
  bool last;                // of its tensor
};

std::vector<Piece> pieces_of(const ConvertPlan& plan) {
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const TensorType& type = plan.tensors[i].target;
    const std::int64_t rows = type.shape.rows(), cols = type.shape.cols();
    const std::int64_t step =
        is_plane(type.dtype) ? rows : std::max<std::int64_t>(1, kPieceElements / cols);
    const std::int64_t total = bytes(type);
    for (std::int64_t begin = 0; begin < rows; begin += step) {
      const std::int64_t end = std::min(rows, begin + step);
      const std::int64_t size = end - begin == rows ? total : total / rows * (end - begin);
      pieces.push_back({i, begin, end, size, end == rows});
    }
  }
  return pieces;
}

std::string mebibytes(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", bytes / (1024.0 * 1024.0));
  return text;
}

class Encoder {
 public:
  Encoder(const Checkpoint& source, const ConvertPlan& plan, const AdapterFile* adapter)
      : source_(source), plan_(plan), adapter_(adapter) {}

  // Encodes pieces[0..n) at once, each on its own thread.
  std::vector<std::vector<std::byte>> encode(std::span<const Piece> pieces) const {
    std::vector<std::vector<std::byte>> results(pieces.size());
    parallel_for(static_cast<int>(pieces.size()), std::ssize(pieces), [&](std::int64_t i, int) {
      const auto piece = static_cast<std::size_t>(i);
      results[piece] = encode(pieces[piece]);
    });
    return results;
  }

 private:
  std::vector<std::byte> encode(const Piece& piece) const {
    const PlannedTensor& planned = plan_.tensors[piece.tensor];
    const double scale = planned.adapter == nullptr ? 0.0 : adapter_->scale(*planned.adapter);
    std::vector<std::byte> out(static_cast<std::size_t>(piece.bytes));
    convert_rows(source_, *planned.source, planned.target, plan_.style, planned.adapter, scale,
                 piece.begin, piece.end, out);
    return out;
  }

  const Checkpoint& source_;
  const ConvertPlan& plan_;
  const AdapterFile* adapter_;
};

// Returns false when interrupted.
bool write_tensors(const Checkpoint& source, const ConvertPlan& plan, const AdapterFile* adapter,
                   std::size_t threads, ModelWriter& writer, Progress& progress) {
  const std::vector<Piece> pieces = pieces_of(plan);
  const Encoder encoder(source, plan, adapter);
  for (std::size_t next = 0; next < pieces.size();) {
    if (os::interrupted()) return false;
    const std::size_t count = std::min(threads, pieces.size() - next);
    const std::span<const Piece> batch(pieces.data() + next, count);
    const auto encoded = encoder.encode(batch);
    for (std::size_t i = 0; i < count; ++i) {
      writer.write(batch[i].tensor, encoded[i]);
      if (batch[i].last) source.forget(*plan.tensors[batch[i].tensor].source);
      progress.advance(batch[i].bytes);
    }
    next += count;
  }
  return true;
}

std::map<std::string, int> count_types(const ConvertPlan& plan) {
  std::map<std::string, int> counts;
  for (const PlannedTensor& planned : plan.tensors)
    ++counts[std::string(name(planned.target.dtype))];
  return counts;
}

std::string describe(const std::map<std::string, int>& counts) {
  std::string text;
  for (const auto& [type, count] : counts) {
    if (!text.empty()) text += ", ";
    text += std::to_string(count) + " " + type;
  }
  return text;
}

void print_plan(const ConvertRequest& request, const ConvertPlan& plan, std::ostream& out) {
  if (request.json) {
    nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
    for (const PlannedTensor& planned : plan.tensors) {
      tensors.push_back({{"name", planned.source->name},
                         {"from", name(planned.source->type.dtype)},
                         {"type", name(planned.target.dtype)},
                         {"bytes", bytes(planned.target)}});
    }
    const nlohmann::ordered_json json = {{"type", "plan"},
                                         {"path", request.destination},
                                         {"bytes", plan.bytes},
                                         {"types", count_types(plan)},
                                         {"tensors", tensors}};
    out << json.dump() << "\n";
    return;
  }
  for (const PlannedTensor& planned : plan.tensors) {
    out << planned.source->name << "  " << planned.source->type.str() << " -> "
        << name(planned.target.dtype) << "  " << bytes(planned.target) << " bytes\n";
  }
  out << "total  " << describe(count_types(plan)) << "  " << plan.bytes << " bytes ("
      << mebibytes(static_cast<double>(plan.bytes)) << "); nothing was written\n";
}

void print_verify(const VerifyReport& report, std::ostream& out) {
  const auto line = [&](const std::string& label, const TensorError& error) {
    char text[96];
    std::snprintf(text, sizeof text, "  max abs error %.6g  rms error %.6g relative\n",
                  error.max_abs, error.rms_relative);
    out << label << text;
  };
  for (const TensorError& tensor : report.tensors) {
    line(tensor.name + "  " + std::string(name(tensor.type.dtype)), tensor);
  }
  line("total  " + std::to_string(report.tensors.size()) + " tensors", report.total);
}

nlohmann::ordered_json verify_json(const VerifyReport& report) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
  for (const TensorError& tensor : report.tensors) {
    tensors.push_back({{"name", tensor.name},
                       {"type", name(tensor.type.dtype)},
                       {"max_abs_error", tensor.max_abs},
                       {"rms_error", tensor.rms_relative}});
  }
  return {{"tensors", tensors},
          {"max_abs_error", report.total.max_abs},
          {"rms_error", report.total.rms_relative}};
}

void refuse_same_place(const ConvertRequest& request) {
  std::error_code error;
  if (fs::equivalent(request.source, request.destination, error)) {
    throw UsageError(request.destination + ": source and destination are the same; name another");
  }
}

// The head size that an adapter's q and k rows are ordered by, from what it was trained on.
std::int64_t head_dim_of(const std::string& base) {
  std::error_code error;
  if (base.empty() || !fs::exists(base, error)) return 0;
  fs::path config = base;
  if (fs::is_directory(config, error)) config /= "config.json";
  if (config.extension() == ".gguf") return config_from_gguf(GgufFile(config.string())).head_dim;
  if (!fs::exists(config, error)) return 0;
  return config_from_json(os::read_file(config.string()), config.string()).head_dim;
}

int convert_adapter(const ConvertRequest& request, std::ostream& out) {
  if (request.verify || !request.adapter.empty() || request.options.head ||
      request.options.no_quant) {
    throw UsageError(
        "an adapter is written in F32; --verify, --adapter, --head and --no-quant "
        "are for models");
  }
  const double start = os::seconds();
  AdapterFile adapter = read_adapter(request.source);
  if (!request.base.empty()) {
    adapter.head_dim = head_dim_of(request.base);
    if (adapter.head_dim == 0) throw Error(request.base + ": --base is not a model");
  } else if (adapter.head_dim == 0) {
    adapter.head_dim = head_dim_of(adapter.base_name);
  }
  const bool gguf = request.options.container == Container::gguf;
  try {
    set_rope_style(adapter, gguf ? RopeStyle::adjacent : RopeStyle::half);
  } catch (const Error& e) {
    throw Error(request.source + ": " + e.what() + " with --base");
  }
  if (!request.dry_run && gguf) write_gguf_lora(adapter, request.destination);
  if (!request.dry_run && !gguf) write_peft(adapter, request.destination);
  if (request.json) {
    const nlohmann::ordered_json json = {{"type", request.dry_run ? "plan" : "convert"},
                                         {"path", request.destination},
                                         {"tensors", adapter.tensors.size()},
                                         {"seconds", os::seconds() - start}};
    out << json.dump() << "\n";
  } else {
    out << (request.dry_run ? "would write " : "wrote ") << request.destination << ": adapter of "
        << adapter.tensors.size() << " linears\n";
  }
  return 0;
}

void report_done(const ConvertRequest& request, const ConvertPlan& plan, double seconds,
                 const VerifyReport* report, std::ostream& out) {
  if (request.json) {
    nlohmann::ordered_json json = {
        {"type", "convert"},   {"path", request.destination},
        {"bytes", plan.bytes}, {"types", count_types(plan)},
        {"seconds", seconds},  {"peak_bytes", os::peak_resident_bytes()}};
    if (report != nullptr) json["verify"] = verify_json(*report);
    out << json.dump() << "\n";
    return;
  }
  if (report != nullptr) print_verify(*report, out);
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", seconds);
  out << "wrote " << request.destination << ": " << describe(count_types(plan)) << "; "
      << mebibytes(static_cast<double>(plan.bytes)) << " of tensors in " << text << "\n";
}

}  // namespace

int convert(const ConvertRequest& request, std::ostream& out, std::ostream& log) {
  refuse_same_place(request);
  if (is_adapter(request.source)) return convert_adapter(request, out);
  if (!request.base.empty()) throw UsageError("--base is for converting an adapter");

  const double start = os::seconds();
  const auto source = open_checkpoint(request.source);
  std::optional<AdapterFile> adapter;
  if (!request.adapter.empty()) {
    adapter = read_adapter(request.adapter, source->config());
    set_rope_style(*adapter, converted_rope_style(request.options));
  }
  const AdapterFile* merged = adapter ? &*adapter : nullptr;
  const ConvertPlan plan = plan_conversion(*source, request.options, merged);
  for (const std::string& warning : plan.warnings) log << warning << "\n";
  if (request.dry_run) {
    print_plan(request, plan, out);
    return 0;
  }

  {
    const auto writer =
        request.options.container == Container::gguf
            ? make_gguf_writer(*source, plan, request.options, request.destination)
            : make_hf_writer(*source, plan, request.options, request.source, request.destination);
    Progress progress("writing", plan.bytes, request.terminal, log);
    const auto threads = static_cast<std::size_t>(std::max(1, request.threads));
    if (!write_tensors(*source, plan, merged, threads, *writer, progress)) {
      log << "interrupted; nothing was written\n";
      return 130;
    }
    writer->finish();
  }
  const double seconds = os::seconds() - start;
  std::optional<VerifyReport> report;
  if (request.verify) {
    const auto written = open_checkpoint(request.destination);
    report = verify_conversion(*source, plan, merged, *written);
  }
  report_done(request, plan, seconds, report ? &*report : nullptr, out);
  return 0;
}

}  // namespace nibble
