// The argument checks that ops share.
#pragma once

#include "wanda_ext/ops.h"

namespace wanda_ext {

// `op` and `name` say whose matrix it is: "prune_rows", "weight".
inline Status check_matrix(const char* op, const char* name, const ConstMatrixView& view) {
  if (view.dtype != DType::kFloat32 && view.dtype != DType::kBFloat16 &&
      view.dtype != DType::kFloat16) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: %s must be float32, bfloat16 or float16, got dtype code %d", op, name,
                      static_cast<int>(view.dtype));
  }
  if (view.rows < 0 || view.cols < 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: %s must have rows >= 0 and cols >= 0, got %lld x %lld", op, name,
                      static_cast<long long>(view.rows), static_cast<long long>(view.cols));
  }
  if (view.rows > 1 && view.ld < view.cols) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: %s must have ld >= cols (elements from row to row), got ld %lld for "
                      "%lld cols",
                      op, name, static_cast<long long>(view.ld), static_cast<long long>(view.cols));
  }
  if (view.data == nullptr && view.rows > 0 && view.cols > 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: %s is a null pointer; pass %lld x %lld elements", op, name,
                      static_cast<long long>(view.rows), static_cast<long long>(view.cols));
  }
  return {};
}

// Of a linear: y has a row for each token of x, and its dtype.
inline Status check_same_rows(const char* op, const ConstMatrixView& x, const MatrixView& y) {
  if (y.rows != x.rows || y.dtype != x.dtype) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: y must have the rows and dtype of x, %lld of %s, got %lld of %s", op,
                      static_cast<long long>(x.rows), name_of(x.dtype),
                      static_cast<long long>(y.rows), name_of(y.dtype));
  }
  return {};
}

inline Status check_prune_rows(const MatrixView& weight, std::int64_t n_prune) {
  if (Status status = check_matrix("prune_rows", "weight", weight); !status.ok()) return status;
  if (weight.cols > kMaxCols) {
    return make_error(StatusCode::kInvalidArgument,
                      "prune_rows: weight may have at most %lld columns, got %lld",
                      static_cast<long long>(kMaxCols), static_cast<long long>(weight.cols));
  }
  if (n_prune < 0 || n_prune > weight.cols) {
    return make_error(StatusCode::kInvalidArgument,
                      "prune_rows: n_prune must be in [0, %lld], the columns of weight, got %lld",
                      static_cast<long long>(weight.cols), static_cast<long long>(n_prune));
  }
  return {};
}

inline Status check_prune_nm(const MatrixView& weight, int keep, int group) {
  if (Status status = check_matrix("prune_nm", "weight", weight); !status.ok()) return status;
  if (group > kMaxGroup || keep < 1 || keep > group) {
    return make_error(StatusCode::kInvalidArgument,
                      "prune_nm: keep:group must have 0 < keep <= group <= %d, got %d:%d",
                      kMaxGroup, keep, group);
  }
  if (weight.cols % group != 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "prune_nm: the columns of weight must be a multiple of the group, got %lld "
                      "columns for %d:%d",
                      static_cast<long long>(weight.cols), keep, group);
  }
  return {};
}

}  // namespace wanda_ext
