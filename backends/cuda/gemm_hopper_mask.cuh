// The dropout mask of the Hopper product's adapter part, in registers.
//
// A consumer warp holds 16 rows by kN columns of a tile in wgmma's accumulator layout: a lane has
// pairs of neighbouring columns of two rows. One draw decides four columns of a row, so two lanes
// share their draws. They are made for the next tile while the tensor cores work on this one, a
// few at a time, and kept as one bit per output.
#pragma once

#include <cstdint>
#include <type_traits>

#include "backends/cuda/common.cuh"

namespace nibble::cuda::hopper {

// A warp's share of a tile's dropout mask. Two neighbouring lanes hold the same four columns of the
// same two rows: the even one draws them for the upper row, the odd one for the lower. A draw gives
// four bits, shifted in from the right; after kN / 8 draws those of columns 8 j ... 8 j + 7 stand
// 4 (kN / 8 - 1 - j) bits from the right.
template <int kN>
class Mask {
 public:
  static constexpr int kDraws = kN / 8, kWords = kDraws / 8;

  __device__ Mask(const DropoutArgs& keep, std::int64_t m, int lane)
      : ordinals_(keep.ordinal),
        m_(m),
        seed_(keep.rng[0]),
        step_(keep.rng[1]),
        threshold_(keep.threshold << 8),
        adapter_(keep.adapter),
        lane_(lane) {}
  // The next tile's; `row0`: of the warp.
  __device__ void begin(std::int64_t row0, int column0) {
    const std::int64_t row = row0 + lane_ / 4 + 8 * (lane_ % 2);
    ordinal_ = row < m_ ? ordinals_[row] : 0;
    group_ = static_cast<std::uint32_t>(column0 / 4 + lane_ % 4 / 2);
    left_ = kDraws;
  }
  // Four draws at once, to hide their latency, if any are left.
  __device__ void draw_four() {
    if (left_ == 0) return;
    std::uint32_t four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = draw(group_ + 2 * i);
#pragma unroll
    for (int w = kWords - 1; w > 0; --w) {
      words_[w] = __funnelshift_l(words_[w - 1], words_[w], 16);
    }
    words_[0] = words_[0] << 16 | four[0] << 12 | four[1] << 8 | four[2] << 4 | four[3];
    group_ += 8;
    left_ -= 4;
  }
  __device__ void finish() {
    while (left_ > 0) draw_four();
  }
  // d = kept ? d * scale : 0.
  __device__ void apply(float (&d)[kN / 2], float scale) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const std::uint32_t own = words_[w], other = __shfl_xor_sync(~0u, own, 1);
      const bool odd = lane_ % 2 == 1;
      const std::uint32_t rows[2] = {odd ? other >> 2 : own, odd ? own >> 2 : other};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int j = kDraws - 1 - (8 * w + i);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& value = d[4 * j + e];
          value = rows[e / 2] >> (4 * i + e % 2) & 1 ? value * scale : 0.0f;
        }
      }
    }
  }

 private:
  __device__ std::uint32_t draw(std::uint32_t group) const {
    const uint4 drawn = dropout_words(seed_, step_, adapter_, ordinal_, group);
    return (drawn.x >= threshold_ ? 1u : 0u) | (drawn.y >= threshold_ ? 2u : 0u) |
           (drawn.z >= threshold_ ? 4u : 0u) | (drawn.w >= threshold_ ? 8u : 0u);
  }

  const std::int32_t* ordinals_;
  std::int64_t m_, seed_, step_;
  std::uint32_t threshold_, adapter_;
  int lane_, left_ = 0;
  std::int32_t ordinal_ = 0;
  std::uint32_t group_ = 0, words_[kWords] = {};
};

struct NoMask {
  __device__ NoMask(const DropoutArgs&, std::int64_t, int) {}
};
template <int kN, bool kDropout>
using MaskOf = std::conditional_t<kDropout, Mask<kN>, NoMask>;

}  // namespace nibble::cuda::hopper
