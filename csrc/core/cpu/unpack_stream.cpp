// The weight back from a stream of its non-zeros: records.h.
#include "core/check_stream.h"
#include "records.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

Status unpack_stream(const Stream& stream, MatrixView weight, const ParallelFor& parallel) {
  const char* op = "unpack_stream";
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_stream(op, stream, weight.rows, weight.cols); !status.ok()) {
    return status;
  }
  unpack_records(stream_records(weight.dtype, weight.rows, weight.cols, stream), weight, parallel);
  return {};
}

}  // namespace wanda_ext
