// In place of cuBLAS, for the benchmarks on the host: sums in double, rounded once.
// HOST_GEMM_IS_WRONG=1 makes it wrong, HOST_GEMM_IS_MISSING=1 lets it be missing.
#include <cstdlib>

#include "../../../benchmarks/cpp/dense_gemm.h"
#include "core/cpu/dtype.h"

namespace bench {

using wanda_ext::BFloat16;
using wanda_ext::Float16;

DenseGemm::DenseGemm(cudaStream_t) {}
DenseGemm::~DenseGemm() = default;

const std::string& DenseGemm::missing() {
  static const std::string why = std::getenv("HOST_GEMM_IS_MISSING") ? "it is not here" : "";
  return why;
}
std::string DenseGemm::version() { return missing().empty() ? "the host's" : missing(); }

std::string DenseGemm::run(const void* x, const void* weight, void* y, std::int64_t m,
                           std::int64_t n, std::int64_t k, wanda_ext::DType dtype, bool) {
  if (!missing().empty()) return missing();
  const bool bf16 = dtype == wanda_ext::DType::kBFloat16;
  const auto at = [bf16](const void* data, std::int64_t i) {
    return double{bf16 ? wanda_ext::to_float(static_cast<const BFloat16*>(data)[i])
                       : wanda_ext::to_float(static_cast<const Float16*>(data)[i])};
  };
  for (std::int64_t t = 0; t < m; ++t) {
    for (std::int64_t r = 0; r < n; ++r) {
      double sum = std::getenv("HOST_GEMM_IS_WRONG") != nullptr && r == n - 1 ? 1 : 0;
      for (std::int64_t c = 0; c < k; ++c) sum += at(x, t * k + c) * at(weight, r * k + c);
      if (bf16) {
        static_cast<BFloat16*>(y)[t * n + r] =
            wanda_ext::from_float<BFloat16>(static_cast<float>(sum));
      } else {
        static_cast<Float16*>(y)[t * n + r] =
            wanda_ext::from_float<Float16>(static_cast<float>(sum));
      }
    }
  }
  return "";
}

}  // namespace bench
