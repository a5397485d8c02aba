// input_sumsq_, prune_rows_ and prune_nm_ on CUDA devices, on torch's current stream; workspace
// from torch's caching allocator.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "stream.h"
#include "wanda_ext/ops.h"

namespace wanda_ext::bindings {
namespace {

using torch::stable::accelerator::DeviceGuard;

void input_sumsq_(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& keep) {
  const char* op = "input_sumsq_";
  const DeviceGuard guard(x.get_device_index());
  const Rows rows = rows_of(op, x);
  check_tensor(op, "acc", acc, ScalarType::Double, {rows.view.cols}, x);
  std::optional<Tensor> mask;
  if (keep.has_value()) mask = torch::stable::contiguous(*keep);
  Sizes leading = sizes_of(x);
  leading.pop_back();
  const bool* kept = data_or_null<const bool>(op, "keep", mask, ScalarType::Bool, leading, x);
  const auto bytes = cuda::input_sumsq_workspace(rows.view.rows, rows.view.cols);
  const Tensor workspace =
      torch::stable::new_empty(x, Sizes{static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
  check(op, cuda::input_sumsq(static_cast<double*>(acc.data_ptr()), rows.view, kept,
                              workspace.data_ptr(), current_cuda_stream(op, x.get_device_index())));
}

void prune_rows_(const Tensor& weight, const std::optional<Tensor>& input_norm,
                 std::int64_t n_prune, const std::optional<Tensor>& bad) {
  const char* op = "prune_rows_";
  const DeviceGuard guard(weight.get_device_index());
  const MatrixView view = weight_view(op, weight);
  const auto* norm = data_or_null<const float>(op, "input_norm", input_norm, ScalarType::Float,
                                               {view.cols}, weight);
  auto* first_bad = data_or_null<std::int32_t>(op, "bad", bad, ScalarType::Int, {1}, weight);
  check(op, cuda::prune_rows(view, norm, n_prune, first_bad,
                             current_cuda_stream(op, weight.get_device_index())));
}

void prune_nm_(const Tensor& weight, const std::optional<Tensor>& input_norm, std::int64_t keep,
               std::int64_t group, const std::optional<Tensor>& bad) {
  const char* op = "prune_nm_";
  const DeviceGuard guard(weight.get_device_index());
  const MatrixView view = weight_view(op, weight);
  const auto* norm = data_or_null<const float>(op, "input_norm", input_norm, ScalarType::Float,
                                               {view.cols}, weight);
  auto* first_bad = data_or_null<std::int32_t>(op, "bad", bad, ScalarType::Int, {1}, weight);
  check(0 < keep && keep <= group && group <= kMaxGroup, op,
        "expected 0 < keep <= group <= ", kMaxGroup, ", got keep ", keep, ", group ", group);
  check(op, cuda::prune_nm(view, norm, static_cast<int>(keep), static_cast<int>(group), first_bad,
                           current_cuda_stream(op, weight.get_device_index())));
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CUDA, m) {
  m.impl("input_sumsq_", TORCH_BOX(&wanda_ext::bindings::input_sumsq_));
  m.impl("prune_rows_", TORCH_BOX(&wanda_ext::bindings::prune_rows_));
  m.impl("prune_nm_", TORCH_BOX(&wanda_ext::bindings::prune_nm_));
}
