// The next token from logits; the rule is in engine/ops/choose_token.cpp, the method that of
// backends/cpu/choose_token.cpp: keys that order as the tokens stand, and a descent through their
// bytes that finds where the kept prefix ends.
//
// One block of 1,024 threads does it all, from the L2 cache: the logits of 128,256 tokens are 513
// kB. Greedy decoding sweeps them twice, about 20 us. Sums of weights are integers in shared
// memory, whose atomic additions commute, so nothing depends on the order of threads. The draw
// walks ids in order: each thread owns a contiguous range, a scan over the threads' sums finds the
// one it falls into.
#include "backends/cuda/common.cuh"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigits = 256;
constexpr float kOne = 0x1p40f;  // the weight of the most likely token

// 32 bits of the logit, made monotonic, and 24 of the id: the larger stands first.
__device__ std::uint64_t key_of(float logit, int id) {
  std::uint32_t bits = __float_as_uint(logit);
  bits = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return (static_cast<std::uint64_t>(bits) << 24) | static_cast<std::uint64_t>(0xffffff - id);
}

using Sum = unsigned long long;  // what atomicAdd knows

struct Shared {
  Sum sums[kDigits];
  int there[kDigits];
  Sum partial[kThreads];
  Sum prefix, before;
  int chosen;
};

struct Chooser {
  const float* z;
  int count;
  float most, temperature;
  Shared& shared;

  __device__ Sum weight(int i) const {
    return static_cast<Sum>(kOne * expf((z[i] - most) / temperature));
  }

  // Of the keys from `floor` on the smallest whose larger ones sum to less than `limit`. Counts
  // weigh 1 each.
  template <bool kWeights>
  __device__ std::uint64_t last_key(double limit, std::uint64_t floor) const {
    if (threadIdx.x == 0) shared.prefix = shared.before = 0;
    for (int shift = 48; shift >= 0; shift -= 8) {
      for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kThreads) {
        shared.sums[d] = 0;
        shared.there[d] = 0;
      }
      __syncthreads();
      const Sum prefix = shared.prefix;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        const std::uint64_t key = key_of(z[i], i);
        if (key < floor || (key >> shift) >> 8 != prefix) continue;
        const int digit = static_cast<int>(key >> shift & 255);
        atomicAdd(&shared.sums[digit], kWeights ? weight(i) : Sum{1});
        shared.there[digit] = 1;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        // The last digit whose predecessors sum to less than the limit.
        Sum sum = shared.before;
        int last = -1;
        for (int digit = kDigits - 1; digit >= 0; --digit) {
          if (shared.there[digit] == 0) continue;
          if (last >= 0 && static_cast<double>(sum) >= limit) break;
          last = digit;
          shared.before = sum;
          sum += shared.sums[digit];
        }
        shared.prefix = prefix << 8 | static_cast<Sum>(last);
      }
      __syncthreads();
    }
    return shared.prefix;
  }

  // The sum over the block, in every thread.
  __device__ Sum total(Sum x) const {
    __syncthreads();
    shared.partial[threadIdx.x] = x;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) {
        shared.partial[threadIdx.x] += shared.partial[threadIdx.x + half];
      }
      __syncthreads();
    }
    return shared.partial[0];
  }

  __device__ int draw(const ChooseTokenParams& params, const std::int64_t* rng, int first) const {
    std::uint64_t floor = 0;
    if (params.top_k > 0 && params.top_k < count) {
      floor = last_key<false>(static_cast<double>(params.top_k), 0);
    }
    if (params.top_p < 1) {
      Sum mine = 0;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        if (key_of(z[i], i) >= floor) mine += weight(i);
      }
      const Sum all = total(mine);
      floor = last_key<true>(params.top_p * static_cast<double>(all), floor);
    }
    const double least = params.min_p * static_cast<double>(kOne);
    const auto kept_weight = [&](int i) {
      const Sum w = weight(i);
      const bool kept = i == first || (key_of(z[i], i) >= floor && static_cast<double>(w) >= least);
      return kept ? w : Sum{0};
    };
    const int range = (count + kThreads - 1) / kThreads;
    const int begin = min(static_cast<int>(threadIdx.x) * range, count);
    const int end = min(begin + range, count);
    Sum mine = 0;
    for (int i = begin; i < end; ++i) mine += kept_weight(i);
    const Sum sum = total(mine);
    const uint4 words = philox(static_cast<std::uint64_t>(rng[0]),
                               make_uint4(static_cast<std::uint32_t>(rng[1]), 0, 0, 0));
    const Sum r = (static_cast<Sum>(words.x) << 21) | (words.y >> 11);
    const Sum target = __umul64hi(r << 11, sum);  // floor(r * sum / 2^53)
    __syncthreads();
    shared.partial[threadIdx.x] = mine;
    if (threadIdx.x == 0) shared.chosen = first;
    __syncthreads();
    for (int step = 1; step < kThreads; step *= 2) {  // running sums, this thread included
      const bool has = static_cast<int>(threadIdx.x) >= step;
      const Sum left = has ? shared.partial[threadIdx.x - step] : 0;
      __syncthreads();
      shared.partial[threadIdx.x] += left;
      __syncthreads();
    }
    const Sum before = shared.partial[threadIdx.x] - mine;
    if (before <= target && target < before + mine) {
      Sum left = target - before;
      for (int i = begin; i < end; ++i) {
        const Sum w = kept_weight(i);
        if (left < w) {
          shared.chosen = i;
          break;
        }
        left -= w;
      }
    }
    __syncthreads();
    return shared.chosen;
  }
};

__global__ void __launch_bounds__(kThreads)
    choose_token(const float* z, int count, ChooseTokenParams params, const std::int64_t* rng,
                 std::int32_t* id, float* log_probability) {
  begin_kernel();
  __shared__ Shared shared;
  // The first token, and whether every logit is finite: the key of a NaN or infinity is no worse a
  // number, so that one sweep finds both.
  std::uint64_t best = 0;
  int bad = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const float x = z[i];
    bad |= !(x - x == 0);
    best = max(best, key_of(x, i));
  }
  shared.partial[threadIdx.x] = best;
  bad = __syncthreads_or(bad);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      shared.partial[threadIdx.x] =
          max(shared.partial[threadIdx.x], shared.partial[threadIdx.x + half]);
    }
    __syncthreads();
  }
  const int first = 0xffffff - static_cast<int>(shared.partial[0] & 0xffffff);
  if (bad != 0) {
    if (threadIdx.x == 0) {
      *id = -1;
      *log_probability = __int_as_float(0x7fc00000);  // NaN
    }
    return;
  }
  __syncthreads();
  const Chooser chooser{z, count, z[first], static_cast<float>(params.temperature), shared};
  const int chosen = params.temperature > 0 ? chooser.draw(params, rng, first) : first;
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    sum += static_cast<double>(expf(z[i] - chooser.most));
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    *id = chosen;
    *log_probability = static_cast<float>(static_cast<double>(z[chosen]) -
                                          static_cast<double>(chooser.most) - log(sum));
  }
}

bool supports(const OpCall& call) { return call.in_types[0].dtype == DType::F32; }

void run(const OpCall& call, const Launch& launch) {
  start_kernel("choose_token", choose_token, 1, kThreads, 0, launch, call.input<float>(0),
               static_cast<int>(call.in_types[0].shape[1]), call.node->get<ChooseTokenParams>(),
               call.input<std::int64_t>(1), call.output<std::int32_t>(0), call.output<float>(1));
}

}  // namespace

extern const Kernel choose_token_kernel{supports, nullptr, run};

}  // namespace nibble::cuda
