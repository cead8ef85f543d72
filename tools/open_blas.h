// OpenBLAS's single-precision product, when the system has the library.
#pragma once

#include "engine/os.h"

namespace nibble {

class OpenBlas {
 public:
  OpenBlas() : library_({"libopenblas.so.0", "libopenblas.so"}) {
    sgemm_ = reinterpret_cast<Sgemm>(library_.symbol("cblas_sgemm"));
    set_threads_ = reinterpret_cast<SetThreads>(library_.symbol("openblas_set_num_threads"));
  }
  bool available() const { return sgemm_ != nullptr && set_threads_ != nullptr; }
  void set_threads(int threads) const { set_threads_(threads); }
  // y[m, n] = x[m, k] w[n, k]^T
  void multiply(int m, int n, int k, const float* x, const float* w, float* y) const {
    constexpr int row_major = 101, plain = 111, transposed = 112;
    sgemm_(row_major, plain, transposed, m, n, k, 1.0f, x, k, w, k, 0.0f, y, n);
  }

 private:
  using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int,
                         float, float*, int);
  using SetThreads = void (*)(int);
  os::Library library_;
  Sgemm sgemm_ = nullptr;
  SetThreads set_threads_ = nullptr;
};

}  // namespace nibble
