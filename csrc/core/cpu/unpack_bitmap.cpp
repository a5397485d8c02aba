// The weight back from records in tiles, and its surplus: records.h.
#include "core/check_bitmap.h"
#include "records.h"
#include "surplus.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

Status unpack_bitmap(const void* values, const std::int32_t* mask, const Surplus& surplus,
                     MatrixView weight, const ParallelFor& parallel) {
  const char* op = "unpack_bitmap";
  const std::int64_t n = weight.rows, k = weight.cols;
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_bitmap(op, values, mask, n, k); !status.ok()) return status;
  if (Status status = check_surplus_entries(op, surplus, n, k, parallel); !status.ok()) {
    return status;
  }
  unpack_records(bitmap_records(weight.dtype, n, k, values, mask, surplus), weight, parallel);
  return {};
}

}  // namespace wanda_ext
