// input_sumsq_, prune_rows_ and prune_nm_ on CUDA devices, on torch's current stream; workspace
// from torch's caching allocator.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "stream.h"

namespace wanda_ext::bindings {
namespace {

using torch::stable::accelerator::DeviceGuard;

void input_sumsq_(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& keep) {
  const char* op = "input_sumsq_";
  const DeviceGuard guard(x.get_device_index());
  const SumsqArguments args(op, acc, x, keep);
  const ConstMatrixView& view = args.x.view;
  const Tensor workspace = new_workspace(x, cuda::input_sumsq_workspace(view.rows, view.cols));
  check(op, cuda::input_sumsq(args.acc, view, args.keep, workspace.data_ptr(),
                              current_cuda_stream(op, x.get_device_index())));
}

void prune_rows_(const Tensor& weight, const std::optional<Tensor>& input_norm,
                 std::int64_t n_prune, const std::optional<Tensor>& bad) {
  const char* op = "prune_rows_";
  const DeviceGuard guard(weight.get_device_index());
  const PruneArguments args(op, weight, input_norm, bad);
  check(op, cuda::prune_rows(args.weight, args.norm, n_prune, args.bad,
                             current_cuda_stream(op, weight.get_device_index())));
}

void prune_nm_(const Tensor& weight, const std::optional<Tensor>& input_norm, std::int64_t keep,
               std::int64_t group, const std::optional<Tensor>& bad) {
  const char* op = "prune_nm_";
  const DeviceGuard guard(weight.get_device_index());
  const PruneArguments args(op, weight, input_norm, bad);
  check_keep_of_group(op, keep, group);
  check(op, cuda::prune_nm(args.weight, args.norm, static_cast<int>(keep), static_cast<int>(group),
                           args.bad, current_cuda_stream(op, weight.get_device_index())));
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CUDA, m) {
  m.impl("input_sumsq_", TORCH_BOX(&wanda_ext::bindings::input_sumsq_));
  m.impl("prune_rows_", TORCH_BOX(&wanda_ext::bindings::prune_rows_));
  m.impl("prune_nm_", TORCH_BOX(&wanda_ext::bindings::prune_nm_));
}
