// input_sumsq, bit for bit against the tree of ops.h written out for one column at a time.
#include <memory>

#include "check.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;

double sum_column(double total, const Matrix& x, std::int64_t column, const bool* keep) {
  for (std::int64_t group = 0; group < x.rows(); group += kRowsPerChunk * kChunksPerGroup) {
    double group_sum = 0;
    for (std::int64_t chunk = 0; chunk < kChunksPerGroup; ++chunk) {
      float chunk_sum = 0;
      for (std::int64_t i = 0; i < kRowsPerChunk; ++i) {
        const std::int64_t row = group + chunk * kRowsPerChunk + i;
        if (row >= x.rows() || (keep != nullptr && !keep[row])) continue;
        const float square = x.get(row, column) * x.get(row, column);
        chunk_sum = chunk_sum + square;
      }
      group_sum = group_sum + static_cast<double>(chunk_sum);
    }
    total = total + group_sum;
  }
  return total;
}

void test_against_tree(DType dtype, std::int64_t m, std::int64_t k, std::int64_t ld, bool masked) {
  Random random(static_cast<std::uint64_t>(m * 131 + k * 7 + masked));
  Matrix x(dtype, m, k, ld);
  // Chunks of very different size: else the fp64 sums are exact and any tree gives the same bits.
  const std::int64_t spread = dtype == DType::kFloat16 ? 10 : 20;
  float scale = 1;
  for (std::int64_t i = 0; i < m; ++i) {
    if (i % kRowsPerChunk == 0) {
      scale = std::ldexp(1.0f, static_cast<int>(random.below(2 * spread) - spread));
    }
    for (std::int64_t c = 0; c < k; ++c) x.set(i, c, random.uniform() * scale);
  }
  const auto keep = std::make_unique<bool[]>(static_cast<std::size_t>(m) + 1);
  for (std::int64_t i = 0; i < m; ++i) {
    keep[static_cast<std::size_t>(i)] = random.below(3) != 0;
    if (masked && !keep[static_cast<std::size_t>(i)] && k > 0) x.set(i, random.below(k), NAN);
  }
  const bool* mask = masked ? keep.get() : nullptr;
  for (int threads : {1, 3}) {
    std::vector<double> acc(static_cast<std::size_t>(k) + 1, 0.25);
    CHECK_OK(input_sumsq(acc.data(), x.view(), mask, std_threads(threads)));
    int wrong = 0;
    for (std::int64_t c = 0; c < k; ++c) {
      wrong += acc[static_cast<std::size_t>(c)] != sum_column(0.25, x, c, mask);
    }
    CHECK(wrong == 0);
    CHECK(acc[static_cast<std::size_t>(k)] == 0.25);
  }
}

void test_non_finite() {
  Matrix x(DType::kFloat16, 40, 3);
  Random random(1);
  x.fill(random);
  x.set(35, 0, NAN);
  x.set(2, 1, -INFINITY);
  std::vector<double> acc(3, 0);
  CHECK_OK(input_sumsq(acc.data(), x.view(), nullptr, serial()));
  CHECK(std::isnan(acc[0]));
  CHECK(std::isinf(acc[1]) && acc[1] > 0);
  CHECK(acc[2] == sum_column(0, x, 2, nullptr));
}

void test_bad_arguments() {
  Matrix x(DType::kFloat32, 4, 8);
  std::vector<double> acc(8, 1);
  const MatrixView good = x.view();
  MatrixView view = good;
  view.ld = 7;
  CHECK_INVALID(input_sumsq(acc.data(), view, nullptr, serial()), "ld >= cols");
  view = good;
  view.rows = -1;
  CHECK_INVALID(input_sumsq(acc.data(), view, nullptr, serial()), "-1 x 8");
  view = good;
  view.data = nullptr;
  CHECK_INVALID(input_sumsq(acc.data(), view, nullptr, serial()), "x is a null pointer");
  view = good;
  view.dtype = static_cast<DType>(9);
  CHECK_INVALID(input_sumsq(acc.data(), view, nullptr, serial()), "dtype code 9");
  CHECK_INVALID(input_sumsq(nullptr, good, nullptr, serial()), "acc is a null pointer");
  for (double value : acc) CHECK(value == 1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (DType dtype : testing::kAllDTypes) {
    for (bool masked : {false, true}) {
      for (std::int64_t m : {0, 1, 3, 31, 32, 33, 256, 257, 700}) {
        test_against_tree(dtype, m, 37, 37, masked);
      }
      test_against_tree(dtype, 65, 0, 0, masked);
      test_against_tree(dtype, 65, 1, 1, masked);
      test_against_tree(dtype, 65, 129, 200, masked);
      test_against_tree(dtype, 65, 6250, 6250, masked);  // several tiles a thread
    }
  }
  test_non_finite();
  test_bad_arguments();
  return testing::finish();
}
