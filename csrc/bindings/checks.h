// From torch tensors to the pointers and views that floor 0 takes. Every check says the op, the
// argument, what was expected and what came; it throws here, outside any parallel region.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "wanda_ext/ops.h"

namespace wanda_ext::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<std::int64_t>;

// STD_TORCH_CHECK would put a source path in front of the message.
template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  message << "wanda_ext." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check(const char* op, const Status& status) { check(status.ok(), op, status.message); }

inline std::string text(const Sizes& sizes) {
  std::ostringstream out;
  for (std::size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "[") << sizes[i];
  out << (sizes.empty() ? "[]" : "]");
  return out.str();
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

inline DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
        name, " must be float32, bfloat16 or float16, got ", name_of(type));
  return type == ScalarType::Float      ? DType::kFloat32
         : type == ScalarType::BFloat16 ? DType::kBFloat16
                                        : DType::kFloat16;
}

// A contiguous tensor of just this dtype and shape, on the device of `like`.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                         const Sizes& sizes, const Tensor& like) {
  check(tensor.scalar_type() == type, op, name, " must be ", name_of(type), ", got ",
        name_of(tensor.scalar_type()));
  check(sizes_of(tensor) == sizes, op, name, " must be of shape ", text(sizes), ", got ",
        text(sizes_of(tensor)));
  check(tensor.device() == like.device(), op, name,
        " must be on the device of the other tensors; move it there");
  check(tensor.is_contiguous(), op, name, " must be contiguous; call .contiguous() on it");
}

// The data of an optional tensor, null where it is absent.
template <class T>
T* data_or_null(const char* op, const char* name, const std::optional<Tensor>& tensor,
                ScalarType type, const Sizes& sizes, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  check_tensor(op, name, *tensor, type, sizes, like);
  return static_cast<T*>(tensor->data_ptr());
}

// A weight [n,k] as it lies: unit column stride, rows that do not overlap. Never copied.
inline MatrixView weight_view(const char* op, const Tensor& weight) {
  const DType dtype = dtype_of(op, "weight", weight);
  check(weight.dim() == 2, op, "weight must be of shape [n, k], got ", text(sizes_of(weight)));
  const std::int64_t n = weight.size(0), k = weight.size(1);
  const std::int64_t ld = n > 1 ? weight.stride(0) : k;
  const bool as_rows = (k <= 1 || weight.stride(1) == 1) && ld >= k;
  check(as_rows || n * k == 0, op, "weight must have unit column stride and separate rows, got ",
        "strides [", weight.stride(0), ", ", weight.stride(1),
        "]; pass its transpose or a contiguous copy");
  return {weight.data_ptr(), n, k, as_rows ? ld : k, dtype};
}

// x [..., k] as rows [m,k]. The view points into `tensor`.
struct Rows {
  Tensor tensor;
  ConstMatrixView view;
};

// Strided rows are read where they lie; a shape whose leading axes are not one stride apart, or
// with a column stride, is copied first.
inline Rows rows_of(const char* op, const Tensor& x) {
  const DType dtype = dtype_of(op, "x", x);
  check(x.dim() >= 1, op, "x must be of shape [..., k], got a scalar");
  const std::int64_t k = x.size(-1);
  std::int64_t m = 1, ld = k;
  bool as_rows = k <= 1 || x.stride(-1) == 1;
  for (std::int64_t axis = x.dim() - 2; axis >= 0; --axis) {
    const std::int64_t size = x.size(axis);
    if (m == 1 && size > 1) {
      ld = x.stride(axis);
      as_rows = as_rows && ld >= k;
    } else if (size > 1) {
      as_rows = as_rows && x.stride(axis) == ld * m;
    }
    m *= size;
  }
  if (m == 0 || !as_rows) ld = k;
  Tensor rows = as_rows ? x : torch::stable::contiguous(x);
  return {rows, ConstMatrixView(rows.data_ptr(), m, k, ld, dtype)};
}

// values [n,k/2] and meta in `order`, checked against each other.
struct Packed {
  std::int64_t n;
  std::int64_t k;
  MetaOrder order;
  DType dtype;
  const void* values;
  const std::int16_t* meta;
};

inline MetaOrder order_of(const char* op, const char* name, std::int64_t order) {
  check(order >= 0 && order <= 90 && is_meta_order(static_cast<int>(order)), op, name,
        " must be 0 (canonical), 80 (sm80) or 90 (sm90), got ", order);
  return static_cast<MetaOrder>(order);
}

inline Sizes meta_sizes(MetaOrder order, std::int64_t n, std::int64_t k) {
  return {padded_rows_24(order, n), padded_cols_24(order, k) / kColumnsPerMeta};
}

inline Packed packed_of(const char* op, const Tensor& values, const Tensor& meta,
                        std::int64_t order_number) {
  const DType dtype = dtype_of(op, "values", values);
  check(values.dim() == 2 && values.size(1) % (kColumnsPerMeta / 2) == 0, op,
        "values must be of shape [n, k/2] with k divisible by 16, got ", text(sizes_of(values)));
  check(values.is_contiguous(), op, "values must be contiguous; call .contiguous() on it");
  const std::int64_t n = values.size(0), k = 2 * values.size(1);
  const MetaOrder order = order_of(op, "order", order_number);
  check_tensor(op, "meta", meta, ScalarType::Short, meta_sizes(order, n, k), values);
  return {n, k, order, dtype, values.data_ptr(), static_cast<const std::int16_t*>(meta.data_ptr())};
}

// The surplus of a bitmap of n rows: three tensors, or none of them. The bits of a column are
// unsigned; int16 holds them because torch's uint16 has few ops.
inline Surplus surplus_of(const char* op, const std::optional<Tensor>& rows,
                          const std::optional<Tensor>& columns, const std::optional<Tensor>& values,
                          std::int64_t n, const Tensor& like) {
  check(rows.has_value() == columns.has_value() && rows.has_value() == values.has_value(), op,
        "a surplus is surplus_rows, surplus_columns and surplus_values; pass all three or none");
  if (!rows.has_value()) return {};
  check(columns->dim() == 1, op, "surplus_columns must be of shape [count], got ",
        text(sizes_of(*columns)));
  const std::int64_t count = columns->size(0);
  check_tensor(op, "surplus_rows", *rows, ScalarType::Int, {n + 1}, like);
  check_tensor(op, "surplus_columns", *columns, ScalarType::Short, {count}, like);
  check_tensor(op, "surplus_values", *values, like.scalar_type(), {count}, like);
  return {static_cast<const std::int32_t*>(rows->data_ptr()),
          static_cast<const std::uint16_t*>(columns->data_ptr()), values->data_ptr(), count};
}

inline Surplus from_row(Surplus surplus, std::int64_t row) {
  if (surplus.rows != nullptr) surplus.rows += row;
  return surplus;
}

// values [n16,k128,1024] and mask [n16,k128,64] of an [n,k] weight, checked against each other.
struct Bitmap {
  std::int64_t n;
  std::int64_t k;
  DType dtype;
  const void* values;
  const std::int32_t* mask;

  // From a row on that starts a row of tiles.
  Bitmap from_row(std::int64_t row) const {
    const std::int64_t tile = row / kBitmapTileRows * bitmap_column_tiles(k);
    const std::int64_t bytes = tile * kBitmapTileValues * static_cast<std::int64_t>(size_of(dtype));
    return {n - row, k, dtype, static_cast<const char*>(values) + bytes,
            mask + tile * kBitmapTileMasks};
  }
};

inline Bitmap bitmap_of(const char* op, const Tensor& values, const Tensor& mask, std::int64_t n,
                        std::int64_t k) {
  check(n >= 0 && k >= 0, op, "n and k must not be negative, got n ", n, ", k ", k);
  const std::int64_t row_tiles = bitmap_row_tiles(n), column_tiles = bitmap_column_tiles(k);
  const DType dtype = dtype_of(op, "values", values);
  check_tensor(op, "values", values, values.scalar_type(),
               {row_tiles, column_tiles, kBitmapTileValues}, values);
  check_tensor(op, "mask", mask, ScalarType::Int, {row_tiles, column_tiles, kBitmapTileMasks},
               values);
  return {n, k, dtype, values.data_ptr(), static_cast<const std::int32_t*>(mask.data_ptr())};
}

// values [count], mask [n,k/8] and offsets [n+1] of an [n,k] weight, checked against each other.
inline Stream stream_of(const char* op, const Tensor& values, const Tensor& mask,
                        const Tensor& offsets, std::int64_t k) {
  check(k >= 0, op, "k must not be negative, got ", k);
  check(values.dim() == 1, op, "values must be of shape [count], got ", text(sizes_of(values)));
  check(mask.dim() == 2, op, "mask must be of shape [n, k/8], got ", text(sizes_of(mask)));
  const std::int64_t n = mask.size(0), count = values.size(0);
  dtype_of(op, "values", values);
  check_tensor(op, "values", values, values.scalar_type(), {count}, values);
  check_tensor(op, "mask", mask, ScalarType::Byte, {n, (k + 7) / 8}, values);
  check_tensor(op, "offsets", offsets, ScalarType::Long, {n + 1}, values);
  return {values.data_ptr(), static_cast<const std::uint8_t*>(mask.data_ptr()),
          static_cast<const std::int64_t*>(offsets.data_ptr()), count};
}

}  // namespace wanda_ext::bindings
