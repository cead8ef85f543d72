// SentencePiece's tokenizer.model: a protocol buffer message ModelProto, of which the vocabulary
// and a few settings are read (sentencepiece_model.proto):
//
//   ModelProto       1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
//   SentencePiece    1 piece (string)   2 score (float)   3 type (enum, default 1 = normal)
//   TrainerSpec      3 model_type (1 unigram, 2 bpe)   40 unk_id  41 bos_id  42 eos_id  43 pad_id
//   NormalizerSpec   2 precompiled_charsmap (bytes)   3 add_dummy_prefix   4
//   remove_extra_whitespaces
//
// BPE models without normalization only (Llama 1-2, Mistral, Gemma).
#include <bit>
#include <cmath>

#include "engine/error.h"
#include "gguf-convert/tokenizer_spec.h"

namespace nibble {
namespace {

struct Field {
  std::uint64_t number = 0, wire = 0, value = 0;  // value: of varints and fixed widths
  std::span<const std::byte> bytes;               // of length-delimited fields
};

// Reads the fields of one message one after the other.
class Message {
 public:
  Message(std::span<const std::byte> bytes, const std::byte* file_begin, const std::string& path)
      : bytes_(bytes), file_begin_(file_begin), path_(path) {}

  bool next(Field& field) {
    if (at_ == bytes_.size()) return false;
    const std::uint64_t key = varint();
    field = {key >> 3, key & 7, 0, {}};
    switch (field.wire) {
      case 0:
        field.value = varint();
        break;
      case 1:
        field.value = fixed(8);
        break;
      case 2: {
        const std::uint64_t length = varint();
        if (length > bytes_.size() - at_) fail("a field of " + std::to_string(length) + " bytes");
        field.bytes = bytes_.subspan(at_, static_cast<std::size_t>(length));
        at_ += static_cast<std::size_t>(length);
        break;
      }
      case 5:
        field.value = fixed(4);
        break;
      default:
        fail("wire type " + std::to_string(field.wire));
    }
    return true;
  }

  Message inside(const Field& field) const { return {field.bytes, file_begin_, path_}; }

  [[noreturn]] void fail(const std::string& what) const {
    throw FormatError(path_, static_cast<std::uint64_t>(bytes_.data() + at_ - file_begin_),
                      what + "; wanted a SentencePiece model (protocol buffer)");
  }

 private:
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      if (at_ == bytes_.size()) fail("the file ends inside a number");
      const auto byte = static_cast<std::uint64_t>(bytes_[at_++]);
      value |= (byte & 127) << shift;
      if (byte < 128) return value;
    }
    fail("a number of more than 64 bits");
  }

  std::uint64_t fixed(std::size_t width) {
    if (bytes_.size() - at_ < width) fail("the file ends inside a number");
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < width; ++i) {
      value |= static_cast<std::uint64_t>(bytes_[at_ + i]) << (8 * i);
    }
    at_ += width;
    return value;
  }

  std::span<const std::byte> bytes_;
  const std::byte* file_begin_;
  const std::string& path_;
  std::size_t at_ = 0;
};

void read_piece(Message message, TokenizerSpec& spec) {
  std::string text;
  float score = 0;
  std::uint64_t type = 1;
  for (Field field; message.next(field);) {
    if (field.number == 1 && field.wire == 2) {
      text.assign(reinterpret_cast<const char*>(field.bytes.data()), field.bytes.size());
    } else if (field.number == 2 && field.wire == 5) {
      score = std::bit_cast<float>(static_cast<std::uint32_t>(field.value));
    } else if (field.number == 3 && field.wire == 0) {
      type = field.value;
    }
  }
  if (type < 1 || type > 6) message.fail("a piece of type " + std::to_string(type));
  if (!std::isfinite(score)) message.fail("a score that is not a finite number");
  spec.tokens.push_back(std::move(text));
  spec.scores.push_back(score);
  spec.types.push_back(static_cast<TokenType>(type));
}

struct Settings {
  std::uint64_t model_type = 1;
  std::int32_t unk = 0, bos = 1, eos = 2, pad = -1;
  bool charsmap = false, dummy_prefix = true, remove_extra_whitespaces = true;
};

void read_trainer(Message message, Settings& settings) {
  for (Field field; message.next(field);) {
    if (field.wire != 0) continue;
    const auto id = static_cast<std::int32_t>(field.value);  // -1 is stored as 2^64 - 1
    if (field.number == 3) settings.model_type = field.value;
    if (field.number == 40) settings.unk = id;
    if (field.number == 41) settings.bos = id;
    if (field.number == 42) settings.eos = id;
    if (field.number == 43) settings.pad = id;
  }
}

void read_normalizer(Message message, Settings& settings) {
  for (Field field; message.next(field);) {
    if (field.number == 2 && field.wire == 2) settings.charsmap = !field.bytes.empty();
    if (field.number == 3 && field.wire == 0) settings.dummy_prefix = field.value != 0;
    if (field.number == 4 && field.wire == 0) settings.remove_extra_whitespaces = field.value != 0;
  }
}

void check_supported(const Settings& settings, const std::string& path) {
  const char* kinds[] = {"", "unigram", "BPE", "word", "character"};
  if (settings.model_type != 2) {
    throw Unsupported(path + ": a SentencePiece model of type " +
                      (settings.model_type <= 4 ? kinds[settings.model_type] : "unknown") +
                      "; supported: BPE");
  }
  if (settings.charsmap || settings.remove_extra_whitespaces) {
    throw Unsupported(path + ": a SentencePiece model that normalizes its text (" +
                      (settings.charsmap ? "precompiled_charsmap" : "remove_extra_whitespaces") +
                      "); supported: models without normalization, such as Llama's");
  }
}

}  // namespace

TokenizerSpec tokenizer_from_sentencepiece(std::span<const std::byte> bytes,
                                           const std::string& path) {
  TokenizerSpec spec;
  spec.model = "llama";
  spec.pre = "default";
  Settings settings;
  Message model(bytes, bytes.data(), path);
  for (Field field; model.next(field);) {
    if (field.wire != 2) continue;
    if (field.number == 1) read_piece(model.inside(field), spec);
    if (field.number == 2) read_trainer(model.inside(field), settings);
    if (field.number == 3) read_normalizer(model.inside(field), settings);
  }
  if (spec.tokens.empty()) model.fail("no pieces");
  check_supported(settings, path);
  const auto id = [&](std::int32_t value) {
    return value >= 0 && static_cast<std::size_t>(value) < spec.tokens.size() ? value : -1;
  };
  spec.bos = id(settings.bos);
  spec.eos = id(settings.eos);
  spec.unk = id(settings.unk);
  spec.pad = id(settings.pad);
  spec.add_bos = spec.bos >= 0;
  spec.add_space_prefix = settings.dummy_prefix;
  return spec;
}

}  // namespace nibble
