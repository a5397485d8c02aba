#include "dense_gemm.h"

#include <cublas_v2.h>

#include <cstdio>
#include <cstdlib>

namespace bench {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what cuBLAS asks for on sm_90

void check(cublasStatus_t status) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "cuBLAS failed: %s\n", cublasGetStatusString(status));
  std::exit(1);
}

}  // namespace

DenseGemm::DenseGemm(cudaStream_t stream) {
  cublasHandle_t handle;
  check(cublasCreate(&handle));
  handle_ = handle;
  check(cublasSetStream(handle, stream));
  // One of its own would be allocated in the midst of a capture.
  if (cudaMalloc(&workspace_, kWorkspaceBytes) != cudaSuccess) std::abort();
  check(cublasSetWorkspace(handle, workspace_, kWorkspaceBytes));
}

DenseGemm::~DenseGemm() {
  cublasDestroy(static_cast<cublasHandle_t>(handle_));
  cudaFree(workspace_);
}

// Columns come first in cuBLAS: there y^T [n,m] = weight [n,k] @ x^T [k,m], weight transposed.
void DenseGemm::run(const void* x, const void* weight, void* y, std::int64_t m, std::int64_t n,
                    std::int64_t k, wanda_ext::DType dtype) {
  const cudaDataType_t type = dtype == wanda_ext::DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  const float one = 1, zero = 0;
  check(cublasGemmEx(static_cast<cublasHandle_t>(handle_), CUBLAS_OP_T, CUBLAS_OP_N,
                     static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), &one, weight,
                     type, static_cast<int>(k), x, type, static_cast<int>(k), &zero, y, type,
                     static_cast<int>(n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

}  // namespace bench
