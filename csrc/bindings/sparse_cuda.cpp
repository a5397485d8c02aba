// pack_24, unpack_24 and order_meta_24 on CUDA devices, on torch's current stream.
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

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CUDA, m) {
  m.impl("pack_24", TORCH_BOX(&wanda_ext::bindings::pack_24));
  m.impl("unpack_24", TORCH_BOX(&wanda_ext::bindings::unpack_24));
  m.impl("order_meta_24", TORCH_BOX(&wanda_ext::bindings::order_meta_24));
}
