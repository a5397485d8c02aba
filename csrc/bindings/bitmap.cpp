// pack_bitmap, unpack_bitmap and linear_bitmap on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense_rows.h"
#include "threads.h"

namespace wanda_ext::bindings {
namespace {

std::tuple<Tensor, Tensor> pack_bitmap(const Tensor& weight, const std::optional<Tensor>& bad) {
  const char* op = "pack_bitmap";
  const PackBitmapArguments args(op, weight, bad);
  check(op, wanda_ext::pack_bitmap(args.weight, args.values.data_ptr(), args.mask_words(), args.bad,
                                   torch_threads()));
  return {args.values, args.mask};
}

Tensor unpack_bitmap(const Tensor& values, const Tensor& mask, std::int64_t n, std::int64_t k,
                     const std::optional<Tensor>& surplus_rows,
                     const std::optional<Tensor>& surplus_columns,
                     const std::optional<Tensor>& surplus_values) {
  const char* op = "unpack_bitmap";
  const UnpackBitmapArguments args(op, values, mask, n, k, surplus_rows, surplus_columns,
                                   surplus_values);
  check(op, wanda_ext::unpack_bitmap(args.packed.values, args.packed.mask, args.surplus, args.view,
                                     torch_threads()));
  return args.weight;
}

Tensor linear_bitmap(const Tensor& x, const Tensor& values, const Tensor& mask, std::int64_t n,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& surplus_rows,
                     const std::optional<Tensor>& surplus_columns,
                     const std::optional<Tensor>& surplus_values) {
  const char* op = "linear_bitmap";
  const LinearBitmapArguments args(op, x, values, mask, n, bias, surplus_rows, surplus_columns,
                                   surplus_values);
  const ConstMatrixView& view = args.x.view;
  const ParallelFor threads = torch_threads();
  if (view.rows > kMostOwnTokens && n > 0) {
    linear_by_rows(
        args.x, args.y, bias, n, kDenseBytes, [&](std::int64_t first, const MatrixView& weight) {
          const Bitmap rows = args.packed.from_row(first);
          check(op, wanda_ext::unpack_bitmap(rows.values, rows.mask, from_row(args.surplus, first),
                                             weight, threads));
        });
    return args.y;
  }
  const Tensor workspace =
      new_workspace(x, linear_bitmap_workspace(view.rows, n, view.cols, threads.threads));
  check(op, wanda_ext::linear_bitmap(view, args.packed.values, args.packed.mask, args.surplus,
                                     args.bias, args.y_view, workspace.data_ptr(), threads));
  return args.y;
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CPU, m) {
  m.impl("pack_bitmap", TORCH_BOX(&wanda_ext::bindings::pack_bitmap));
  m.impl("unpack_bitmap", TORCH_BOX(&wanda_ext::bindings::unpack_bitmap));
  m.impl("linear_bitmap", TORCH_BOX(&wanda_ext::bindings::linear_bitmap));
}
