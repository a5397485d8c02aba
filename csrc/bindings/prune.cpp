// input_sumsq_, prune_rows_ and prune_nm_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "threads.h"

namespace wanda_ext::bindings {
namespace {

void input_sumsq_(const Tensor& acc, const Tensor& x, const std::optional<Tensor>& keep) {
  const char* op = "input_sumsq_";
  const SumsqArguments args(op, acc, x, keep);
  check(op, input_sumsq(args.acc, args.x.view, args.keep, torch_threads()));
}

void prune_rows_(const Tensor& weight, const std::optional<Tensor>& input_norm,
                 std::int64_t n_prune, const std::optional<Tensor>& bad) {
  const char* op = "prune_rows_";
  const PruneArguments args(op, weight, input_norm, bad);
  const ParallelFor threads = torch_threads();
  const Tensor workspace =
      new_workspace(weight, prune_rows_workspace(args.weight.cols, threads.threads));
  check(op, prune_rows(args.weight, args.norm, n_prune, args.bad, workspace.data_ptr(), threads));
}

void prune_nm_(const Tensor& weight, const std::optional<Tensor>& input_norm, std::int64_t keep,
               std::int64_t group, const std::optional<Tensor>& bad) {
  const char* op = "prune_nm_";
  const PruneArguments args(op, weight, input_norm, bad);
  check_keep_of_group(op, keep, group);
  check(op, prune_nm(args.weight, args.norm, static_cast<int>(keep), static_cast<int>(group),
                     args.bad, torch_threads()));
}

}  // namespace
}  // namespace wanda_ext::bindings

STABLE_TORCH_LIBRARY_IMPL(wanda_ext, CPU, m) {
  m.impl("input_sumsq_", TORCH_BOX(&wanda_ext::bindings::input_sumsq_));
  m.impl("prune_rows_", TORCH_BOX(&wanda_ext::bindings::prune_rows_));
  m.impl("prune_nm_", TORCH_BOX(&wanda_ext::bindings::prune_nm_));
}
