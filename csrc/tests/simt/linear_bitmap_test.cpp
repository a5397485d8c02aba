// The decode kernels of linear_bitmap, run on the host, against a sum in double of all columns.
// Shared memory starts poisoned, as stale as a device's, and the workspace as NaN.
#include "core/cuda/linear_bitmap.cu"

#include "../bitmap_cases.h"
#include "core/cuda/linear_24.cu"  // current_device

namespace wanda_ext {

const cuda::Linear24Kernels cuda::kMmaSpKernels = {};  // nobody asks for them here

namespace {

using testing::Bitmap;
using testing::Matrix;
using testing::Random;

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16};

// x, whose rows have NaN between them, and W = records + surplus.
struct Problem {
  std::int64_t m, n, k;
  Matrix x, weight, bias;
  Bitmap packed;
  std::vector<std::int32_t> rows = {0};
  std::vector<std::uint16_t> columns;
  Matrix surplus_values;

  Problem(Random& random, DType dtype, std::int64_t m, std::int64_t n, std::int64_t k,
          int nonzeros = -1)
      : m(m),
        n(n),
        k(k),
        x(dtype, m, k, (k + 7) / 8 * 8 + 8 * random.below(3)),
        weight(dtype, n, k),
        bias(dtype, 1, n),
        packed(dtype, n, k),
        surplus_values(dtype, 1, n * 4 + 1) {
    const MatrixView view = x.view();
    if (m * k > 0) std::memset(view.data, 0xff, static_cast<std::size_t>(m * view.ld) * 2);
    x.fill(random);
    bias.fill(random);
    surplus_values.fill(random);
    testing::fill_records(weight, random, nonzeros);
    packed = testing::pack_by_hand(weight);
    for (std::int64_t r = 0; r < n; ++r) {
      for (std::int64_t i = random.below(4), c = random.below(9); i > 0 && c < k; --i) {
        columns.push_back(static_cast<std::uint16_t>(c));
        c += 1 + random.below(k);
      }
      rows.push_back(static_cast<std::int32_t>(columns.size()));
    }
  }

  Surplus surplus() {
    return {rows.data(), columns.data(), surplus_values.view().data,
            static_cast<std::int64_t>(columns.size())};
  }

  Matrix run(bool with_surplus, bool with_bias) {
    Matrix y(x.dtype(), m, n);
    const std::size_t bytes = cuda::linear_bitmap_workspace(m, n, k);
    std::vector<float> workspace(bytes / 4, NAN);
    CHECK_OK(cuda::linear_bitmap(x.view(), packed.values.view().data, packed.mask.data(),
                                 with_surplus ? surplus() : Surplus{},
                                 with_bias ? bias.view().data : nullptr, y.view(), workspace.data(),
                                 nullptr));
    return y;
  }

  // Within what fp32 sums in any order and one rounding may lose.
  bool is_close(bool with_surplus, bool with_bias, const Matrix& y) const {
    const double unit = y.dtype() == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    for (std::int64_t t = 0; t < m; ++t) {
      for (std::int64_t r = 0; r < n; ++r) {
        double sum = with_bias ? bias.get(0, r) : 0, size = std::fabs(sum);
        const auto add = [&](double product) {
          sum += product;
          size += std::fabs(product);
        };
        for (std::int64_t c = 0; c < k; ++c) add(double{weight.get(r, c)} * x.get(t, c));
        for (std::int32_t e = rows[std::size_t(r)]; with_surplus && e < rows[std::size_t(r) + 1];
             ++e) {
          add(double{surplus_values.get(0, e)} * x.get(t, columns[std::size_t(e)]));
        }
        const double allowed = unit * std::fabs(sum) + size * double(k) * 0x1p-24 + 0x1p-24;
        if (std::fabs(y.get(t, r) - sum) <= allowed) continue;
        std::fprintf(stderr, "  m %d n %d k %d: y[%d, %d] is %g, not %g\n", int(m), int(n), int(k),
                     int(t), int(r), y.get(t, r), sum);
        return false;
      }
    }
    return true;
  }
};

// The same bits in either order of threads, and close.
void test_problem(Problem& problem, bool with_surplus, bool with_bias) {
  simt::reverse_order = !simt::reverse_order;
  const Matrix y = problem.run(with_surplus, with_bias);
  CHECK(problem.is_close(with_surplus, with_bias, y));
}

void test_tokens(Random& random) {
  for (std::int64_t m = 0; m <= cuda::kMaxBitmapTokens; ++m) {
    Problem problem(random, kDTypes[m % 2], m, 37, 176);
    test_problem(problem, m % 3 == 0, m % 2 == 0);
  }
}

void test_random(Random& random) {
  for (int i = 0; i < 24; ++i) {
    simt::device = i % 2;
    const std::int64_t m = 1 + random.below(16), n = 1 + random.below(200);
    Problem problem(random, kDTypes[random.below(2)], m, n, 1 + random.below(1200));
    test_problem(problem, random.below(2), random.below(2));
  }
  simt::device = 0;
}

// Few SMs, so that a CTA goes through several groups, begins and ends within one, and a group has
// pieces of several CTAs.
void test_parts(Random& random) {
  for (simt::device = 4; simt::device < 7; ++simt::device) {  // 1, 3 and 7 SMs
    for (const std::int64_t m : {3, 7, 13}) {
      const std::int64_t n = 20 * m + 1, k = 128 * (20 + simt::device) - 3;
      Problem problem(random, kDTypes[simt::device % 2], m, n, k);
      test_problem(problem, simt::device % 2 == 0, true);
      const bool before = simt::reverse_order;
      const Matrix y = problem.run(true, true);
      simt::reverse_order = !before;
      CHECK(problem.run(true, true) == y);
    }
  }
  simt::device = 0;
}

// Full records, empty ones, and columns all at one end.
void test_records(Random& random) {
  for (const int nonzeros : {0, 1, 16}) {
    Problem problem(random, kDTypes[nonzeros % 2], 5, 33, 300, nonzeros);
    test_problem(problem, false, false);
  }
}

// What lies outside the lists is skipped.
void test_wrong_surplus(Random& random) {
  Problem problem(random, DType::kBFloat16, 3, 20, 64);
  problem.columns.assign(40, 64);
  problem.columns[3] = 0xffff;
  problem.rows.assign(21, 1000);
  problem.rows[0] = -5;
  const Matrix y = problem.run(true, false);
  CHECK(problem.is_close(false, false, y));
}

// Columns fill all 16 bits; wider weights have no surplus.
void test_the_widest_surplus(Random& random) {
  for (const std::int64_t m : {1, 7}) {
    Problem problem(random, kDTypes[m % 2 != 0], m, 2, kMaxSurplusCols);
    problem.columns = {32767, 32768, 40000, 65535};
    problem.rows = {0, 2, 4};
    test_problem(problem, true, true);
  }
  Problem wide(random, DType::kBFloat16, 1, 1, kMaxSurplusCols + 1);
  test_problem(wide, false, false);
  Matrix y(DType::kBFloat16, 1, 1);
  std::vector<float> workspace(cuda::linear_bitmap_workspace(1, 1, wide.k) / 4);
  CHECK_INVALID(
      cuda::linear_bitmap(wide.x.view(), wide.packed.values.view().data, wide.packed.mask.data(),
                          wide.surplus(), nullptr, y.view(), workspace.data(), nullptr),
      "at most 65536 columns, got 65537");
}

void test_no_columns(Random& random) {
  Problem problem(random, DType::kFloat16, 5, 43, 0);
  test_problem(problem, false, true);
}

void test_bad_arguments(Random& random) {
  Problem p(random, DType::kBFloat16, 17, 8, 64);
  Matrix y(p.x.dtype(), 17, 8), y3(p.x.dtype(), 3, 8);
  void* values = p.packed.values.view().data;
  float workspace[512];
  CHECK_INVALID(cuda::linear_bitmap(p.x.view(), values, p.packed.mask.data(), {}, nullptr, y.view(),
                                    workspace, nullptr),
                "at most 16 rows");
  ConstMatrixView x = p.x.view();
  x.rows = 3;
  CHECK_INVALID(cuda::linear_bitmap(x, values, nullptr, {}, nullptr, y3.view(), workspace, nullptr),
                "mask is a null");
  CHECK_INVALID(cuda::linear_bitmap(x, values, p.packed.mask.data(), {}, nullptr, y3.view(),
                                    nullptr, nullptr),
                "workspace");
  x.ld += 1;
  CHECK_INVALID(cuda::linear_bitmap(x, values, p.packed.mask.data(), {}, nullptr, y3.view(),
                                    workspace, nullptr),
                "ld of x");
  simt::device = 2;  // sm_75
  x.ld -= 1;
  CHECK(cuda::linear_bitmap(x, values, p.packed.mask.data(), {}, nullptr, y3.view(), workspace,
                            nullptr)
            .code == StatusCode::kUnsupported);
  simt::device = 0;
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  Random random(32);
  test_tokens(random);
  test_random(random);
  test_parts(random);
  test_records(random);
  test_wrong_surplus(random);
  test_the_widest_surplus(random);
  test_no_columns(random);
  test_bad_arguments(random);
  return testing::finish();
}
