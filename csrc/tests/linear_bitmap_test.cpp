// linear_bitmap against a double sum, with every set of kernels that this processor has.
#include "bitmap_cases.h"
#include "check.h"
#include "products.h"
#include "wanda_ext/ops.h"
#include "workspace.h"

namespace wanda_ext {
namespace {

using testing::Bitmap;
using testing::Matrix;
using testing::Random;
using testing::Workspace;

struct Problem {
  Matrix x;
  Matrix weight;  // without the surplus
  Bitmap packed;
  Matrix bias;
  std::vector<std::int32_t> rows = {0};
  std::vector<std::uint16_t> columns;
  Matrix surplus_values;

  Problem(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k)
      : x(dtype, m, k, k + 5),
        weight(dtype, n, k),
        packed(dtype, n, k),
        bias(dtype, 1, n),
        surplus_values(dtype, 1, n * ((k + 19) / 20)) {
    Random random(static_cast<std::uint64_t>((m * 1000 + n) * 10000 + k));
    x.fill(random);
    bias.fill(random);
    surplus_values.fill(random);
    testing::fill_records(weight, random);
    packed = testing::pack_by_hand(weight);
    for (std::int64_t r = 0; r < n; ++r) {
      for (std::int64_t c = r % 7; c < k && r % 3 != 0; c += 20) {
        columns.push_back(static_cast<std::uint16_t>(c));
      }
      rows.push_back(static_cast<std::int32_t>(columns.size()));
    }
  }

  std::int64_t m() const { return x.rows(); }
  std::int64_t n() const { return weight.rows(); }
  std::int64_t k() const { return x.cols(); }

  Surplus surplus() {
    return {rows.data(), columns.data(), surplus_values.view().data,
            static_cast<std::int64_t>(columns.size())};
  }
};

// Whether y is the product, within the rounding of fp32 sums and the one to its dtype.
bool is_product(const Problem& problem, bool with_surplus, bool with_bias, const Matrix& y) {
  for (std::int64_t t = 0; t < problem.m(); ++t) {
    for (std::int64_t r = 0; r < problem.n(); ++r) {
      testing::ExactSum sum;
      for (std::int64_t c = 0; c < problem.k(); ++c) {
        sum.add(problem.weight.get(r, c), problem.x.get(t, c));
      }
      const auto row = static_cast<std::size_t>(r);
      for (std::int32_t i = problem.rows[row]; with_surplus && i < problem.rows[row + 1]; ++i) {
        sum.add(problem.surplus_values.get(0, i),
                problem.x.get(t, problem.columns[static_cast<std::size_t>(i)]));
      }
      if (with_bias) sum.add(problem.bias.get(0, r), 1);
      if (!sum.is_near(y.get(t, r), y.dtype())) return false;
    }
  }
  return true;
}

Matrix linear(Problem& problem, bool with_surplus, bool with_bias, int threads) {
  const std::int64_t m = problem.m(), n = problem.n();
  Matrix y(problem.x.dtype(), m, n, n + 3);
  Workspace workspace(linear_bitmap_workspace(m, n, problem.k(), threads));
  CHECK_OK(linear_bitmap(problem.x.view(), problem.packed.values.view().data,
                         problem.packed.mask.data(), with_surplus ? problem.surplus() : Surplus{},
                         with_bias ? problem.bias.view().data : nullptr, y.view(), workspace.data(),
                         std_threads(threads)));
  return y;
}

void test_shape(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k) {
  Problem problem(dtype, m, n, k);
  CHECK(is_product(problem, false, false, linear(problem, false, false, 1)));
  CHECK(is_product(problem, false, true, linear(problem, false, true, 2)));
  const Matrix y = linear(problem, true, true, 1);
  CHECK(is_product(problem, true, true, y));
  for (int threads : {2, 5}) CHECK(linear(problem, true, true, threads) == y);
}

// In fp32 a token gives the same bits whatever other tokens come with it.
void test_tokens_alone() {
  Problem many(DType::kFloat32, 21, 37, 530);
  const Matrix together = linear(many, true, true, 2);
  Problem some = many;
  some.x = Matrix(DType::kFloat32, 5, 530);
  for (std::int64_t t = 0; t < 5; ++t) {
    for (std::int64_t c = 0; c < 530; ++c) some.x.set(t, c, many.x.get(16 + t, c));
  }
  const Matrix alone = linear(some, true, true, 1);
  for (std::int64_t t = 0; t < 5; ++t) {
    for (std::int64_t r = 0; r < 37; ++r) CHECK(alone.get(t, r) == together.get(16 + t, r));
  }
}

void test_infinite_inputs(std::int64_t m) {
  Problem problem(DType::kFloat32, m, 33, 64);
  problem.x.set(m - 1, 21, INFINITY);
  const Matrix y = linear(problem, false, false, 1);
  for (std::int64_t r = 0; r < problem.n(); ++r) {
    CHECK(problem.weight.get(r, 21) == 0 || std::isinf(y.get(m - 1, r)));
    if (m > 1) CHECK(std::isfinite(y.get(0, r)));
  }
}

// A row whose masks have any number of bits stays inside and leaves the other rows alone.
void test_damaged_masks() {
  constexpr int kDamagedRow = 11;
  for (std::int64_t m : {1, 6}) {
    Problem problem(DType::kBFloat16, m, 16, 200);
    const Matrix before = linear(problem, true, true, 1);
    for (std::int32_t damage : {0, -1, 1, 0x7fffffff}) {
      for (int tile = 0; tile < 2; ++tile) {
        for (int record = 0; record < kBitmapTileRecords; ++record) {
          problem.packed.mask[static_cast<std::size_t>(
              tile * kBitmapTileMasks + bitmap_mask_index(kDamagedRow, record))] = damage;
        }
      }
      const Matrix y = linear(problem, true, true, 1);
      for (std::int64_t t = 0; t < m; ++t) {
        for (std::int64_t r = 0; r < 16; ++r) {
          CHECK(r == kDamagedRow ? std::isfinite(y.get(t, r)) : y.get(t, r) == before.get(t, r));
        }
      }
    }
  }
}

void test_empty() {
  Problem no_tokens(DType::kBFloat16, 0, 3, 16);
  CHECK(linear(no_tokens, true, true, 2).rows() == 0);
  for (std::int64_t m : {2, 6}) {
    Problem no_columns(DType::kFloat16, m, 3, 0);
    const Matrix y = linear(no_columns, true, true, 2);
    for (std::int64_t r = 0; r < 3; ++r) CHECK(y.get(m - 1, r) == no_columns.bias.get(0, r));
  }
  Problem no_rows(DType::kFloat32, 2, 0, 32);
  CHECK(linear(no_rows, true, false, 2).cols() == 0);
}

void test_bad_arguments() {
  Problem problem(DType::kFloat32, 2, 3, 32);
  Matrix y(DType::kFloat32, 2, 3);
  Workspace workspace(linear_bitmap_workspace(2, 3, 32, 1));
  const auto call = [&](MatrixView x, const void* values, const Surplus& surplus, MatrixView out,
                        void* space) {
    return linear_bitmap(x, values, problem.packed.mask.data(), surplus, nullptr, out, space,
                         serial());
  };
  MatrixView x = problem.x.view();
  const void* values = problem.packed.values.view().data;
  CHECK_OK(call(x, values, {}, y.view(), workspace.data()));
  CHECK_INVALID(call(x, values, {}, y.view(), workspace.data() + 4), "aligned to 64");
  CHECK_INVALID(call(x, nullptr, {}, y.view(), workspace.data()), "values is a null pointer");
  Matrix half(DType::kFloat16, 2, 3);
  CHECK_INVALID(call(x, values, {}, half.view(), workspace.data()), "got 2 of float16");
  x.rows = 1;
  CHECK_INVALID(call(x, values, {}, y.view(), workspace.data()), "1 of float32, got 2 of float32");
  Surplus surplus = problem.surplus();
  problem.columns[0] = 32;
  CHECK_INVALID(call(problem.x.view(), values, surplus, y.view(), workspace.data()),
                "must be in [0, 32)");
  surplus.count = -1;
  CHECK_INVALID(call(problem.x.view(), values, surplus, y.view(), workspace.data()),
                "negative count");
}

// Columns fill all 16 bits; wider weights have no surplus.
void test_the_widest_surplus() {
  for (std::int64_t m : {2, 6}) {
    Problem problem(DType::kFloat16, m, 3, kMaxSurplusCols);
    problem.columns.back() = kMaxSurplusCols - 1;
    CHECK(is_product(problem, true, true, linear(problem, true, true, 2)));
  }
  Problem wide(DType::kFloat32, 1, 2, kMaxSurplusCols + 1);
  CHECK(is_product(wide, false, false, linear(wide, false, false, 1)));
  Matrix y(DType::kFloat32, 1, 2);
  Workspace workspace(linear_bitmap_workspace(1, 2, wide.k(), 1));
  CHECK_INVALID(
      linear_bitmap(wide.x.view(), wide.packed.values.view().data, wide.packed.mask.data(),
                    wide.surplus(), nullptr, y.view(), workspace.data(), serial()),
      "at most 65536 columns, got 65537");
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  testing::with_all_kernels([] {
    for (DType dtype : testing::kAllDTypes) {
      for (std::int64_t m : {1, 2, 3, 4, 5, 16, 17, 40}) {
        test_shape(dtype, m, 7, 16);
        test_shape(dtype, m, 70, 275);
      }
      test_shape(dtype, 2, 33, 1040);
      test_shape(dtype, 131, 35, 528);
    }
    test_tokens_alone();
    for (std::int64_t m : {1, 20}) test_infinite_inputs(m);
    test_damaged_masks();
    test_empty();
    test_the_widest_surplus();
  });
  test_bad_arguments();
  return testing::finish();
}
