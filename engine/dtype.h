// Element types, and the bytes that a tensor of each occupies.
//
// Three families. Plain types (F64 ... U8) have one value per element. ggml block types hold
// `block` consecutive elements of a row in `block_bytes` bytes and are read-only frozen weights.
// Plane types (NF4, FP4, INT4) store a tensor as separate planes (4-bit codes, per-block absmax,
// and with double quantization the scale and offset of absmax); their layout is a pure function of
// the shape, the quantization block and double_quant: see planes().
//
// Values of NF4 and the byte-exact rules: QLoRA (arXiv 2305.14314) and bitsandbytes.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace nibble {

enum class DType : std::uint8_t {
  F64,
  F32,
  BF16,
  F16,
  I64,
  I32,
  I8,
  U8,  // plain
  NF4,
  FP4,
  INT4,  // planes
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q8_0,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,  // ggml blocks, read only
};

struct DTypeInfo {
  std::string_view name;  // as the field writes it, upper case
  int block;              // elements per storage block; 1 for plain types, 2 for planes (a byte)
  int block_bytes;        // bytes per storage block
};

const DTypeInfo& info(DType dtype);
inline std::string_view name(DType dtype) { return info(dtype).name; }
std::optional<DType> dtype_from_name(std::string_view name);  // case is ignored

inline bool is_plane(DType d) { return d == DType::NF4 || d == DType::FP4 || d == DType::INT4; }
inline bool is_float(DType d) { return d <= DType::F16; }
inline bool is_block(DType d) { return d >= DType::Q4_0; }

// At most four extents, the last one fastest (row major). An empty shape is a scalar.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> extents);
  explicit Shape(std::span<const std::int64_t> extents);
  int rank() const { return rank_; }
  std::int64_t operator[](int axis) const { return extents_[axis]; }
  std::int64_t elements() const;  // product; throws ShapeError past 2^62
  std::int64_t rows() const;      // product of all but the last extent
  std::int64_t cols() const { return rank_ == 0 ? 1 : extents_[rank_ - 1]; }
  bool operator==(const Shape&) const = default;
  std::string str() const;  // "[512, 2048]"

 private:
  std::array<std::int64_t, 4> extents_{};
  int rank_ = 0;
};

// How a plane type was quantized. Ignored by the other families.
struct QuantParams {
  std::int32_t block = 64;   // elements that share one absmax: a power of two, 32..4096
  bool double_quant = true;  // absmax itself is stored in 8 bits
  bool custom_map = false;   // the 8-bit absmax uses a map of its own, stored as a fifth plane
  bool operator==(const QuantParams&) const = default;
};

// What a value is: element type, extents and, for plane types, the quantization.
struct TensorType {
  DType dtype = DType::F32;
  Shape shape;
  QuantParams quant;
  std::int64_t elements() const { return shape.elements(); }
  bool operator==(const TensorType&) const = default;
  std::string str() const;  // "F32[512, 2048]"
};

// Byte offsets of the planes of one tensor from its base, each a multiple of `alignment`, in this
// order and with nothing between; `bytes` is the whole extent. Planes that do not exist have
// zero bytes. Elements are numbered row major over the whole tensor: quantization block i covers
// elements [i*block, (i+1)*block), so a block may straddle rows.
struct Planes {
  std::int64_t codes = 0, codes_bytes = 0;    // element 2k in the HIGH nibble of byte k
  std::int64_t absmax = 0, absmax_bytes = 0;  // u8 with double_quant, else f32, one per block
  std::int64_t scale = 0, scale_bytes = 0;    // f32 per 256 blocks
  std::int64_t offset = 0, offset_bytes = 0;  // one f32: the mean of absmax
  std::int64_t map = 0, map_bytes = 0;        // 256 f32, only with custom_map
  std::int64_t blocks = 0;                    // number of quantization blocks
  std::int64_t bytes = 0;
};
inline constexpr std::int64_t kHostPlaneAlignment = 32;  // files and the CPU; devices use 256
Planes planes(const TensorType& type, std::int64_t alignment = kHostPlaneAlignment);

// Bytes of a tensor as the CPU holds it. Throws ShapeError when a row is not whole blocks.
std::int64_t bytes(const TensorType& type);

inline std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace nibble
