// The argument checks that the bitmap ops share.
#pragma once

#include "core/check_args.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

// values and mask of an n x k matrix.
inline Status check_bitmap(const char* op, const void* values, const void* mask, std::int64_t n,
                           std::int64_t k) {
  if ((values == nullptr || mask == nullptr) && n > 0 && k > 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: %s is a null pointer; pass values [n16,k128,1024] and mask "
                      "[n16,k128,64] for a %lld x %lld weight",
                      op, values == nullptr ? "values" : "mask", static_cast<long long>(n),
                      static_cast<long long>(k));
  }
  return {};
}

// Its pointers alone: what they point to may lie on a device.
inline Status check_surplus(const char* op, const Surplus& surplus) {
  const bool incomplete =
      surplus.rows == nullptr || surplus.columns == nullptr || surplus.values == nullptr;
  if (surplus.count < 0 || (surplus.count > 0 && incomplete)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: a surplus needs rows [n+1], columns [count] and values [count], "
                      "count >= 0; got count %lld with a null pointer or a negative count",
                      op, static_cast<long long>(surplus.count));
  }
  return {};
}

inline Status check_linear_bitmap(const ConstMatrixView& x, const void* values, const void* mask,
                                  const Surplus& surplus, const MatrixView& y) {
  const char* op = "linear_bitmap";
  if (Status status = check_matrix(op, "x", x); !status.ok()) return status;
  if (Status status = check_matrix(op, "y", y); !status.ok()) return status;
  if (Status status = check_same_rows(op, x, y); !status.ok()) return status;
  if (Status status = check_surplus(op, surplus); !status.ok()) return status;
  return check_bitmap(op, values, mask, y.cols, x.cols);
}

}  // namespace wanda_ext
