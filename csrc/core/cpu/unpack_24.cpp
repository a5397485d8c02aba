// The weight back from values and metadata: records.h.
#include "core/check_args.h"
#include "core/check_packed.h"
#include "records.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

Status unpack_24(const void* values, const std::int16_t* meta, MetaOrder order, MatrixView weight,
                 const ParallelFor& parallel) {
  const char* op = "unpack_24";
  const std::int64_t n = weight.rows, k = weight.cols;
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_order(op, order); !status.ok()) return status;
  if (Status status = check_packed(op, values, meta, n, k); !status.ok()) return status;
  unpack_records({RecordFormat::k24, weight.dtype, n, k, values, n * (k / 2), meta, order}, weight,
                 parallel);
  return {};
}

}  // namespace wanda_ext
