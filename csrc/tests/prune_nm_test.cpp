// prune_nm against a stable sort of every group.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "naive_scores.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

using testing::is_bad;
using testing::Matrix;
using testing::Random;
using testing::score;

// Returns the lowest bad row, or -1.
std::int32_t sort_and_prune(Matrix& weight, const float* input_norm, int keep, int group) {
  std::int32_t bad = -1;
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    if (is_bad(weight, input_norm, r)) {
      if (bad == -1) bad = static_cast<std::int32_t>(r);
      continue;
    }
    for (std::int64_t first = 0; first < weight.cols(); first += group) {
      std::vector<std::int64_t> order(static_cast<std::size_t>(group));
      std::iota(order.begin(), order.end(), first);
      std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return score(weight, input_norm, r, a) < score(weight, input_norm, r, b);
      });
      for (int i = 0; i < group; ++i) {
        const std::int64_t c = order[static_cast<std::size_t>(i)];
        weight.set(r, c, i < group - keep ? 0.0f : weight.get(r, c) + 0.0f);
      }
    }
  }
  return bad;
}

void test_against_sort(const Matrix& weight, const std::vector<float>& input_norm, int keep,
                       int group) {
  const float* norm = input_norm.empty() ? nullptr : input_norm.data();
  Matrix expected = weight;
  const std::int32_t expected_bad = sort_and_prune(expected, norm, keep, group);
  for (int threads : {1, 3}) {
    Matrix pruned = weight;
    std::int32_t bad = -7;
    CHECK_OK(prune_nm(pruned.view(), norm, keep, group, &bad, std_threads(threads)));
    CHECK(pruned == expected);
    CHECK(bad == expected_bad);
  }
}

std::vector<float> random_norm(Random& random, std::int64_t k) {
  std::vector<float> norm(static_cast<std::size_t>(k));
  for (float& value : norm) value = std::exp(2 * random.uniform());
  return norm;
}

void test_groups(DType dtype) {
  for (int group = 1; group <= kMaxGroup; ++group) {
    Random random(static_cast<std::uint64_t>(group));
    for (std::int64_t groups : {1, 2, 67}) {
      const std::int64_t k = groups * group;
      Matrix weight(dtype, 4, k, k + 5);
      weight.fill(random);
      for (int keep : {1, group / 2, group - 1, group}) {
        if (keep < 1) continue;
        test_against_sort(weight, random_norm(random, k), keep, group);
        test_against_sort(weight, {}, keep, group);
      }
    }
  }
}

// Every pattern of three scores in a group of four, -0.0 and zero norms among them.
void test_ties(DType dtype) {
  const float values[] = {-0.0f, 1.0f, -2.0f};
  Matrix weight(dtype, 1, 81 * 32);
  for (std::int64_t pattern = 0; pattern < 81 * 8; ++pattern) {
    std::int64_t rest = pattern;
    for (std::int64_t i = 0; i < 4; ++i, rest /= 3) {
      weight.set(0, pattern * 4 + i, values[rest % 3]);
    }
  }
  Random random(1);
  std::vector<float> norm(81 * 32);
  for (float& value : norm) value = static_cast<float>(random.below(3));
  for (int group : {2, 4, 6, 8, 12, 16, 32}) {
    for (int keep = 1; keep <= group; ++keep) {
      test_against_sort(weight, {}, keep, group);
      test_against_sort(weight, norm, keep, group);
    }
  }
}

void test_bad_rows(DType dtype) {
  Random random(5);
  Matrix weight(dtype, 7, 48);
  weight.fill(random);
  weight.set(2, 47, NAN);
  weight.set(2, 3, -0.0f);
  weight.set(5, 0, -INFINITY);
  test_against_sort(weight, {}, 2, 4);
  test_against_sort(weight, {}, 1, 3);
  std::vector<float> norm = random_norm(random, 48);
  test_against_sort(weight, norm, 4, 8);
  norm[7] = INFINITY;  // a zero weight makes it NaN; every row is bad
  weight.set(0, 7, 0.0f);
  test_against_sort(weight, norm, 2, 4);
  if (dtype == DType::kFloat32) {  // a finite weight and norm whose score overflows
    norm[7] = 1e30f;
    weight.set(4, 7, 1e30f);
    test_against_sort(weight, norm, 2, 4);
  }
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 8);
  Random random(6);
  weight.fill(random);
  const Matrix before = weight;
  const MatrixView view = weight.view();
  CHECK_INVALID(prune_nm(view, nullptr, 0, 4, nullptr, serial()), "got 0:4");
  CHECK_INVALID(prune_nm(view, nullptr, 5, 4, nullptr, serial()), "got 5:4");
  CHECK_INVALID(prune_nm(view, nullptr, 16, 33, nullptr, serial()), "<= 32");
  CHECK_INVALID(prune_nm(view, nullptr, 1, 3, nullptr, serial()), "8 columns for 1:3");
  MatrixView narrow = view;
  narrow.ld = 4;
  CHECK_INVALID(prune_nm(narrow, nullptr, 2, 4, nullptr, serial()), "ld >= cols");
  CHECK(weight == before);
  CHECK_OK(prune_nm(view, nullptr, 2, 4, nullptr, serial()));
  CHECK(!(weight == before));
  std::int32_t bad = 3;
  narrow.rows = 0;
  CHECK_OK(prune_nm(narrow, nullptr, 2, 4, &bad, serial()));
  CHECK(bad == -1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (DType dtype : testing::kAllDTypes) {
    test_groups(dtype);
    test_ties(dtype);
    test_bad_rows(dtype);
  }
  test_bad_arguments();
  return testing::finish();
}
