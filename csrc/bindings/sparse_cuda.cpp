// pack_24, unpack_24, order_meta_24 and linear_24 on CUDA devices, on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "stream.h"
#include "wanda_ext/ops.h"

namespace wanda_ext::bindings {
namespace {

using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> pack_24(const Tensor& weight, const std::optional<Tensor>& bad) {
  const char* op = "pack_24";
  const DeviceGuard guard(weight.get_device_index());
  const MatrixView view = weight_view(op, weight);
  check(view.cols % kColumnsPerMeta == 0, op, "weight must be of shape [n, k] with k divisible by ",
        kColumnsPerMeta, ", got ", text(sizes_of(weight)));
  auto* first_bad = data_or_null<std::int32_t>(op, "bad", bad, ScalarType::Int, {1}, weight);
  Tensor values = torch::stable::new_empty(weight, Sizes{view.rows, view.cols / 2});
  Tensor meta = torch::stable::new_empty(weight, Sizes{view.rows, view.cols / kColumnsPerMeta},
                                         ScalarType::Short);
  check(op, cuda::pack_24(view, values.data_ptr(), static_cast<std::int16_t*>(meta.data_ptr()),
                          first_bad, current_cuda_stream(op, weight.get_device_index())));
  return {values, meta};
}

Tensor unpack_24(const Tensor& values, const Tensor& meta, std::int64_t order) {
  const char* op = "unpack_24";
  const DeviceGuard guard(values.get_device_index());
  const Packed packed = packed_of(op, values, meta, order);
  Tensor weight = torch::stable::new_empty(values, Sizes{packed.n, packed.k});
  check(op, cuda::unpack_24(packed.values, packed.meta, packed.order, weight_view(op, weight),
                            current_cuda_stream(op, values.get_device_index())));
  return weight;
}

Tensor order_meta_24(const Tensor& meta, std::int64_t n, std::int64_t k, std::int64_t src,
                     std::int64_t dst) {
  const char* op = "order_meta_24";
  const DeviceGuard guard(meta.get_device_index());
  const MetaOrder src_order = order_of(op, "src", src);
  const MetaOrder dst_order = order_of(op, "dst", dst);
  check(n >= 0 && k >= 0 && k % kColumnsPerMeta == 0, op, "n and k must not be negative, k must be",
        " divisible by ", kColumnsPerMeta, ", got n ", n, ", k ", k);
  check_tensor(op, "meta", meta, ScalarType::Short, meta_sizes(src_order, n, k), meta);
  Tensor moved = torch::stable::new_empty(meta, meta_sizes(dst_order, n, k));
  check(op, cuda::order_meta_24(static_cast<const std::int16_t*>(meta.data_ptr()), src_order,
                                static_cast<std::int16_t*>(moved.data_ptr()), dst_order, n, k,
                                current_cuda_stream(op, meta.get_device_index())));
  return moved;
}

// The kernels read 16 bytes at a time.
ConstMatrixView aligned(Rows& rows) {
  const ConstMatrixView& view = rows.view;
  const bool fits =
      reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && (view.rows <= 1 || view.ld % 8 == 0);
  if (fits) return view;
  rows.tensor = torch::stable::clone(torch::stable::contiguous(rows.tensor));
  return {rows.tensor.data_ptr(), view.rows, view.cols, view.cols, view.dtype};
}

Tensor linear_24(const Tensor& x, const Tensor& values, const Tensor& meta, std::int64_t order,
                 const std::optional<Tensor>& bias) {
  const char* op = "linear_24";
  const DeviceGuard guard(values.get_device_index());
  const Packed packed = packed_of(op, values, meta, order);
  Rows rows = rows_of(op, x);
  check(x.device() == values.device(), op, "x must be on the device of values; move it there");
  check(rows.view.dtype == packed.dtype, op, "x must have the dtype of values, ",
        name_of(values.scalar_type()), ", got ", name_of(x.scalar_type()));
  check(rows.view.cols == packed.k, op, "x must be of shape [..., ", packed.k, "], got ",
        text(sizes_of(x)));
  const auto* added =
      data_or_null<const void>(op, "bias", bias, values.scalar_type(), {packed.n}, values);
  Sizes sizes = sizes_of(x);
  sizes.back() = packed.n;
  Tensor y = torch::stable::new_empty(x, sizes);
  const std::int64_t m = rows.view.rows;
  cuda::Device device;
  check(op, cuda::current_device(&device));
  cuda::Linear24Choice choice;
  check(op,
        cuda::linear_24_choose(device, m, packed.n, packed.k, packed.dtype, packed.order, &choice));
  const std::size_t bytes = cuda::linear_24_workspace(choice, m, packed.n, packed.k);
  const Tensor workspace =
      torch::stable::new_empty(x, Sizes{static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
  check(op,
        cuda::linear_24(aligned(rows), packed.values, packed.meta, packed.order, added,
                        {y.data_ptr(), m, packed.n, packed.n, packed.dtype}, choice,
                        workspace.data_ptr(), current_cuda_stream(op, values.get_device_index())));
  return y;
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CUDA, m) {
  m.impl("pack_24", TORCH_BOX(&wanda_ext::bindings::pack_24));
  m.impl("unpack_24", TORCH_BOX(&wanda_ext::bindings::unpack_24));
  m.impl("order_meta_24", TORCH_BOX(&wanda_ext::bindings::order_meta_24));
  m.impl("linear_24", TORCH_BOX(&wanda_ext::bindings::linear_24));
}
