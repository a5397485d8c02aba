// The argument checks that the bitmap ops share.
#pragma once

#include <climits>
#include <cstdint>

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

// What a device asks beside: loads and stores of 16 bytes, rows and tiles counted by an int.
inline Status check_bitmap_on_device(const char* op, const void* values, const void* mask,
                                     std::int64_t n, std::int64_t k) {
  if (Status status = check_bitmap(op, values, mask, n, k); !status.ok()) return status;
  const bool is_aligned =
      (reinterpret_cast<std::uintptr_t>(values) | reinterpret_cast<std::uintptr_t>(mask)) % 16 == 0;
  if (is_aligned && n <= INT_MAX && bitmap_row_tiles(n) * bitmap_column_tiles(k) <= INT_MAX) {
    return {};
  }
  return make_error(StatusCode::kInvalidArgument,
                    "%s: values and mask must start on 16 bytes, and a weight have less than "
                    "2^31 tiles, got %lld x %lld; split its rows",
                    op, static_cast<long long>(n), static_cast<long long>(k));
}

// Of a weight of k columns. Its pointers alone: what they point to may lie on a device.
inline Status check_surplus(const char* op, const Surplus& surplus, std::int64_t k) {
  const bool incomplete =
      surplus.rows == nullptr || surplus.columns == nullptr || surplus.values == nullptr;
  if (surplus.count < 0 || (surplus.count > 0 && incomplete)) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: a surplus needs rows [n+1], columns [count] and values [count], "
                      "count >= 0; got count %lld with a null pointer or a negative count",
                      op, static_cast<long long>(surplus.count));
  }
  if (surplus.rows != nullptr && k > kMaxSurplusCols) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: a weight with a surplus may have at most %lld columns, got %lld", op,
                      static_cast<long long>(kMaxSurplusCols), static_cast<long long>(k));
  }
  return {};
}

inline Status check_linear_bitmap(const ConstMatrixView& x, const void* values, const void* mask,
                                  const Surplus& surplus, const MatrixView& y) {
  const char* op = "linear_bitmap";
  if (Status status = check_matrix(op, "x", x); !status.ok()) return status;
  if (Status status = check_matrix(op, "y", y); !status.ok()) return status;
  if (Status status = check_same_rows(op, x, y); !status.ok()) return status;
  if (Status status = check_surplus(op, surplus, x.cols); !status.ok()) return status;
  return check_bitmap(op, values, mask, y.cols, x.cols);
}

}  // namespace wanda_ext
