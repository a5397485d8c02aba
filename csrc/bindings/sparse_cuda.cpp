// pack_24, unpack_24, order_meta_24 and linear_24 on CUDA devices, on torch's current stream;
// workspace from torch's caching allocator.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "stream.h"

namespace wanda_ext::bindings {
namespace {

using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> pack_24(const Tensor& weight, const std::optional<Tensor>& bad) {
  const char* op = "pack_24";
  const DeviceGuard guard(weight.get_device_index());
  const PackArguments args(op, weight, bad);
  check(op, cuda::pack_24(args.weight, args.values.data_ptr(), args.meta_words(), args.bad,
                          current_cuda_stream(op, weight.get_device_index())));
  return {args.values, args.meta};
}

Tensor unpack_24(const Tensor& values, const Tensor& meta, std::int64_t order) {
  const char* op = "unpack_24";
  const DeviceGuard guard(values.get_device_index());
  const UnpackArguments args(op, values, meta, order);
  check(op, cuda::unpack_24(args.packed.values, args.packed.meta, args.packed.order, args.view,
                            current_cuda_stream(op, values.get_device_index())));
  return args.weight;
}

Tensor order_meta_24(const Tensor& meta, std::int64_t n, std::int64_t k, std::int64_t src,
                     std::int64_t dst) {
  const char* op = "order_meta_24";
  const DeviceGuard guard(meta.get_device_index());
  const OrderArguments args(op, meta, n, k, src, dst);
  check(op, cuda::order_meta_24(args.src, args.src_order, args.dst, args.dst_order, n, k,
                                current_cuda_stream(op, meta.get_device_index())));
  return args.moved;
}

Tensor linear_24(const Tensor& x, const Tensor& values, const Tensor& meta, std::int64_t order,
                 const std::optional<Tensor>& bias) {
  const char* op = "linear_24";
  const DeviceGuard guard(values.get_device_index());
  LinearArguments args(op, x, values, meta, order, bias);
  const Packed& packed = args.packed;
  const std::int64_t m = args.x.view.rows;
  cuda::Device device;
  check(op, cuda::current_device(&device));
  cuda::Linear24Choice choice;
  check(op,
        cuda::linear_24_choose(device, m, packed.n, packed.k, packed.dtype, packed.order, &choice));
  const Tensor workspace =
      new_workspace(x, cuda::linear_24_workspace(choice, m, packed.n, packed.k));
  check(op, cuda::linear_24(on_16_bytes(args.x), packed.values, packed.meta, packed.order,
                            args.bias, args.y_view, choice, workspace.data_ptr(),
                            current_cuda_stream(op, values.get_device_index())));
  return args.y;
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CUDA, m) {
  m.impl("pack_24", TORCH_BOX(&wanda_ext::bindings::pack_24));
  m.impl("unpack_24", TORCH_BOX(&wanda_ext::bindings::unpack_24));
  m.impl("order_meta_24", TORCH_BOX(&wanda_ext::bindings::order_meta_24));
  m.impl("linear_24", TORCH_BOX(&wanda_ext::bindings::linear_24));
}
