// linear_24 against a double sum, with every set of kernels that this processor has.
#include "check.h"
#include "products.h"
#include "wanda_ext/ops.h"
#include "workspace.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;
using testing::Workspace;

constexpr MetaOrder kAllOrders[] = {MetaOrder::kCanonical, MetaOrder::kSm80, MetaOrder::kSm90};

struct Problem {
  Matrix x;
  Matrix values;
  std::vector<std::int16_t> meta;  // canonical
  Matrix bias;

  Problem(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k)
      : x(dtype, m, k, k + 5),
        values(dtype, n, k / 2),
        meta(static_cast<std::size_t>(n * k / kColumnsPerMeta)),
        bias(dtype, 1, n) {
    Random random(static_cast<std::uint64_t>((m * 1000 + n) * 10000 + k));
    x.fill(random);
    values.fill(random);
    bias.fill(random);
    for (std::int16_t& word : meta) {
      unsigned bits = 0;
      for (int g = 0; g < 4; ++g) {
        unsigned nonzeros = 0;
        while (nonzeros == 0 || (nonzeros & (nonzeros - 1)) == 0) {
          nonzeros = static_cast<unsigned>(random.below(16));
        }
        bits |= nibble_24(nonzeros) << (4 * g);
      }
      word = static_cast<std::int16_t>(bits);
    }
  }

  std::int64_t m() const { return x.rows(); }
  std::int64_t n() const { return values.rows(); }
  std::int64_t k() const { return x.cols(); }

  std::int64_t column(std::int64_t row, std::int64_t j) const {
    const unsigned word = static_cast<std::uint16_t>(
        meta[static_cast<std::size_t>(row * (k() / kColumnsPerMeta) + j / 8)]);
    return j / 2 * 4 + (word >> (j % 8 * 2) & 3);
  }
};

// Whether y is the product, within the rounding of fp32 sums and the one to its dtype.
bool is_product(const Problem& problem, bool with_bias, const Matrix& y) {
  for (std::int64_t t = 0; t < problem.m(); ++t) {
    for (std::int64_t r = 0; r < problem.n(); ++r) {
      testing::ExactSum sum;
      for (std::int64_t j = 0; j < problem.k() / 2; ++j) {
        sum.add(problem.values.get(r, j), problem.x.get(t, problem.column(r, j)));
      }
      if (with_bias) sum.add(problem.bias.get(0, r), 1);
      if (!sum.is_near(y.get(t, r), y.dtype())) return false;
    }
  }
  return true;
}

Matrix linear(Problem& problem, MetaOrder order, bool with_bias, int threads) {
  const std::int64_t n = problem.n(), k = problem.k();
  std::vector<std::int16_t> meta(static_cast<std::size_t>(
      padded_rows_24(order, n) * padded_cols_24(order, k) / kColumnsPerMeta));
  CHECK_OK(order_meta_24(problem.meta.data(), MetaOrder::kCanonical, meta.data(), order, n, k,
                         serial()));
  Matrix y(problem.x.dtype(), problem.m(), n, n + 3);
  Workspace workspace(linear_24_workspace(problem.m(), n, k, threads));
  CHECK_OK(linear_24(problem.x.view(), problem.values.view().data, meta.data(), order,
                     with_bias ? problem.bias.view().data : nullptr, y.view(), workspace.data(),
                     std_threads(threads)));
  return y;
}

void test_shape(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k) {
  Problem problem(dtype, m, n, k);
  const Matrix y = linear(problem, MetaOrder::kCanonical, false, 1);
  CHECK(is_product(problem, false, y));
  for (MetaOrder order : kAllOrders) CHECK(linear(problem, order, false, 1) == y);
  const Matrix with_bias = linear(problem, MetaOrder::kCanonical, true, 1);
  CHECK(is_product(problem, true, with_bias));
  for (int threads : {2, 5}) {
    CHECK(linear(problem, MetaOrder::kCanonical, true, threads) == with_bias);
  }
}

// In fp32 a token gives the same bits whatever other tokens come with it.
void test_tokens_alone() {
  Problem many(DType::kFloat32, 21, 37, 528);
  const Matrix together = linear(many, MetaOrder::kCanonical, true, 2);
  for (std::int64_t t = 0; t < many.m(); ++t) {
    Problem one = many;
    one.x = Matrix(DType::kFloat32, 1, 528);
    for (std::int64_t c = 0; c < 528; ++c) one.x.set(0, c, many.x.get(t, c));
    const Matrix alone = linear(one, MetaOrder::kCanonical, true, 1);
    for (std::int64_t r = 0; r < many.n(); ++r) CHECK(alone.get(0, r) == together.get(t, r));
  }
}

// Infinity reaches the rows that keep its column, and no other token.
void test_infinite_inputs(DType dtype, std::int64_t m) {
  Problem problem(dtype, m, 33, 64);
  problem.x.set(m - 1, 21, INFINITY);
  const Matrix y = linear(problem, MetaOrder::kCanonical, false, 1);
  for (std::int64_t r = 0; r < problem.n(); ++r) {
    bool kept = false;
    for (std::int64_t j = 0; j < problem.k() / 2; ++j) kept |= problem.column(r, j) == 21;
    CHECK(!kept || std::isinf(y.get(m - 1, r)));
    if (m > 1) CHECK(std::isfinite(y.get(0, r)));
  }
}

// Metadata that means nothing leads nowhere outside, and leaves the other rows alone.
void test_damaged_meta() {
  constexpr std::int64_t kDamagedRow = 11;
  for (std::int64_t m : {1, 6}) {
    Problem problem(DType::kBFloat16, m, 16, 208);
    const Matrix before = linear(problem, MetaOrder::kCanonical, true, 1);
    for (int damage : {0, -1, 0x1111, 0x0f0f}) {
      for (std::int64_t w = 0; w < 13; ++w) {
        problem.meta[static_cast<std::size_t>(kDamagedRow * 13 + w)] =
            static_cast<std::int16_t>(damage);
      }
      const Matrix y = linear(problem, MetaOrder::kCanonical, true, 1);
      for (std::int64_t t = 0; t < m; ++t) {
        for (std::int64_t r = 0; r < 16; ++r) {
          CHECK(r == kDamagedRow ? std::isfinite(y.get(t, r)) : y.get(t, r) == before.get(t, r));
        }
      }
    }
  }
}

void test_empty() {
  Problem problem(DType::kBFloat16, 2, 3, 16);
  problem.x = Matrix(DType::kBFloat16, 0, 16);
  CHECK(linear(problem, MetaOrder::kCanonical, true, 2).rows() == 0);
  for (std::int64_t m : {2, 6}) {
    Problem no_columns(DType::kFloat16, m, 3, 0);
    const Matrix y = linear(no_columns, MetaOrder::kSm90, true, 2);
    for (std::int64_t r = 0; r < 3; ++r) CHECK(y.get(m - 1, r) == no_columns.bias.get(0, r));
  }
  Problem no_rows(DType::kFloat32, 2, 0, 32);
  CHECK(linear(no_rows, MetaOrder::kSm80, false, 2).cols() == 0);
}

void test_bad_arguments() {
  Problem problem(DType::kFloat32, 2, 3, 32);
  Matrix y(DType::kFloat32, 2, 3);
  Workspace workspace(linear_24_workspace(2, 3, 32, 1));
  const auto call = [&](MatrixView x, MatrixView out, int order, void* space) {
    return linear_24(x, problem.values.view().data, problem.meta.data(),
                     static_cast<MetaOrder>(order), nullptr, out, space, serial());
  };
  MatrixView x = problem.x.view();
  CHECK_OK(call(x, y.view(), 0, workspace.data()));
  CHECK_INVALID(call(x, y.view(), 81, workspace.data()), "got 81");
  CHECK_INVALID(call(x, y.view(), 0, workspace.data() + 4), "aligned to 64");
  x.cols = 24;
  CHECK_INVALID(call(x, y.view(), 0, workspace.data()), "multiple of 16, got 24");
  x = problem.x.view();
  x.rows = 1;
  CHECK_INVALID(call(x, y.view(), 0, workspace.data()), "1 of float32, got 2 of float32");
  Matrix half(DType::kFloat16, 2, 3);
  CHECK_INVALID(call(problem.x.view(), half.view(), 0, workspace.data()), "got 2 of float16");
  CHECK_INVALID(linear_24(problem.x.view(), nullptr, problem.meta.data(), MetaOrder::kCanonical,
                          nullptr, y.view(), workspace.data(), serial()),
                "values is a null pointer");
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  testing::with_all_kernels([] {
    for (DType dtype : testing::kAllDTypes) {
      for (std::int64_t m : {1, 2, 3, 4, 5, 16, 17, 40}) {
        test_shape(dtype, m, 7, 16);
        test_shape(dtype, m, 70, 272);
      }
      test_shape(dtype, 2, 33, 1040);
      test_shape(dtype, 131, 35, 528);
      for (std::int64_t m : {1, 20}) test_infinite_inputs(dtype, m);
    }
    test_tokens_alone();
    test_damaged_meta();
    test_empty();
  });
  test_bad_arguments();
  return testing::finish();
}
