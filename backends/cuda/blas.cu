#include "backends/cuda/blas.h"

#include "backends/cuda/low_rank.h"
#include "engine/error.h"

namespace nibble::cuda {
namespace {

void check_blas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw DeviceError(std::string(what) + ": " + cublasLtGetStatusString(status) +
                        " (cuBLASLt status " + std::to_string(static_cast<int>(status)) + ")",
                    static_cast<int>(status));
}

constexpr std::int64_t kManyRows = 4096;

cudaDataType_t data_type(DType dtype) { return dtype == DType::BF16 ? CUDA_R_16BF : CUDA_R_32F; }

}  // namespace

// The library's description of one product; it computes column-major matrices, so y^T = w' x^T.
struct Blas::Prepared {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
  cublasLtMatmulAlgo_t algorithm{};
  bool found = false;
  ~Prepared() {
    if (y != nullptr) cublasLtMatrixLayoutDestroy(y);
    if (x != nullptr) cublasLtMatrixLayoutDestroy(x);
    if (w != nullptr) cublasLtMatrixLayoutDestroy(w);
    if (product != nullptr) cublasLtMatmulDescDestroy(product);
  }
};

Blas::Blas() { check_blas(cublasLtCreate(&handle_), "cuBLASLt"); }

Blas::~Blas() {
  for (auto& [product, prepared] : prepared_) delete prepared;
  cublasLtDestroy(handle_);
}

std::unique_ptr<Blas::Prepared> Blas::describe(const Product& p) {
  auto made = std::make_unique<Prepared>();
  check_blas(cublasLtMatmulDescCreate(&made->product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cuBLASLt");
  const cublasOperation_t w_operation = p.w_is_n_by_k ? CUBLAS_OP_T : CUBLAS_OP_N;
  check_blas(cublasLtMatmulDescSetAttribute(made->product, CUBLASLT_MATMUL_DESC_TRANSA,
                                            &w_operation, sizeof w_operation),
             "cuBLASLt");
  const auto rows = static_cast<std::uint64_t>(p.w_is_n_by_k ? p.k : p.n);
  const auto cols = static_cast<std::uint64_t>(p.w_is_n_by_k ? p.n : p.k);
  const auto n = static_cast<std::uint64_t>(p.n), m = static_cast<std::uint64_t>(p.m);
  check_blas(cublasLtMatrixLayoutCreate(&made->w, data_type(p.dtype), rows, cols, p.w_stride),
             "cuBLASLt");
  check_blas(cublasLtMatrixLayoutCreate(&made->x, data_type(p.dtype),
                                        static_cast<std::uint64_t>(p.k), m, p.x_stride),
             "cuBLASLt");
  check_blas(cublasLtMatrixLayoutCreate(&made->y, data_type(p.y_dtype), n, m, p.y_stride),
             "cuBLASLt");
  return made;
}

// The algorithm of the library's choice for p; false when it has none.
bool Blas::choose(const Prepared& p, cublasLtMatmulAlgo_t& algorithm) {
  cublasLtMatmulPreference_t preference = nullptr;
  check_blas(cublasLtMatmulPreferenceCreate(&preference), "cuBLASLt");
  const std::uint64_t workspace = kBlasWorkspace;
  const std::uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, alignment = 16;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                       &workspace, sizeof workspace);
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                       &reduction, sizeof reduction);
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof alignment);
  }
  cublasLtMatmulHeuristicResult_t best{};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle_, p.product, p.w, p.x, p.y,
                                                               p.y, preference, 1, &best, &count);
  cublasLtMatmulPreferenceDestroy(preference);
  algorithm = best.algo;
  return status == CUBLAS_STATUS_SUCCESS && count > 0;
}

// What is chosen for kManyRows serves all products of as many rows as a sum over tokens takes, so
// that a row has the same bits among any number of them.
Blas::Prepared& Blas::prepare(const Product& p) {
  if (const auto found = prepared_.find(p); found != prepared_.end()) return *found->second;
  std::unique_ptr<Prepared> made = describe(p);
  if (p.m >= kTokenTile && p.m != kManyRows) {
    Product like = p;
    like.m = kManyRows;
    const Prepared& many = prepare(like);
    cublasLtMatmulHeuristicResult_t result{};
    made->found =
        many.found &&
        cublasLtMatmulAlgoCheck(handle_, made->product, made->w, made->x, made->y, made->y,
                                &many.algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
        result.workspaceSize <= kBlasWorkspace;
    made->algorithm = many.algorithm;
  }
  if (!made->found) made->found = choose(*made, made->algorithm);
  return *(prepared_[p] = made.release());
}

bool Blas::supports(const Product& p) { return prepare(p).found; }

void Blas::run(const Product& p, float alpha, const void* x, const void* w, void* y,
               void* workspace, cudaStream_t stream) {
  Prepared& made = prepare(p);
  const float beta = p.accumulate ? 1.0f : 0.0f;
  check_blas(cublasLtMatmul(handle_, made.product, &alpha, w, made.w, x, made.x, &beta, y, made.y,
                            y, made.y, &made.algorithm, workspace, kBlasWorkspace, stream),
             "cuBLASLt product");
}

}  // namespace nibble::cuda
