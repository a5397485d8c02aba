// The argument checks that the 2:4 ops share.
#pragma once

#include <cstdint>

#include "wanda_ext/nm24.h"
#include "wanda_ext/status.h"

namespace wanda_ext {

// values and meta of an n x k matrix.
inline Status check_packed(const char* op, const void* values, const void* meta, std::int64_t n,
                           std::int64_t k) {
  if (k % kColumnsPerMeta != 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: the columns of the weight must be a multiple of %d, got %lld", op,
                      kColumnsPerMeta, static_cast<long long>(k));
  }
  if ((values == nullptr || meta == nullptr) && n > 0 && k > 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: %s is a null pointer; pass values [n,k/2] and meta [n,k/16] for a "
                      "%lld x %lld weight",
                      op, values == nullptr ? "values" : "meta", static_cast<long long>(n),
                      static_cast<long long>(k));
  }
  return {};
}

inline Status check_order(const char* op, MetaOrder order) {
  if (!is_meta_order(static_cast<int>(order))) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: the order of meta must be 0 (canonical), 80 or 90, got %d", op,
                      static_cast<int>(order));
  }
  return {};
}

inline Status check_order_meta_24(const void* src, MetaOrder src_order, const void* dst,
                                  MetaOrder dst_order, std::int64_t n, std::int64_t k) {
  if (Status status = check_order("order_meta_24", src_order); !status.ok()) return status;
  if (Status status = check_order("order_meta_24", dst_order); !status.ok()) return status;
  if (n < 0 || k < 0 || k % kColumnsPerMeta != 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "order_meta_24: the weight must have n >= 0 rows and k >= 0 columns, k a "
                      "multiple of %d, got %lld x %lld",
                      kColumnsPerMeta, static_cast<long long>(n), static_cast<long long>(k));
  }
  if ((src == nullptr || dst == nullptr) && n > 0 && k > 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "order_meta_24: %s is a null pointer; pass the padded metadata of a "
                      "%lld x %lld weight",
                      src == nullptr ? "src" : "dst", static_cast<long long>(n),
                      static_cast<long long>(k));
  }
  return {};
}

}  // namespace wanda_ext
