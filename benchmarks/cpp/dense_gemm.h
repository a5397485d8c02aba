// The dense matrix product that packed linears are compared with: cuBLAS, called as torch.mm calls
// it.
//
// cuBLAS is looked for when a program runs: WANDA_EXT_CUBLAS is its file, or it is on the library
// path, such as that of torch's own packages. So a program needs no toolkit, and says what it
// lacks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "wanda_ext/matrix_view.h"

namespace bench {

class DenseGemm {
 public:
  explicit DenseGemm(cudaStream_t stream);
  ~DenseGemm();
  DenseGemm(const DenseGemm&) = delete;
  DenseGemm& operator=(const DenseGemm&) = delete;

  // "" or why there is no product.
  static const std::string& missing();
  // "13.1.0 of libcublas.so.13", or why it is missing.
  static std::string version();

  // y [m,n] = x [m,k] @ weight [n,k]^T, all contiguous and bf16 or fp16, fp32 accumulation; "" or
  // what cuBLAS says. exactly: parts of k are not added in 16 bits, which it may do by default.
  std::string run(const void* x, const void* weight, void* y, std::int64_t m, std::int64_t n,
                  std::int64_t k, wanda_ext::DType dtype, bool exactly = false);

 private:
  void* handle_ = nullptr;
  void* workspace_ = nullptr;
};

}  // namespace bench
