// The CUDA kernels of input_sumsq, run on the host, against the CPU op: the same bits.
#include "core/cuda/input_sumsq.cu"

#include <cmath>
#include <memory>
#include <vector>

#include "tests/check.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;

// `skip` moves x off its alignment, by whole elements.
void test_same_bits(DType dtype, std::int64_t m, std::int64_t k, std::int64_t ld, bool masked,
                    std::int64_t skip = 0) {
  Random random(static_cast<std::uint64_t>(m * 131 + k * 7 + masked));
  Matrix buffer(dtype, m, ld);
  buffer.fill(random, 3);
  MatrixView x = buffer.view();
  x.data = static_cast<char*>(x.data) + static_cast<std::size_t>(skip) * size_of(dtype);
  x.cols = k;
  const auto keep = std::make_unique<bool[]>(static_cast<std::size_t>(m) + 1);
  for (std::int64_t i = 0; i < m; ++i) {
    keep[static_cast<std::size_t>(i)] = random.below(3) != 0;
    if (masked && !keep[static_cast<std::size_t>(i)]) buffer.set(i, skip + random.below(k), NAN);
  }
  const bool* mask = masked ? keep.get() : nullptr;

  std::vector<double> expected(static_cast<std::size_t>(k), 0.25);
  CHECK_OK(input_sumsq(expected.data(), x, mask, serial()));

  std::vector<double> acc(static_cast<std::size_t>(k) + 1, 0.25);
  const std::size_t needed = cuda::input_sumsq_workspace(m, k) / sizeof(double);
  std::vector<double> workspace(needed, NAN);
  workspace.push_back(-7);
  CHECK_OK(cuda::input_sumsq(acc.data(), x, mask, workspace.data(), nullptr));
  CHECK(workspace[needed] == -7);
  CHECK(acc.back() == 0.25);
  acc.pop_back();
  CHECK(acc == expected);
}

void test_non_finite() {
  Matrix x(DType::kFloat16, 40, 8);
  Random random(1);
  x.fill(random);
  x.set(35, 0, NAN);
  x.set(2, 1, -INFINITY);
  std::vector<double> acc(8, 0), workspace(8, NAN);
  CHECK_OK(cuda::input_sumsq(acc.data(), x.view(), nullptr, workspace.data(), nullptr));
  CHECK(std::isnan(acc[0]));
  CHECK(std::isinf(acc[1]) && acc[1] > 0);
  CHECK(std::isfinite(acc[2]));
}

void test_bad_arguments() {
  Matrix x(DType::kFloat32, 4, 8);
  std::vector<double> acc(8, 1), workspace(8);
  MatrixView view = x.view();
  view.ld = 7;
  CHECK_INVALID(cuda::input_sumsq(acc.data(), view, nullptr, workspace.data(), nullptr),
                "ld >= cols");
  CHECK_INVALID(cuda::input_sumsq(nullptr, x.view(), nullptr, workspace.data(), nullptr),
                "acc is a null pointer");
  CHECK_INVALID(cuda::input_sumsq(acc.data(), x.view(), nullptr, nullptr, nullptr),
                "workspace is a null pointer");
  view = {acc.data(), std::int64_t{1} << 40, 8, 8, DType::kFloat32};
  CHECK_INVALID(cuda::input_sumsq(acc.data(), view, nullptr, workspace.data(), nullptr),
                "too large for one call");
  for (double value : acc) CHECK(value == 1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (DType dtype : testing::kAllDTypes) {
    for (bool masked : {false, true}) {
      for (std::int64_t m : {0, 1, 31, 32, 33, 256, 257, 700}) {
        test_same_bits(dtype, m, 24, 24, masked);
      }
      test_same_bits(dtype, 300, 37, 37, masked);     // rows that are not whole vectors
      test_same_bits(dtype, 300, 296, 304, masked);   // several tiles, strided rows
      test_same_bits(dtype, 300, 40, 48, masked, 1);  // unaligned
      test_same_bits(dtype, 300, 40, 43, masked);     // rows that lose their alignment
    }
  }
  test_non_finite();
  test_bad_arguments();
  return testing::finish();
}
