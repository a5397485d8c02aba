// pack_stream, unpack_stream and linear_stream against plain loops and a double sum, with every set
// of kernels that this processor has.
#include "check.h"
#include "products.h"
#include "wanda_ext/ops.h"
#include "workspace.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;
using testing::Workspace;

struct Problem {
  Matrix x, weight, bias, values;
  std::vector<std::uint8_t> mask;
  std::vector<std::int64_t> offsets;
  std::int64_t count = 0;

  // One of `one_of` weights is not zero.
  Problem(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t one_of)
      : x(dtype, m, k, k + 5),
        weight(dtype, n, k, k + 3),
        bias(dtype, 1, n),
        values(dtype, 1, n * k),
        mask(static_cast<std::size_t>(n * ((k + 7) / 8))),
        offsets(static_cast<std::size_t>(n + 1)) {
    Random random(static_cast<std::uint64_t>((m * 1000 + n) * 10000 + k));
    x.fill(random);
    bias.fill(random);
    for (std::int64_t r = 0; r < n; ++r) {
      for (std::int64_t c = 0; c < k; ++c) {
        const bool kept = random.below(one_of) == 0;
        weight.set(r, c, kept ? std::copysign(0.125f, random.uniform()) + random.uniform() : -0.0f);
        if (weight.get(r, c) != 0) ++count;
      }
    }
    CHECK_OK(pack_stream(weight.view(), count, values.view().data, mask.data(), offsets.data(),
                         std_threads(3)));
  }

  Stream stream() { return {values.view().data, mask.data(), offsets.data(), count}; }
};

void test_packed(Problem& problem) {
  const std::int64_t n = problem.weight.rows(), k = problem.weight.cols();
  std::int64_t at = 0;
  for (std::int64_t r = 0; r < n; ++r) {
    CHECK(problem.offsets[static_cast<std::size_t>(r)] == at);
    for (std::int64_t c = 0; c < k; ++c) {
      const int byte = problem.mask[static_cast<std::size_t>(r * ((k + 7) / 8) + c / 8)];
      const bool kept = problem.weight.get(r, c) != 0;
      CHECK((byte >> c % 8 & 1) == kept);
      if (kept) CHECK(problem.values.get(0, at++) == problem.weight.get(r, c));
    }
  }
  CHECK(problem.offsets.back() == at && at == problem.count);
  Matrix back(problem.weight.dtype(), n, k, k + 3);
  CHECK_OK(unpack_stream(problem.stream(), back.view(), std_threads(2)));
  for (std::int64_t r = 0; r < n; ++r) {
    for (std::int64_t c = 0; c < k; ++c) CHECK(back.get(r, c) == problem.weight.get(r, c));
  }
}

Matrix linear(Problem& problem, bool with_bias, int threads) {
  const std::int64_t m = problem.x.rows(), n = problem.weight.rows(), k = problem.x.cols();
  Matrix y(problem.x.dtype(), m, n, n + 3);
  Workspace workspace(linear_stream_workspace(m, n, k, threads));
  CHECK_OK(linear_stream(problem.x.view(), problem.stream(),
                         with_bias ? problem.bias.view().data : nullptr, y.view(), workspace.data(),
                         std_threads(threads)));
  return y;
}

void test_shape(DType dtype, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t one_of) {
  Problem problem(dtype, m, n, k, one_of);
  test_packed(problem);
  const Matrix y = linear(problem, true, 1);
  for (std::int64_t t = 0; t < m; ++t) {
    for (std::int64_t r = 0; r < n; ++r) {
      testing::ExactSum sum;
      for (std::int64_t c = 0; c < k; ++c) sum.add(problem.weight.get(r, c), problem.x.get(t, c));
      sum.add(problem.bias.get(0, r), 1);
      CHECK(sum.is_near(y.get(t, r), dtype));
    }
  }
  for (int threads : {2, 5}) CHECK(linear(problem, true, threads) == y);
}

// Masks and values that disagree lead nowhere outside.
void test_damaged_masks() {
  for (std::int64_t m : {1, 6}) {
    Problem problem(DType::kBFloat16, m, 21, 300, 3);
    problem.values = Matrix(DType::kBFloat16, 1, problem.count);
    for (std::int64_t i = 0; i < problem.count; ++i) problem.values.set(0, i, 1);
    for (int damage : {255, 0, 1}) {
      problem.mask.assign(problem.mask.size(), static_cast<std::uint8_t>(damage));
      linear(problem, false, 2);
    }
  }
}

void test_bad_arguments() {
  Problem problem(DType::kFloat32, 2, 3, 40, 2);
  Matrix y(DType::kFloat32, 2, 3);
  Workspace workspace(linear_stream_workspace(2, 3, 40, 1));
  const auto call = [&](const Stream& stream, void* space) {
    return linear_stream(problem.x.view(), stream, nullptr, y.view(), space, serial());
  };
  CHECK_OK(call(problem.stream(), workspace.data()));
  CHECK_INVALID(call(problem.stream(), workspace.data() + 4), "aligned to 64");
  CHECK_INVALID(call({}, workspace.data()), "null pointer");
  problem.offsets[2] = problem.count + 1;
  CHECK_INVALID(call(problem.stream(), workspace.data()), "offsets must ascend");
  CHECK_INVALID(unpack_stream(problem.stream(), problem.weight.view(), serial()),
                "offsets must ascend");
  CHECK_INVALID(pack_stream(problem.weight.view(), problem.count - 1, problem.values.view().data,
                            problem.mask.data(), problem.offsets.data(), serial()),
                "must be the number of non-zeros");
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  testing::with_all_kernels([] {
    for (DType dtype : testing::kAllDTypes) {
      for (std::int64_t m : {1, 2, 3, 4, 5, 17}) {
        test_shape(dtype, m, 7, 13, 2);
        test_shape(dtype, m, 70, 275, 3);
      }
      test_shape(dtype, 2, 33, 1040, 1);
      test_shape(dtype, 131, 35, 528, 10);
    }
    test_damaged_masks();
    Problem no_columns(DType::kFloat16, 2, 3, 0, 2);
    CHECK(linear(no_columns, true, 2).get(1, 2) == no_columns.bias.get(0, 2));
    Problem no_rows(DType::kFloat32, 2, 0, 32, 2);
    CHECK(linear(no_rows, false, 2).cols() == 0);
  });
  test_bad_arguments();
  return testing::finish();
}
