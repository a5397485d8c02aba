// The arguments of each op, from tensors to what floor 0 takes: one struct an op, for every device.
//
// A struct holds the tensors that its pointers point into: copies of what is not laid out as the
// kernels read it, and what the op returns. On CUDA it is made under a device guard.
#pragma once

#include <tuple>

#include "checks.h"
#include "wanda_ext/ops.h"

namespace wanda_ext::bindings {

inline Tensor new_workspace(const Tensor& like, std::size_t bytes) {
  return torch::stable::new_empty(like, Sizes{static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
}

// CUDA kernels read x 16 bytes at a time; what does not lie so is copied.
inline ConstMatrixView on_16_bytes(Rows& x) {
  const ConstMatrixView view = x.view;
  const bool fits =
      reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && (view.rows <= 1 || view.ld % 8 == 0);
  if (fits) return view;
  const std::int64_t ld = (view.cols + 7) / 8 * 8;
  Tensor copy = torch::stable::new_empty(x.tensor, Sizes{view.rows, ld});
  Tensor columns = torch::stable::narrow(copy, 1, 0, view.cols);
  torch::stable::copy_(columns, torch::stable::reshape(x.tensor, Sizes{view.rows, view.cols}));
  x.tensor = copy;
  return {copy.data_ptr(), view.rows, view.cols, ld, view.dtype};
}

struct SumsqArguments {
  Rows x;
  double* acc;
  std::optional<Tensor> mask;
  const bool* keep = nullptr;

  SumsqArguments(const char* op, const Tensor& acc_tensor, const Tensor& x_tensor,
                 const std::optional<Tensor>& keep_tensor)
      : x(rows_of(op, x_tensor)) {
    check_tensor(op, "acc", acc_tensor, ScalarType::Double, {x.view.cols}, x_tensor);
    acc = static_cast<double*>(acc_tensor.data_ptr());
    if (keep_tensor.has_value()) mask = torch::stable::contiguous(*keep_tensor);
    Sizes leading = sizes_of(x_tensor);
    leading.pop_back();
    keep = data_or_null<const bool>(op, "keep", mask, ScalarType::Bool, leading, x_tensor);
  }
};

struct WeightArguments {
  MatrixView weight;
  std::int32_t* bad;

  WeightArguments(const char* op, const Tensor& weight_tensor,
                  const std::optional<Tensor>& bad_tensor)
      : weight(weight_view(op, weight_tensor)),
        bad(data_or_null<std::int32_t>(op, "bad", bad_tensor, ScalarType::Int, {1},
                                       weight_tensor)) {}
};

struct PruneArguments : WeightArguments {
  const float* norm;

  PruneArguments(const char* op, const Tensor& weight_tensor,
                 const std::optional<Tensor>& input_norm, const std::optional<Tensor>& bad_tensor)
      : WeightArguments(op, weight_tensor, bad_tensor),
        norm(data_or_null<const float>(op, "input_norm", input_norm, ScalarType::Float,
                                       {weight.cols}, weight_tensor)) {}
};

inline void check_keep_of_group(const char* op, std::int64_t keep, std::int64_t group) {
  check(0 < keep && keep <= group && group <= kMaxGroup, op,
        "expected 0 < keep <= group <= ", kMaxGroup, ", got keep ", keep, ", group ", group);
}

struct PackArguments : WeightArguments {
  Tensor values, meta;  // returned

  PackArguments(const char* op, const Tensor& weight_tensor,
                const std::optional<Tensor>& bad_tensor)
      : WeightArguments(op, weight_tensor, bad_tensor) {
    check(weight.cols % kColumnsPerMeta == 0, op,
          "weight must be of shape [n, k] with k divisible by ", kColumnsPerMeta, ", got ",
          text(sizes_of(weight_tensor)));
    values = torch::stable::new_empty(weight_tensor, Sizes{weight.rows, weight.cols / 2});
    meta = torch::stable::new_empty(
        weight_tensor, Sizes{weight.rows, weight.cols / kColumnsPerMeta}, ScalarType::Short);
  }

  std::int16_t* meta_words() const { return static_cast<std::int16_t*>(meta.data_ptr()); }
};

struct UnpackArguments {
  Packed packed;
  Tensor weight;  // returned
  MatrixView view;

  UnpackArguments(const char* op, const Tensor& values, const Tensor& meta, std::int64_t order)
      : packed(packed_of(op, values, meta, order)),
        weight(torch::stable::new_empty(values, Sizes{packed.n, packed.k})),
        view(weight_view(op, weight)) {}
};

struct OrderArguments {
  MetaOrder src_order, dst_order;
  const std::int16_t* src;
  Tensor moved;  // returned
  std::int16_t* dst;

  OrderArguments(const char* op, const Tensor& meta, std::int64_t n, std::int64_t k,
                 std::int64_t src_number, std::int64_t dst_number)
      : src_order(order_of(op, "src", src_number)), dst_order(order_of(op, "dst", dst_number)) {
    check(n >= 0 && k >= 0 && k % kColumnsPerMeta == 0, op,
          "n and k must not be negative, k must be divisible by ", kColumnsPerMeta, ", got n ", n,
          ", k ", k);
    check_tensor(op, "meta", meta, ScalarType::Short, meta_sizes(src_order, n, k), meta);
    src = static_cast<const std::int16_t*>(meta.data_ptr());
    moved = torch::stable::new_empty(meta, meta_sizes(dst_order, n, k));
    dst = static_cast<std::int16_t*>(moved.data_ptr());
  }
};

// Of a linear, whatever W is packed as.
struct Product {
  Rows x;
  const void* bias;
  Tensor y;  // returned
  MatrixView y_view;

  Product(const char* op, const Tensor& x_tensor) : x(rows_of(op, x_tensor)) {}

  // When the weight of n rows is known.
  void finish(const char* op, const Tensor& x_tensor, const Tensor& values, std::int64_t n,
              const std::optional<Tensor>& bias_tensor) {
    check(x_tensor.device() == values.device(), op,
          "x must be on the device of values; move it there");
    check(x_tensor.scalar_type() == values.scalar_type(), op, "x must have the dtype of values, ",
          name_of(values.scalar_type()), ", got ", name_of(x_tensor.scalar_type()));
    bias = data_or_null<const void>(op, "bias", bias_tensor, values.scalar_type(), {n}, values);
    Sizes sizes = sizes_of(x_tensor);
    sizes.back() = n;
    y = torch::stable::new_empty(x_tensor, sizes);
    y_view = {y.data_ptr(), x.view.rows, n, n, x.view.dtype};
  }
};

struct LinearArguments : Product {
  Packed packed;

  LinearArguments(const char* op, const Tensor& x_tensor, const Tensor& values, const Tensor& meta,
                  std::int64_t order, const std::optional<Tensor>& bias_tensor)
      : Product(op, x_tensor), packed(packed_of(op, values, meta, order)) {
    check(x.view.cols == packed.k, op, "x must be of shape [..., ", packed.k, "], got ",
          text(sizes_of(x_tensor)));
    finish(op, x_tensor, values, packed.n, bias_tensor);
  }
};

struct PackBitmapArguments : WeightArguments {
  Tensor values, mask;  // returned

  PackBitmapArguments(const char* op, const Tensor& weight_tensor,
                      const std::optional<Tensor>& bad_tensor)
      : WeightArguments(op, weight_tensor, bad_tensor) {
    const std::int64_t row_tiles = bitmap_row_tiles(weight.rows);
    const std::int64_t column_tiles = bitmap_column_tiles(weight.cols);
    values =
        torch::stable::new_empty(weight_tensor, Sizes{row_tiles, column_tiles, kBitmapTileValues});
    mask = torch::stable::new_empty(weight_tensor, Sizes{row_tiles, column_tiles, kBitmapTileMasks},
                                    ScalarType::Int);
  }

  std::int32_t* mask_words() const { return static_cast<std::int32_t*>(mask.data_ptr()); }
};

struct UnpackBitmapArguments {
  Bitmap packed;
  Surplus surplus;
  Tensor weight;  // returned
  MatrixView view;

  UnpackBitmapArguments(const char* op, const Tensor& values, const Tensor& mask, std::int64_t n,
                        std::int64_t k, const std::optional<Tensor>& surplus_rows,
                        const std::optional<Tensor>& surplus_columns,
                        const std::optional<Tensor>& surplus_values)
      : packed(bitmap_of(op, values, mask, n, k)),
        surplus(surplus_of(op, surplus_rows, surplus_columns, surplus_values, n, values)),
        weight(torch::stable::new_empty(values, Sizes{n, k})),
        view(weight_view(op, weight)) {}
};

struct LinearBitmapArguments : Product {
  Bitmap packed;
  Surplus surplus;

  LinearBitmapArguments(const char* op, const Tensor& x_tensor, const Tensor& values,
                        const Tensor& mask, std::int64_t n,
                        const std::optional<Tensor>& bias_tensor,
                        const std::optional<Tensor>& surplus_rows,
                        const std::optional<Tensor>& surplus_columns,
                        const std::optional<Tensor>& surplus_values)
      : Product(op, x_tensor), packed(bitmap_of(op, values, mask, n, x.view.cols)) {
    surplus = surplus_of(op, surplus_rows, surplus_columns, surplus_values, n, values);
    finish(op, x_tensor, values, n, bias_tensor);
  }
};

struct PackStreamArguments {
  MatrixView weight;
  Tensor values, mask, offsets;  // returned

  PackStreamArguments(const char* op, const Tensor& weight_tensor, std::int64_t count)
      : weight(weight_view(op, weight_tensor)) {
    check(count >= 0 && count <= weight.rows * weight.cols, op,
          "count must be the number of non-zeros of weight, got ", count);
    values = torch::stable::new_empty(weight_tensor, Sizes{count});
    mask = torch::stable::new_empty(weight_tensor, Sizes{weight.rows, (weight.cols + 7) / 8},
                                    ScalarType::Byte);
    offsets = torch::stable::new_empty(weight_tensor, Sizes{weight.rows + 1}, ScalarType::Long);
  }

  std::uint8_t* mask_bytes() const { return static_cast<std::uint8_t*>(mask.data_ptr()); }
  std::int64_t* offset_words() const { return static_cast<std::int64_t*>(offsets.data_ptr()); }
};

struct UnpackStreamArguments {
  Stream stream;
  Tensor weight;  // returned
  MatrixView view;

  UnpackStreamArguments(const char* op, const Tensor& values, const Tensor& mask,
                        const Tensor& offsets, std::int64_t k)
      : stream(stream_of(op, values, mask, offsets, k)),
        weight(torch::stable::new_empty(values, Sizes{mask.size(0), k})),
        view(weight_view(op, weight)) {}
};

struct LinearStreamArguments : Product {
  Stream stream;

  LinearStreamArguments(const char* op, const Tensor& x_tensor, const Tensor& values,
                        const Tensor& mask, const Tensor& offsets,
                        const std::optional<Tensor>& bias_tensor)
      : Product(op, x_tensor), stream(stream_of(op, values, mask, offsets, x.view.cols)) {
    finish(op, x_tensor, values, mask.size(0), bias_tensor);
  }
};

}  // namespace wanda_ext::bindings
