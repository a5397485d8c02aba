// pack_stream, unpack_stream and linear_stream on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense_rows.h"
#include "threads.h"

namespace wanda_ext::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> pack_stream(const Tensor& weight, std::int64_t count) {
  const char* op = "pack_stream";
  const PackStreamArguments args(op, weight, count);
  check(op, wanda_ext::pack_stream(args.weight, count, args.values.data_ptr(), args.mask_bytes(),
                                   args.offset_words(), torch_threads()));
  return {args.values, args.mask, args.offsets};
}

Tensor unpack_stream(const Tensor& values, const Tensor& mask, const Tensor& offsets,
                     std::int64_t k) {
  const char* op = "unpack_stream";
  const UnpackStreamArguments args(op, values, mask, offsets, k);
  check(op, wanda_ext::unpack_stream(args.stream, args.view, torch_threads()));
  return args.weight;
}

Tensor linear_stream(const Tensor& x, const Tensor& values, const Tensor& mask,
                     const Tensor& offsets, const std::optional<Tensor>& bias) {
  const char* op = "linear_stream";
  const LinearStreamArguments args(op, x, values, mask, offsets, bias);
  const ConstMatrixView& view = args.x.view;
  const ParallelFor threads = torch_threads();
  const std::int64_t n = args.y_view.cols;
  if (view.rows > kMostOwnTokens && n > 0) {
    linear_by_rows(args.x, args.y, bias, n, kDenseBytes,
                   [&](std::int64_t first, const MatrixView& weight) {
                     Stream rows = args.stream;
                     rows.mask += first * ((view.cols + 7) / 8);
                     rows.offsets += first;
                     check(op, wanda_ext::unpack_stream(rows, weight, threads));
                   });
    return args.y;
  }
  const Tensor workspace =
      new_workspace(x, linear_stream_workspace(view.rows, n, view.cols, threads.threads));
  check(op, wanda_ext::linear_stream(view, args.stream, args.bias, args.y_view,
                                     workspace.data_ptr(), threads));
  return args.y;
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CPU, m) {
  m.impl("pack_stream", TORCH_BOX(&wanda_ext::bindings::pack_stream));
  m.impl("unpack_stream", TORCH_BOX(&wanda_ext::bindings::unpack_stream));
  m.impl("linear_stream", TORCH_BOX(&wanda_ext::bindings::linear_stream));
}
