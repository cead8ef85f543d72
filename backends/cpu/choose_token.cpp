// The next token from logits; the rule is in engine/ops/choose_token.cpp.
//
// No sorting: what is kept is a prefix of an order, so one number says where it ends. Tokens get
// keys that order as they stand, larger first (the logit's bits made monotonic, then the id), and a
// descent through the key's bytes finds the last key whose predecessors count, or weigh, less than
// a limit: seven sweeps over the logits with 256 sums each.
#include <limits>

#include "backends/cpu/kernel.h"
#include "engine/philox.h"

namespace nibble::cpu::NIBBLE_ISA {
namespace {

// The key of a token: 32 bits of its logit and 24 of its id. F64 logits are compared as F32, which
// is what every other graph has.
std::uint64_t key_of(float logit, std::int64_t id) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &logit, sizeof bits);
  bits = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return (std::uint64_t{bits} << 24) | static_cast<std::uint64_t>(0xffffff - id);
}

float exponential(float x) { return __builtin_expf(x); }
double exponential(double x) { return __builtin_exp(x); }

template <class T>
struct Choice {
  const T* z;
  std::int64_t count;
  ChooseTokenParams params;
  T most;

  std::uint64_t weight(std::int64_t i) const {
    const T share = exponential((z[i] - most) / static_cast<T>(params.temperature));
    return static_cast<std::uint64_t>(static_cast<T>(0x1p40) * share);
  }

  // Of the keys from `floor` on the smallest whose larger ones sum to less than `limit`, where each
  // counts as value(i); the largest key when limit is 0.
  template <class Value>
  std::uint64_t last_key(double limit, std::uint64_t floor, const Value& value) const {
    std::uint64_t prefix = 0, before = 0;
    for (int shift = 48; shift >= 0; shift -= 8) {
      std::uint64_t sums[256] = {};
      bool there[256] = {};
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t key = key_of(static_cast<float>(z[i]), i);
        if (key < floor || (key >> shift) >> 8 != prefix) continue;
        sums[key >> shift & 255] += value(i);
        there[key >> shift & 255] = true;
      }
      // The last digit whose predecessors sum to less than the limit.
      std::uint64_t sum = before;
      int last = -1;
      for (int digit = 255; digit >= 0; --digit) {
        if (!there[digit]) continue;
        if (last >= 0 && static_cast<double>(sum) >= limit) break;
        last = digit;
        before = sum;
        sum += sums[digit];
      }
      prefix = prefix << 8 | static_cast<std::uint64_t>(last);
    }
    return prefix;
  }

  std::int64_t draw(const std::int64_t* rng) const {
    std::uint64_t floor = 0;
    if (params.top_k > 0 && params.top_k < count) {
      floor = last_key(static_cast<double>(params.top_k), 0, [](std::int64_t) { return 1; });
    }
    std::uint64_t total = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      if (key_of(static_cast<float>(z[i]), i) >= floor) total += weight(i);
    }
    if (params.top_p < 1) {
      floor = last_key(params.top_p * static_cast<double>(total), floor,
                       [&](std::int64_t i) { return weight(i); });
    }
    const double least = params.min_p * 0x1p40;
    std::int64_t first = 0;
    for (std::int64_t i = 1; i < count; ++i) {
      if (z[i] > z[first]) first = i;
    }
    const auto kept = [&](std::int64_t i, std::uint64_t w) {
      return i == first ||
             (key_of(static_cast<float>(z[i]), i) >= floor && static_cast<double>(w) >= least);
    };
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint64_t w = weight(i);
      if (kept(i, w)) sum += w;
    }
    const PhiloxBlock words =
        philox(static_cast<std::uint64_t>(rng[0]), {static_cast<std::uint32_t>(rng[1]), 0, 0, 0});
    const std::uint64_t r = (std::uint64_t{words[0]} << 21) | (words[1] >> 11);
    std::uint64_t left = multiply_shift(r, sum);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint64_t w = weight(i);
      if (!kept(i, w)) continue;
      if (left < w) return i;
      left -= w;
    }
    return first;
  }
};

template <class T>
void choose(const OpCall& call) {
  Choice<T> c{call.input<T>(0), call.in_types[0].shape[1], call.node->get<ChooseTokenParams>(), 0};
  std::int64_t chosen = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < c.count; ++i) {
    finite = finite && c.z[i] - c.z[i] == 0;
    if (c.z[i] > c.z[chosen]) chosen = i;
  }
  *call.output<std::int32_t>(0) = -1;
  *call.output<T>(1) = std::numeric_limits<T>::quiet_NaN();
  if (!finite) return;
  c.most = c.z[chosen];
  if (c.params.temperature > 0) chosen = c.draw(call.input<std::int64_t>(1));
  double sum = 0;
  for (std::int64_t i = 0; i < c.count; ++i) {
    sum += __builtin_exp(static_cast<double>(c.z[i]) - static_cast<double>(c.most));
  }
  *call.output<std::int32_t>(0) = static_cast<std::int32_t>(chosen);
  *call.output<T>(1) = static_cast<T>(static_cast<double>(c.z[chosen]) -
                                      static_cast<double>(c.most) - __builtin_log(sum));
}

bool supports(const OpCall& call) {
  return call.in_types[0].dtype == DType::F32 || call.in_types[0].dtype == DType::F64;
}

void run(const OpCall& call, ThreadPool&) {
  call.in_types[0].dtype == DType::F64 ? choose<double>(call) : choose<float>(call);
}

}  // namespace

extern const Kernel choose_token_kernel{supports, nullptr, run};

}  // namespace nibble::cpu::NIBBLE_ISA
