// y = x W^T (+ bias), W a stream of its non-zeros: records.h.
#include "core/check_stream.h"
#include "records.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

std::size_t linear_stream_workspace(std::int64_t m, std::int64_t /*n*/, std::int64_t k,
                                    int threads) {
  return multiply_records_workspace(m, k, threads);
}

Status linear_stream(ConstMatrixView x, const Stream& stream, const void* bias, MatrixView y,
                     void* workspace, const ParallelFor& parallel) {
  const char* op = "linear_stream";
  const std::int64_t n = y.cols, k = x.cols;
  if (Status status = check_matrix(op, "x", x); !status.ok()) return status;
  if (Status status = check_matrix(op, "y", y); !status.ok()) return status;
  if (Status status = check_same_rows(op, x, y); !status.ok()) return status;
  if (Status status = check_stream(op, stream, n, k); !status.ok()) return status;
  return multiply_records(op, stream_records(x.dtype, n, k, stream), x, bias, y, workspace,
                          parallel);
}

}  // namespace wanda_ext
