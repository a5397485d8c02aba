// y = x W^T (+ bias), W packed 2:4: records.h.
#include "core/check_args.h"
#include "core/check_packed.h"
#include "records.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

std::size_t linear_24_workspace(std::int64_t m, std::int64_t /*n*/, std::int64_t k, int threads) {
  return multiply_records_workspace(m, k, threads);
}

Status linear_24(ConstMatrixView x, const void* values, const std::int16_t* meta, MetaOrder order,
                 const void* bias, MatrixView y, void* workspace, const ParallelFor& parallel) {
  const char* op = "linear_24";
  const std::int64_t n = y.cols, k = x.cols;
  if (Status status = check_matrix(op, "x", x); !status.ok()) return status;
  if (Status status = check_matrix(op, "y", y); !status.ok()) return status;
  if (Status status = check_order(op, order); !status.ok()) return status;
  if (Status status = check_packed(op, values, meta, n, k); !status.ok()) return status;
  if (Status status = check_same_rows(op, x, y); !status.ok()) return status;
  const RecordWeight weight = {RecordFormat::k24, x.dtype, n, k, values, n * (k / 2), meta, order};
  return multiply_records(op, weight, x, bias, y, workspace, parallel);
}

}  // namespace wanda_ext
