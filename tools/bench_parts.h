// What the benchmarks share: random data, an op as a program of its own, and the rates of the
// machine that everything else is held against.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/os.h"
#include "engine/philox.h"
#include "engine/runtime.h"

namespace nibble {

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<float> uniform_values(std::int64_t count, std::uint64_t stream);

// One op as a program of its own, run on random data: input "x", weight "w".
class OpBench {
 public:
  using Build = Tensor (*)(Graph&, const TensorType& x, const TensorType& w);
  OpBench(Backend& backend, DType compute, const TensorType& x, const TensorType& w, Build build);
  // Seconds of one run, measured over `repeats` of them without waiting in between.
  double seconds(int repeats);

 private:
  Runtime runtime_;
  int program_;
  Ref result_;
  std::unique_ptr<Buffer> weight_;
};

Tensor build_linear(Graph& graph, const TensorType& x, const TensorType& w);
Tensor build_linear_dx(Graph& graph, const TensorType& x, const TensorType& w);

// What the machine reaches in this run. On a GPU a BF16 product of 8192^3 kept up for `seconds`
// (the card slows down as it warms up; the last part counts) and a copy; on a CPU OpenBLAS's sgemm
// where it is installed, else our F32 product.
struct MachineRates {
  double flops_per_s = 0, bytes_per_s = 0;
  std::string what;  // the product that was measured
  // Of page-locked host memory, one way at a time and both ways at once (the sum); 0 on a CPU.
  double host_in_bytes_per_s = 0, host_out_bytes_per_s = 0, host_both_bytes_per_s = 0;
};
MachineRates machine_rates(Backend& backend, int threads, std::int64_t rows, double seconds);

}  // namespace nibble
