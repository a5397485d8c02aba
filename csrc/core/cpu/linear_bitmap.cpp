// y = x W^T (+ bias), W packed as a bitmap, with its surplus: records.h.
#include "core/check_bitmap.h"
#include "records.h"
#include "surplus.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

std::size_t linear_bitmap_workspace(std::int64_t m, std::int64_t /*n*/, std::int64_t k,
                                    int threads) {
  return multiply_records_workspace(m, k, threads);
}

Status linear_bitmap(ConstMatrixView x, const void* values, const std::int32_t* mask,
                     const Surplus& surplus, const void* bias, MatrixView y, void* workspace,
                     const ParallelFor& parallel) {
  const char* op = "linear_bitmap";
  const std::int64_t n = y.cols, k = x.cols;
  if (Status status = check_linear_bitmap(x, values, mask, surplus, y); !status.ok()) return status;
  if (Status status = check_surplus_entries(op, surplus, n, k, parallel); !status.ok()) {
    return status;
  }
  return multiply_records(op, bitmap_records(x.dtype, n, k, values, mask, surplus), x, bias, y,
                          workspace, parallel);
}

}  // namespace wanda_ext
