// pack_bitmap, unpack_bitmap and linear_bitmap on CUDA devices, on torch's current stream;
// workspace from torch's caching allocator.
//
// linear_bitmap: up to kMaxBitmapTokens tokens by the kernel that reads the packed weight; more by
// torch's own dense product with some rows of the weight at a time, the surplus among them,
// unpacked into a workspace of at most kDenseBytes (one tile of rows, where even that is larger).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense_rows.h"
#include "stream.h"

namespace wanda_ext::bindings {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr std::int64_t kDenseBytes = std::int64_t{64} << 20;

std::tuple<Tensor, Tensor> pack_bitmap(const Tensor& weight, const std::optional<Tensor>& bad) {
  const char* op = "pack_bitmap";
  const DeviceGuard guard(weight.get_device_index());
  const PackBitmapArguments args(op, weight, bad);
  check(op, cuda::pack_bitmap(args.weight, args.values.data_ptr(), args.mask_words(), args.bad,
                              current_cuda_stream(op, weight.get_device_index())));
  return {args.values, args.mask};
}

Tensor unpack_bitmap(const Tensor& values, const Tensor& mask, std::int64_t n, std::int64_t k,
                     const std::optional<Tensor>& surplus_rows,
                     const std::optional<Tensor>& surplus_columns,
                     const std::optional<Tensor>& surplus_values) {
  const char* op = "unpack_bitmap";
  const DeviceGuard guard(values.get_device_index());
  const UnpackBitmapArguments args(op, values, mask, n, k, surplus_rows, surplus_columns,
                                   surplus_values);
  check(op, cuda::unpack_bitmap(args.packed.values, args.packed.mask, args.surplus, args.view,
                                current_cuda_stream(op, values.get_device_index())));
  return args.weight;
}

Tensor linear_bitmap(const Tensor& x, const Tensor& values, const Tensor& mask, std::int64_t n,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& surplus_rows,
                     const std::optional<Tensor>& surplus_columns,
                     const std::optional<Tensor>& surplus_values) {
  const char* op = "linear_bitmap";
  const DeviceGuard guard(values.get_device_index());
  LinearBitmapArguments args(op, x, values, mask, n, bias, surplus_rows, surplus_columns,
                             surplus_values);
  check(args.packed.dtype != DType::kFloat32, op,
        "on CUDA x must be bfloat16 or float16, got float32; convert it, or use the CPU");
  const cudaStream_t stream = current_cuda_stream(op, values.get_device_index());
  const std::int64_t m = args.x.view.rows, k = args.packed.k;
  if (m > cuda::kMaxBitmapTokens && n > 0) {
    linear_by_rows(args.x, args.y, bias, n, kDenseBytes,
                   [&](std::int64_t first, const MatrixView& weight) {
                     const Bitmap rows = args.packed.from_row(first);
                     check(op, cuda::unpack_bitmap(rows.values, rows.mask,
                                                   from_row(args.surplus, first), weight, stream));
                   });
    return args.y;
  }
  const Tensor workspace = new_workspace(x, cuda::linear_bitmap_workspace(m, n, k));
  check(op,
        cuda::linear_bitmap(on_16_bytes(args.x), args.packed.values, args.packed.mask, args.surplus,
                            args.bias, args.y_view, workspace.data_ptr(), stream));
  return args.y;
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CUDA, m) {
  m.impl("pack_bitmap", TORCH_BOX(&wanda_ext::bindings::pack_bitmap));
  m.impl("unpack_bitmap", TORCH_BOX(&wanda_ext::bindings::unpack_bitmap));
  m.impl("linear_bitmap", TORCH_BOX(&wanda_ext::bindings::linear_bitmap));
}
