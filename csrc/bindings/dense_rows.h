// A product of many tokens by torch's own dense one, for every device and format.
#pragma once

#include <algorithm>
#include <array>

#include "arguments.h"

namespace wanda_ext::bindings {

// out = x @ weight.T (+ bias)
inline void dense_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // a handle of out's, to be freed
}

// y [..., n] = x @ W^T (+ bias), some rows of W at a time: unpack(first, view) writes those from
// `first` on into a workspace of no more than `bytes`, or of 16 rows. A multiple of 16 each time.
template <class Unpack>
void linear_by_rows(const Rows& x, const Tensor& y, const std::optional<Tensor>& bias,
                    std::int64_t n, std::int64_t bytes, const Unpack& unpack) {
  constexpr std::int64_t kRows = 16;
  const std::int64_t m = x.view.rows, k = x.view.cols;
  const auto element = static_cast<std::int64_t>(size_of(x.view.dtype));
  const std::int64_t blocks = bytes / std::max<std::int64_t>(k * element, 1) / kRows;
  const std::int64_t step = std::min(n, std::max<std::int64_t>(blocks, 1) * kRows);
  const Tensor tokens = torch::stable::reshape(x.tensor, Sizes{m, k});
  Tensor out = torch::stable::view(y, Sizes{m, n});
  Tensor dense = torch::stable::new_empty(tokens, Sizes{step, k});
  for (std::int64_t first = 0; first < n; first += step) {
    const std::int64_t rows = std::min(step, n - first);
    const Tensor weight = torch::stable::narrow(dense, 0, 0, rows);
    unpack(first, MatrixView{weight.data_ptr(), rows, k, k, x.view.dtype});
    std::optional<Tensor> some;
    if (bias.has_value()) {
      Tensor all = *bias;
      some = torch::stable::narrow(all, 0, first, rows);
    }
    dense_linear(tokens, weight, some, torch::stable::narrow(out, 1, first, rows));
  }
}

}  // namespace wanda_ext::bindings
