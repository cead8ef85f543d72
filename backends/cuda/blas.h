// cuBLASLt with every choice made from shapes alone: the first configuration of its heuristic for
// (shape, strides, dtypes, workspace), asked once and kept; from 512 rows on that for 4096. Split
// sums are reduced in F32 outside the accumulators, in a fixed order.
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "backends/cuda/kernel.h"

namespace nibble::cuda {

inline constexpr std::int64_t kBlasWorkspace = 32
                                               << 20;  // bytes, what its authors advise on Hopper

// Belongs to one backend and one thread at a time.
class Blas {
 public:
  Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  ~Blas();

  // Row major: y[m, n] = alpha * x[m, k] w + beta * y, w as [n, k] (transposed) or [k, n].
  struct Product {
    bool w_is_n_by_k;
    std::int64_t m, n, k, x_stride, w_stride, y_stride;
    DType dtype, y_dtype;  // of x and w; of y
    bool accumulate;       // beta is 1
    auto operator<=>(const Product&) const = default;
  };
  // False when the library has no kernel for it.
  bool supports(const Product& p);
  void run(const Product& p, float alpha, const void* x, const void* w, void* y, void* workspace,
           cudaStream_t stream);

 private:
  struct Prepared;
  static std::unique_ptr<Prepared> describe(const Product& p);
  bool choose(const Prepared& p, cublasLtMatmulAlgo_t& algorithm);
  Prepared& prepare(const Product& p);
  cublasLtHandle_t handle_ = nullptr;
  std::map<Product, Prepared*> prepared_;
};

}  // namespace nibble::cuda
