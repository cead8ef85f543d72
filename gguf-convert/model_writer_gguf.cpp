// Converted tensors into a GGUF file. Stock files have llama.cpp's keys and one tensor per tensor;
// in an NF4 file each quantized tensor becomes its planes, one after the other at the offsets of
// planes() in engine/dtype.h, so that readers use them from the mapping as they are.
#include "engine/error.h"
#include "gguf-convert/checkpoint_formats.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/model_writer.h"

namespace nibble {
namespace {

// llama.cpp's enum llama_ftype, which is not ggml_type.
std::uint32_t file_type(DType dtype) {
  switch (dtype) {
    case DType::F16:
      return 1;
    case DType::Q8_0:
      return 7;
    case DType::BF16:
      return 32;
    default:
      return 0;
  }
}

class GgufModelWriter final : public ModelWriter {
 public:
  GgufModelWriter(const Checkpoint& source, const ConvertPlan& plan, const ConvertOptions& options,
                  const std::string& path)
      : plan_(plan), divisors_(source.config().rope_freq_divisors), writer_(path) {
    ModelConfig config = source.config();
    config.rope_style = plan.style;
    write_config(config, writer_);
    writer_.set_u32("general.quantization_version", 2);
    if (options.type == DType::NF4) {
      writer_.set_u32(kQuantVersionKey, kQuantVersion);
      writer_.set_string(kQuantTypeKey, "nf4");
      writer_.set_u32(kQuantBlockKey, static_cast<std::uint32_t>(options.quant.block));
    } else {
      writer_.set_u32("general.file_type", file_type(options.type));
    }
    if (source.has_tokenizer()) write_tokenizer(source.tokenizer(), writer_);
    if (config.rope_scaling.kind == RopeScaling::Kind::linear) divisors_.clear();  // has a key
    for (const PlannedTensor& planned : plan.tensors) announce(planned, options);
    if (!divisors_.empty()) {
      const auto pairs = static_cast<std::int64_t>(divisors_.size());
      writer_.add("rope_freqs.weight", {DType::F32, {pairs}, {}});
    }
    writer_.begin();
  }

  void write(std::size_t index, std::span<const std::byte> bytes) override {
    const TensorType& type = plan_.tensors[index].target;
    if (!is_plane(type.dtype)) {
      writer_.write(bytes);
      return;
    }
    const Planes p = planes(type);
    const auto plane = [&](std::int64_t offset, std::int64_t size) {
      if (size == 0) return;
      writer_.write(
          bytes.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(size)));
    };
    plane(p.codes, p.codes_bytes);
    plane(p.absmax, p.absmax_bytes);
    plane(p.scale, p.scale_bytes);
    plane(p.offset, p.offset_bytes);
    plane(p.map, p.map_bytes);
  }

  void finish() override {
    writer_.write(std::as_bytes(std::span<const float>(divisors_)));
    writer_.finish();
  }

 private:
  void announce(const PlannedTensor& planned, const ConvertOptions& options) {
    const std::string& name = planned.source->name;
    const TensorType& type = planned.target;
    if (!is_plane(type.dtype)) {
      writer_.add(name, type);
      return;
    }
    const Planes p = planes(type);
    const std::int64_t rows = type.shape.rows(), cols = type.shape.cols();
    if (type.quant.block != options.quant.block) {
      writer_.set_u32(std::string(kQuantBlockKey) + "." + name,
                      static_cast<std::uint32_t>(type.quant.block));
    }
    Shape codes{rows, cols / 2};
    if (cols % 2 != 0) {
      codes = {p.codes_bytes};
      const std::int64_t extents[] = {rows, cols};
      writer_.set_i64s(std::string(kQuantShapeKey) + "." + name, extents);
    }
    const DType absmax = type.quant.double_quant ? DType::I8 : DType::F32;
    const std::int64_t floats = static_cast<std::int64_t>(sizeof(float));
    writer_.add(name + kPlaneSuffixes[0], {DType::I8, codes, {}});
    writer_.add(name + kPlaneSuffixes[1], {absmax, {p.blocks}, {}});
    if (p.scale_bytes > 0) add_floats(name + kPlaneSuffixes[2], p.scale_bytes / floats);
    if (p.offset_bytes > 0) add_floats(name + kPlaneSuffixes[3], p.offset_bytes / floats);
    if (p.map_bytes > 0) add_floats(name + kPlaneSuffixes[4], p.map_bytes / floats);
  }

  void add_floats(const std::string& name, std::int64_t count) {
    writer_.add(name, {DType::F32, {count}, {}});
  }

  const ConvertPlan& plan_;
  std::vector<float> divisors_;
  GgufWriter writer_;
};

}  // namespace

std::unique_ptr<ModelWriter> make_gguf_writer(const Checkpoint& source, const ConvertPlan& plan,
                                              const ConvertOptions& options,
                                              const std::string& path) {
  return std::make_unique<GgufModelWriter>(source, plan, options, path);
}

}  // namespace nibble
