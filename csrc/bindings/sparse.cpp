// pack_24, unpack_24, order_meta_24 and linear_24 on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dense_rows.h"
#include "threads.h"

namespace wanda_ext::bindings {
namespace {

std::tuple<Tensor, Tensor> pack_24(const Tensor& weight, const std::optional<Tensor>& bad) {
  const char* op = "pack_24";
  const PackArguments args(op, weight, bad);
  check(op, wanda_ext::pack_24(args.weight, args.values.data_ptr(), args.meta_words(), args.bad,
                               torch_threads()));
  return {args.values, args.meta};
}

Tensor unpack_24(const Tensor& values, const Tensor& meta, std::int64_t order) {
  const char* op = "unpack_24";
  const UnpackArguments args(op, values, meta, order);
  check(op, wanda_ext::unpack_24(args.packed.values, args.packed.meta, args.packed.order, args.view,
                                 torch_threads()));
  return args.weight;
}

Tensor order_meta_24(const Tensor& meta, std::int64_t n, std::int64_t k, std::int64_t src,
                     std::int64_t dst) {
  const char* op = "order_meta_24";
  const OrderArguments args(op, meta, n, k, src, dst);
  check(op, wanda_ext::order_meta_24(args.src, args.src_order, args.dst, args.dst_order, n, k,
                                     torch_threads()));
  return args.moved;
}

// meta in canonical order, which alone can be cut at a row.
Tensor canonical(const Packed& packed, const Tensor& meta) {
  if (packed.order == MetaOrder::kCanonical) return meta;
  return order_meta_24(meta, packed.n, packed.k, static_cast<int>(packed.order), 0);
}

Tensor linear_24(const Tensor& x, const Tensor& values, const Tensor& meta, std::int64_t order,
                 const std::optional<Tensor>& bias) {
  const char* op = "linear_24";
  const LinearArguments args(op, x, values, meta, order, bias);
  const Packed& packed = args.packed;
  const ParallelFor threads = torch_threads();
  if (args.x.view.rows > kMostOwnTokens && packed.n > 0) {
    const Tensor by_rows = canonical(packed, meta);
    linear_by_rows(
        args.x, args.y, bias, packed.n, kDenseBytes,
        [&](std::int64_t first, const MatrixView& weight) {
          const auto* words = static_cast<const std::int16_t*>(by_rows.data_ptr());
          const auto bytes = static_cast<std::int64_t>(size_of(packed.dtype));
          const std::int64_t value = first * packed.k / 2;
          check(op, wanda_ext::unpack_24(static_cast<const char*>(packed.values) + value * bytes,
                                         words + first * packed.k / kColumnsPerMeta,
                                         MetaOrder::kCanonical, weight, threads));
        });
    return args.y;
  }
  const Tensor workspace =
      new_workspace(x, linear_24_workspace(args.x.view.rows, packed.n, packed.k, threads.threads));
  check(op, wanda_ext::linear_24(args.x.view, packed.values, packed.meta, packed.order, args.bias,
                                 args.y_view, workspace.data_ptr(), threads));
  return args.y;
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CPU, m) {
  m.impl("pack_24", TORCH_BOX(&wanda_ext::bindings::pack_24));
  m.impl("unpack_24", TORCH_BOX(&wanda_ext::bindings::unpack_24));
  m.impl("order_meta_24", TORCH_BOX(&wanda_ext::bindings::order_meta_24));
  m.impl("linear_24", TORCH_BOX(&wanda_ext::bindings::linear_24));
}
