#include "gguf-convert/convert.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <sstream>

#include "engine/quantize.h"
#include "gguf-convert/gguf.h"
#include "gguf-convert/model_writer.h"
#include "gguf-convert/names.h"
#include "tests/unit/scratch.h"
#include "tests/unit/shared_data.h"
#include "tests/unit/tiny_checkpoint.h"

using namespace nibble;
using test::bytes_of;
using test::Scratch;
using test::values_of;

namespace {

struct Result {
  int status;
  std::string out, log;
};

ConvertRequest request(const std::string& source, const std::string& destination, DType type) {
  ConvertRequest r;
  r.source = source;
  r.destination = destination;
  r.options.type = type;
  const bool gguf = std::filesystem::path(destination).extension() == ".gguf";
  r.options.container = gguf ? Container::gguf : Container::huggingface;
  return r;
}

Result run(const ConvertRequest& r) {
  std::ostringstream out, log;
  const int status = convert(r, out, log);
  return {status, out.str(), log.str()};
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

void check_same_weights(const std::string& a_path, const std::string& b_path) {
  const auto a = open_checkpoint(a_path), b = open_checkpoint(b_path);
  REQUIRE(a->tensors().size() == b->tensors().size());
  CHECK(a->config().rope_style == b->config().rope_style);
  for (const Checkpoint::Tensor& tensor : a->tensors()) {
    const Checkpoint::Tensor* other = b->find(tensor.name);
    REQUIRE(other != nullptr);
    CHECK(tensor.type == other->type);
    CHECK(bytes_of(*a, tensor) == bytes_of(*b, *other));
  }
}

// While it lives, no file of this process grows past `bytes`.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    handler_ = ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, before_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int) = nullptr;
};

}  // namespace

TEST_CASE("Hugging Face to GGUF is the published GGUF, bit for bit, and back") {
  const std::string directory = test::shared("models/stories260K/");
  SKIP_WITHOUT(directory);
  Scratch scratch;
  REQUIRE(run(request(directory + "hf", scratch / "a.gguf", DType::F32)).status == 0);
  check_same_weights(scratch / "a.gguf", directory + "stories260K-f32.gguf");
  const GgufFile file(scratch / "a.gguf");
  CHECK(file.string("general.architecture", "") == "llama");
  CHECK(file.integer("general.file_type", -1) == 0);
  CHECK_FALSE(file.has("nibble.rope.style"));

  REQUIRE(run(request(directory + "stories260K-f32.gguf", scratch / "hf", DType::F32)).status == 0);
  check_same_weights(scratch / "hf", directory + "hf");
  CHECK(open_checkpoint(scratch / "hf")->tokenizer().tokens ==
        open_checkpoint(directory + "stories260K-f32.gguf")->tokenizer().tokens);

  REQUIRE(run(request(directory + "hf", scratch / "f16.gguf", DType::F16)).status == 0);
  const auto made = open_checkpoint(scratch / "f16.gguf");
  const auto published = open_checkpoint(directory + "stories260K-f16.gguf");
  const std::string q = "blk.2.attn_q.weight";
  CHECK(bytes_of(*made, *made->find(q)) == bytes_of(*published, *published->find(q)));
  REQUIRE(run(request(directory + "hf", scratch / "q8.gguf", DType::Q8_0)).status == 0);
  const auto made8 = open_checkpoint(scratch / "q8.gguf");
  const auto published8 = open_checkpoint(directory + "stories260K-q8_0.gguf");
  REQUIRE(made8->find(q)->type == published8->find(q)->type);
  CHECK(bytes_of(*made8, *made8->find(q)) == bytes_of(*published8, *published8->find(q)));
}

TEST_CASE("every type through every container keeps what it should") {
  Scratch scratch;
  const std::string source = test::tiny_source(scratch);
  for (const DType type : {DType::NF4, DType::F32, DType::F16, DType::BF16, DType::Q8_0}) {
    for (const char* leaf : {"/model.gguf", "/model"}) {
      const bool huggingface = std::string(leaf) == "/model";
      if (huggingface && (type == DType::NF4 || type == DType::Q8_0)) continue;
      Scratch place;
      ConvertRequest r = request(source, place.path() + leaf, type);
      r.verify = true;
      r.threads = 3;
      const Result result = run(r);
      CHECK(result.status == 0);
      CHECK(count(result.out, "max abs error") == 22);
      CHECK(place.entries() == 1);
      r.destination = place.path() + (huggingface ? "/again" : "/again.gguf");
      r.threads = 1;
      run(r);
      if (!huggingface) {
        CHECK(test::get(place.path() + leaf) == test::get(r.destination));
      }
      const auto model = open_checkpoint(place.path() + leaf);
      CHECK(model->config().rope_style ==
            (type == DType::NF4 || huggingface ? RopeStyle::half : RopeStyle::adjacent));
      CHECK_FALSE(model->config().tied_embeddings);
    }
  }
}

TEST_CASE("NF4: which tensors, and the bytes that a trainer gets") {
  Scratch scratch;
  const auto source = open_checkpoint(test::tiny_source(scratch));
  ConvertRequest r = request(test::tiny_source(scratch), scratch / "n.gguf", DType::NF4);
  r.options.quant.block = 32;
  r.options.no_quant = name_pattern("layers\\.1\\.mlp|blk.0.attn_v");
  run(r);
  const auto model = open_checkpoint(scratch / "n.gguf");
  CHECK(model->find("token_embd.weight")->type.dtype == DType::BF16);
  CHECK(model->find("output.weight")->type.dtype == DType::BF16);
  CHECK(model->find("blk.0.attn_norm.weight")->type.dtype == DType::F32);
  CHECK(model->find("blk.1.ffn_up.weight")->type.dtype == DType::BF16);
  CHECK(model->find("blk.0.attn_v.weight")->type.dtype == DType::BF16);
  const TensorType odd = model->find("blk.0.ffn_down.weight")->type;
  CHECK(odd == TensorType{DType::NF4, {16, 33}, {32, true, false}});
  for (const Checkpoint::Tensor& tensor : source->tensors()) {
    const TensorType target = converted_type(*source, tensor, r.options);
    const Checkpoint::Tensor* stored = model->find(tensor.name);
    REQUIRE(stored != nullptr);
    CHECK(stored->type == target);
    std::vector<std::byte> made(static_cast<std::size_t>(bytes(target)));
    convert_tensor(*source, tensor, target, RopeStyle::half, made);
    CHECK(made == bytes_of(*model, *stored));
    const auto mapped = model->mapped(*stored);
    REQUIRE(mapped.size() == made.size());
    CHECK(std::memcmp(mapped.data(), made.data(), made.size()) == 0);
    if (is_plane(target.dtype)) {
      CHECK(reinterpret_cast<std::uintptr_t>(mapped.data()) % kHostPlaneAlignment == 0);
      std::vector<std::byte> direct(made.size());
      quantize(target, values_of(*source, tensor), direct);
      CHECK(made == direct);
    }
  }
  r.options.quant.double_quant = false;
  r.destination = scratch / "single.gguf";
  r.verify = true;
  CHECK(run(r).status == 0);
  CHECK_FALSE(
      open_checkpoint(r.destination)->find("blk.0.ffn_down.weight")->type.quant.double_quant);
}

TEST_CASE("planes that lie apart are read by copying them together") {
  Scratch scratch;
  run(request(test::tiny_source(scratch), scratch / "n.gguf", DType::NF4));
  const GgufFile file(scratch / "n.gguf");
  ModelConfig config = config_from_gguf(file);
  GgufWriter writer(scratch / "apart.gguf", 64);  // padding to 64 moves the planes
  write_config(config, writer);
  writer.set_u32("nibble.quant.version", 1);
  writer.set_string("nibble.quant.type", "nf4");
  writer.set_u32("nibble.quant.block", 64);
  for (const auto& [key, value] : file.metadata()) {
    if (key.rfind("nibble.quant.shape.", 0) == 0) writer.set_i64s(key, *file.integers(key));
  }
  for (const GgufTensor& tensor : file.tensors()) writer.add(tensor.name, tensor.type);
  writer.begin();
  for (const GgufTensor& tensor : file.tensors()) writer.write(tensor.bytes);
  writer.finish();
  const auto apart = open_checkpoint(scratch / "apart.gguf");
  const Checkpoint::Tensor& q = *apart->find("blk.0.attn_q.weight");
  CHECK(apart->mapped(q).empty());
  check_same_weights(scratch / "n.gguf", scratch / "apart.gguf");
  const auto near = open_checkpoint(scratch / "n.gguf");
  CHECK(values_of(*apart, q) == values_of(*near, *near->find(q.name)));
}

TEST_CASE("quantizing what is quantized warns once; copying it does not") {
  Scratch scratch;
  const std::string source = test::tiny_source(scratch);
  CHECK(run(request(source, scratch / "q8.gguf", DType::Q8_0)).log.find("warning") ==
        std::string::npos);
  CHECK(run(request(source, scratch / "a.gguf", DType::NF4)).log.empty());
  const Result again = run(request(scratch / "q8.gguf", scratch / "b.gguf", DType::NF4));
  CHECK(count(again.log, "second quantization") == 0);  // rows of 16 and 33: all F16 in the source
  CHECK(run(request(scratch / "a.gguf", scratch / "c.gguf", DType::NF4)).log.empty());
  check_same_weights(scratch / "a.gguf", scratch / "c.gguf");
  ConvertRequest other = request(scratch / "a.gguf", scratch / "d.gguf", DType::NF4);
  other.options.quant.block = 128;
  CHECK(count(run(other).log, "second quantization") == 1);
}

TEST_CASE("rows that are not whole blocks become F16, and one line says so") {
  Scratch scratch;
  std::string config = test::kTinyConfig;
  config.replace(config.find("16"), 2, "32");
  test::put(scratch / "wide.json", config);
  const std::string source = "random:" + (scratch / "wide.json");
  const Result result = run(request(source, scratch / "q8.gguf", DType::Q8_0));
  CHECK(count(result.log, "note: 2 tensors become F16: rows of 33") == 1);
  CHECK(count(result.log, "\n") == 1);
  const auto model = open_checkpoint(scratch / "q8.gguf");
  CHECK(model->find("blk.0.ffn_down.weight")->type.dtype == DType::F16);
  CHECK(model->find("blk.0.ffn_up.weight")->type.dtype == DType::Q8_0);
  CHECK(model->find("token_embd.weight")->type.dtype == DType::Q8_0);
  CHECK(count(run(request(scratch / "q8.gguf", scratch / "n.gguf", DType::NF4)).log,
              "second quantization") == 1);
  ConvertRequest head = request(source, scratch / "head.gguf", DType::NF4);
  head.options.head = DType::Q8_0;
  run(head);
  const auto with_head = open_checkpoint(scratch / "head.gguf");
  CHECK(with_head->find("output.weight")->type.dtype == DType::Q8_0);
  CHECK(with_head->find("token_embd.weight")->type.dtype == DType::BF16);
}

TEST_CASE("merging is W + scale B A, in the row order of either side") {
  const std::string directory = test::shared("models/stories260K/");
  SKIP_WITHOUT(directory);
  Scratch scratch;
  const auto base = open_checkpoint(directory + "hf");
  const AdapterFile adapter = read_adapter(directory + "lora-randB.gguf", base->config());
  for (const char* source : {"hf", "stories260K-f32.gguf"}) {
    ConvertRequest r = request(directory + source, scratch / "merged", DType::F32);
    r.adapter = directory + "lora-randB.gguf";
    run(r);
    const auto merged = open_checkpoint(scratch / "merged");
    for (const Checkpoint::Tensor& tensor : base->tensors()) {
      const std::vector<float> before = values_of(*base, tensor);
      const std::vector<float> after = values_of(*merged, *merged->find(tensor.name));
      const AdapterTensor* lora = adapter.find(tensor.name);
      if (lora == nullptr) {
        CHECK(before == after);
        continue;
      }
      CHECK_FALSE(before == after);
      double worst = 0;
      for (std::int64_t row = 0; row < lora->out; ++row) {
        for (std::int64_t col = 0; col < lora->in; ++col) {
          double sum = 0;
          for (std::int64_t k = 0; k < lora->rank; ++k) {
            sum += static_cast<double>(lora->b[static_cast<std::size_t>(row * lora->rank + k)]) *
                   static_cast<double>(lora->a[static_cast<std::size_t>(k * lora->in + col)]);
          }
          const auto i = static_cast<std::size_t>(row * lora->in + col);
          const double wanted = static_cast<double>(before[i]) + 2.0 * sum;
          worst = std::max(worst, std::abs(wanted - static_cast<double>(after[i])));
        }
      }
      CHECK(worst < 1e-6);
    }
  }
  ConvertRequest quantized = request(directory + "hf", scratch / "m.gguf", DType::NF4);
  quantized.adapter = directory + "lora-randB.gguf";
  CHECK(count(run(quantized).log, "warning: the adapter is merged") == 1);
}

TEST_CASE("a full disk leaves the old output and nothing else") {
  Scratch scratch;
  const std::string source = test::tiny_source(scratch);
  for (const char* leaf : {"/m.gguf", "/m"}) {
    Scratch place;
    const std::string path = place.path() + leaf;
    run(request(source, path, DType::BF16));
    const std::string file = std::string(leaf) == "/m" ? path + "/model.safetensors" : path;
    const std::string before = test::get(file);
    {
      const FileSizeLimit limit(4096);
      CHECK_THROWS_AS(run(request(source, path, DType::F32)), DeviceError);
    }
    CHECK(test::get(file) == before);
    CHECK(place.entries() == 1);
    CHECK_NOTHROW(open_checkpoint(path));
    run(request(source, path, DType::F32));
    CHECK(open_checkpoint(path)->find("output.weight")->type.dtype == DType::F32);
  }
}

TEST_CASE("destinations that would lose something are refused") {
  Scratch scratch;
  const std::string source = test::tiny_source(scratch);
  run(request(source, scratch / "a.gguf", DType::F16));
  CHECK_THROWS_AS(run(request(scratch / "a.gguf", scratch / "a.gguf", DType::NF4)), UsageError);
  CHECK_THROWS_WITH_AS(run(request(source, scratch.path(), DType::F16)),
                       doctest::Contains("no config.json"), Error);
  test::put(scratch / "file", "text");
  CHECK_THROWS_AS(run(request(source, scratch / "file", DType::F16)), Error);
  CHECK(test::get(scratch / "file") == "text");
  CHECK_THROWS_AS(run(request(source, scratch / "hf", DType::Q8_0)), UsageError);
  CHECK_FALSE(std::filesystem::exists(scratch / "hf"));
}

TEST_CASE("--dry-run and --json") {
  Scratch scratch;
  ConvertRequest r = request(test::tiny_source(scratch), scratch / "a.gguf", DType::NF4);
  r.dry_run = r.json = true;
  const auto plan = nlohmann::json::parse(run(r).out);
  CHECK_FALSE(std::filesystem::exists(scratch / "a.gguf"));
  CHECK(plan["types"] == nlohmann::json{{"BF16", 2}, {"F32", 5}, {"NF4", 14}});
  r.dry_run = false;
  r.verify = true;
  const auto done = nlohmann::json::parse(run(r).out);
  CHECK(done["bytes"] == plan["bytes"]);
  CHECK(done["verify"]["tensors"].size() == 21);
  const double rms = done["verify"]["rms_error"];
  CHECK(rms > 0.01);
  CHECK(rms < 0.12);
}

TEST_CASE("--verify notices a changed byte and a changed type") {
  Scratch scratch;
  const std::string path = scratch / "a.gguf";
  const auto source = open_checkpoint(test::tiny_source(scratch));
  ConvertOptions options;
  options.type = DType::F32;
  run(request(test::tiny_source(scratch), path, DType::F32));
  const ConvertPlan plan = plan_conversion(*source, options, nullptr);
  CHECK(verify_conversion(*source, plan, nullptr, *open_checkpoint(path)).total.max_abs == 0);
  std::string bytes = test::get(path);
  bytes[bytes.size() - 2] = static_cast<char>(bytes[bytes.size() - 2] ^ 0x10);
  test::put(path, bytes);
  CHECK_THROWS_AS(verify_conversion(*source, plan, nullptr, *open_checkpoint(path)), Error);
  run(request(test::tiny_source(scratch), path, DType::F16));
  CHECK_THROWS_AS(verify_conversion(*source, plan, nullptr, *open_checkpoint(path)), Error);
}

TEST_CASE("large models are split into shards that read back as one") {
  Scratch scratch;
  const std::string from = test::tiny_source(scratch);
  const auto source = open_checkpoint(from);
  ConvertOptions options;
  options.type = DType::F32;
  options.container = Container::huggingface;
  const ConvertPlan plan = plan_conversion(*source, options, nullptr);
  const auto writer = make_hf_writer(*source, plan, options, from, scratch / "sharded", 4000);
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    std::vector<std::byte> out(static_cast<std::size_t>(bytes(plan.tensors[i].target)));
    convert_tensor(*source, *plan.tensors[i].source, plan.tensors[i].target, plan.style, out);
    writer->write(i, out);
  }
  writer->finish();
  CHECK(std::filesystem::exists(scratch / "sharded/model.safetensors.index.json"));
  run(request(from, scratch / "whole", DType::F32));
  check_same_weights(scratch / "sharded", scratch / "whole");
  // Converted again into one file, the old shards go.
  run(request(from, scratch / "sharded", DType::F32));
  CHECK_FALSE(std::filesystem::exists(scratch / "sharded/model.safetensors.index.json"));
  check_same_weights(scratch / "sharded", scratch / "whole");
}

TEST_CASE("types and patterns of the command line") {
  CHECK(output_type("NF4") == DType::NF4);
  CHECK(output_type("q8_0") == DType::Q8_0);
  for (const char* known : {"fp4", "int4", "q6_k", "q4_k_m", "q4_0"}) {
    CHECK_THROWS_WITH_AS(output_type(known), doctest::Contains("nf4, f32, f16, bf16, q8_0"),
                         Unsupported);
  }
  CHECK_THROWS_AS(output_type("nf5"), UsageError);
  CHECK_THROWS_AS(name_pattern("(("), UsageError);
}
