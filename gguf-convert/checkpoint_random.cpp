// A checkpoint that exists only as a config.json: weights are drawn, not read, so that speed and
// memory can be measured at a shape whose weights nobody has to download.
//
// Element i of tensor t is N(0, initializer_range) from philox(seed, hash(name of t), i), rounded
// to BF16; norms are F32 ones. An element depends on nothing else, so any range of any tensor can
// be made at any time on any thread, and is the same everywhere.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <vector>

#include "engine/error.h"
#include "engine/float16.h"
#include "engine/os.h"
#include "engine/parallel.h"
#include "engine/philox.h"
#include "gguf-convert/checkpoint_formats.h"

namespace nibble {
namespace {

// Both normals of one philox block, with the arithmetic of philox_normal().
struct NormalPair {
  float first, second;
};

NormalPair normal_pair(std::uint64_t key, std::uint64_t stream, std::uint64_t pair) {
  const PhiloxBlock r =
      philox(key, {static_cast<std::uint32_t>(pair), static_cast<std::uint32_t>(pair >> 32),
                   static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)});
  const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(uniform(r[0]))));
  const double angle = 6.283185307179586 * static_cast<double>(uniform(r[1]));
  return {static_cast<float>(radius * std::cos(angle)),
          static_cast<float>(radius * std::sin(angle))};
}

class RandomCheckpoint final : public Checkpoint {
 public:
  RandomCheckpoint(const std::string& path, std::uint64_t seed)
      : path_(path), config_(config_from_json(os::read_file(path), path)), seed_(seed) {
    if (config_.name.empty()) config_.name = std::filesystem::path(path).stem().string();
    for (const TensorSpec& spec : model_tensors(config_)) {
      const DType dtype = spec.shape.rank() == 1 ? DType::F32 : DType::BF16;
      tensors_.push_back({spec.name, {dtype, spec.shape, {}}, path});
    }
  }

  const ModelConfig& config() const override { return config_; }
  const std::vector<Tensor>& tensors() const override { return tensors_; }
  std::span<const std::byte> mapped(const Tensor&) const override { return {}; }

  void read(const Tensor& tensor, std::span<std::byte> out) const override {
    if (static_cast<std::int64_t>(out.size()) != bytes(tensor.type)) {
      throw ShapeError(tensor.name + ": wrong size of destination");
    }
    const bool wide = tensor.type.dtype == DType::F32;
    const std::int64_t size = wide ? sizeof(float) : sizeof(bf16);
    in_parts(tensor.type.elements(), [&](std::int64_t begin, std::int64_t count) {
      std::byte* next = out.data() + begin * size;
      each(tensor, begin, count, [&](float value) {
        const bf16 rounded = to_bf16(value);
        std::memcpy(next, wide ? static_cast<const void*>(&value) : &rounded,
                    static_cast<std::size_t>(size));
        next += size;
      });
    });
  }

  void read_f32(const Tensor& tensor, std::int64_t begin, std::span<float> out) const override {
    const auto count = static_cast<std::int64_t>(out.size());
    if (begin < 0 || count > tensor.type.elements() - begin) {
      throw ShapeError(tensor.name + ": range outside the tensor");
    }
    in_parts(count, [&](std::int64_t part, std::int64_t part_count) {
      float* next = out.data() + part;
      each(tensor, begin + part, part_count, [&](float value) { *next++ = value; });
    });
  }

  void forget(const Tensor&) const override {}
  // The tokenizer that lies beside the configuration, if one does.
  bool has_tokenizer() const override { return has_tokenizer_files(directory()); }
  TokenizerSpec tokenizer() const override {
    if (has_tokenizer()) return tokenizer_from_directory(directory());
    throw Unsupported("random:" + path_ + " has no tokenizer; one beside it would be used");
  }

 private:
  std::string directory() const {
    const std::string parent = std::filesystem::path(path_).parent_path().string();
    return parent.empty() ? "." : parent;
  }
  // Calls work(begin, count) for parts of [0, count), a thread each.
  template <class Work>
  static void in_parts(std::int64_t count, const Work& work) {
    constexpr std::int64_t kPart = 1 << 22;
    const std::int64_t wanted = (count + kPart - 1) / kPart;
    const std::int64_t parts = std::min<std::int64_t>(wanted, os::physical_cores());
    if (parts <= 1) return work(0, count);
    const std::int64_t each = (count + parts - 1) / parts;
    parallel_for(static_cast<int>(parts), parts, [&](std::int64_t part, int) {
      const std::int64_t begin = std::min(part * each, count);
      work(begin, std::min(each, count - begin));
    });
  }
  template <class Sink>
  void each(const Tensor& tensor, std::int64_t begin, std::int64_t count, Sink&& sink) const {
    if (tensor.type.dtype == DType::F32) {
      for (std::int64_t i = 0; i < count; ++i) sink(1.0f);
      return;
    }
    const auto range = static_cast<float>(config_.initializer_range);
    const auto emit = [&](float normal) { sink(to_float(to_bf16(range * normal))); };
    const std::uint64_t stream = hash_name(tensor.name);
    const auto first = static_cast<std::uint64_t>(begin);
    const std::uint64_t last = first + static_cast<std::uint64_t>(count);
    for (std::uint64_t pair = first / 2; 2 * pair < last; ++pair) {
      const NormalPair normals = normal_pair(seed_, stream, pair);
      if (2 * pair >= first) emit(normals.first);
      if (2 * pair + 1 < last) emit(normals.second);
    }
  }

  std::string path_;
  ModelConfig config_;
  std::uint64_t seed_;
  std::vector<Tensor> tensors_;
};

}  // namespace

std::unique_ptr<Checkpoint> open_random_checkpoint(const std::string& config_path,
                                                   std::uint64_t seed) {
  return std::make_unique<RandomCheckpoint>(config_path, seed);
}

}  // namespace nibble
