// input_sumsq_, prune_rows_ and prune_nm_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "threads.h"
#include "wanda_ext/ops.h"

namespace wanda_ext::bindings {
namespace {

void input_sumsq_(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& keep) {
  const char* op = "input_sumsq_";
  const Rows rows = rows_of(op, x);
  check_tensor(op, "acc", acc, ScalarType::Double, {rows.view.cols}, x);
  std::optional<Tensor> mask;
  if (keep.has_value()) mask = torch::stable::contiguous(*keep);
  Sizes leading = sizes_of(x);
  leading.pop_back();
  const bool* kept = data_or_null<const bool>(op, "keep", mask, ScalarType::Bool, leading, x);
  check(op, input_sumsq(static_cast<double*>(acc.data_ptr()), rows.view, kept, torch_threads()));
}

void prune_rows_(const Tensor& weight, const std::optional<Tensor>& input_norm,
                 std::int64_t n_prune, const std::optional<Tensor>& bad) {
  const char* op = "prune_rows_";
  const MatrixView view = weight_view(op, weight);
  const auto* norm = data_or_null<const float>(op, "input_norm", input_norm, ScalarType::Float,
                                               {view.cols}, weight);
  auto* first_bad = data_or_null<std::int32_t>(op, "bad", bad, ScalarType::Int, {1}, weight);
  const ParallelFor threads = torch_threads();
  const auto bytes = static_cast<std::int64_t>(prune_rows_workspace(view.cols, threads.threads));
  const Tensor workspace = torch::stable::new_empty(weight, Sizes{bytes}, ScalarType::Byte);
  check(op, prune_rows(view, norm, n_prune, first_bad, workspace.data_ptr(), threads));
}

void prune_nm_(const Tensor& weight, const std::optional<Tensor>& input_norm, std::int64_t keep,
               std::int64_t group, const std::optional<Tensor>& bad) {
  const char* op = "prune_nm_";
  const MatrixView view = weight_view(op, weight);
  const auto* norm = data_or_null<const float>(op, "input_norm", input_norm, ScalarType::Float,
                                               {view.cols}, weight);
  auto* first_bad = data_or_null<std::int32_t>(op, "bad", bad, ScalarType::Int, {1}, weight);
  check(0 < keep && keep <= group && group <= kMaxGroup, op,
        "expected 0 < keep <= group <= ", kMaxGroup, ", got keep ", keep, ", group ", group);
  check(op, prune_nm(view, norm, static_cast<int>(keep), static_cast<int>(group), first_bad,
                     torch_threads()));
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CPU, m) {
  m.impl("input_sumsq_", TORCH_BOX(&wanda_ext::bindings::input_sumsq_));
  m.impl("prune_rows_", TORCH_BOX(&wanda_ext::bindings::prune_rows_));
  m.impl("prune_nm_", TORCH_BOX(&wanda_ext::bindings::prune_nm_));
}
