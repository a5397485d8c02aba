// The dense matrix product that 2:4 is compared with: cuBLAS, called as torch.mm calls it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "wanda_ext/matrix_view.h"

namespace bench {

class DenseGemm {
 public:
  explicit DenseGemm(cudaStream_t stream);
  ~DenseGemm();
  DenseGemm(const DenseGemm&) = delete;
  DenseGemm& operator=(const DenseGemm&) = delete;

  // y [m,n] = x [m,k] @ weight [n,k]^T, all contiguous and bf16 or fp16, fp32 accumulation.
  void run(const void* x, const void* weight, void* y, std::int64_t m, std::int64_t n,
           std::int64_t k, wanda_ext::DType dtype);

 private:
  void* handle_ = nullptr;
  void* workspace_ = nullptr;
};

}  // namespace bench
