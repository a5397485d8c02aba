// prune_rows against a stable sort of every row.
#include <algorithm>
#include <memory>
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
std::int32_t sort_and_prune(Matrix& weight, const float* input_norm, std::int64_t n_prune) {
  std::int32_t bad = -1;
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    if (is_bad(weight, input_norm, r)) {
      if (bad == -1) bad = static_cast<std::int32_t>(r);
      continue;
    }
    std::vector<std::int64_t> order(static_cast<std::size_t>(weight.cols()));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return score(weight, input_norm, r, a) < score(weight, input_norm, r, b);
    });
    for (std::int64_t i = 0; i < weight.cols(); ++i) {
      const std::int64_t c = order[static_cast<std::size_t>(i)];
      weight.set(r, c, i < n_prune ? 0.0f : weight.get(r, c) + 0.0f);
    }
  }
  return bad;
}

// 64-byte aligned, exactly as long as asked for, so that a sanitizer sees an overrun.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {}
  ~Workspace() { std::free(memory_); }
  void* data() { return memory_; }

 private:
  char* memory_;
};

void test_against_sort(const Matrix& weight, const std::vector<float>& input_norm,
                       std::int64_t n_prune) {
  const float* norm = input_norm.empty() ? nullptr : input_norm.data();
  Matrix expected = weight;
  const std::int32_t expected_bad = sort_and_prune(expected, norm, n_prune);
  for (int threads : {1, 3}) {
    Matrix pruned = weight;
    std::int32_t bad = -7;
    Workspace workspace(prune_rows_workspace(weight.cols(), threads));
    CHECK_OK(
        prune_rows(pruned.view(), norm, n_prune, &bad, workspace.data(), std_threads(threads)));
    CHECK(pruned == expected);
    CHECK(bad == expected_bad);
  }
}

std::vector<float> random_norm(Random& random, std::int64_t k) {
  std::vector<float> norm(static_cast<std::size_t>(k));
  for (float& value : norm) value = std::exp(2 * random.uniform());
  return norm;
}

void test_sizes(DType dtype) {
  for (std::int64_t k : {0, 1, 2, 15, 16, 17, 100, 511, 1025}) {
    Random random(static_cast<std::uint64_t>(k) + 1);
    Matrix weight(dtype, 5, k, k + 3);
    weight.fill(random);
    const std::vector<float> norm = random_norm(random, k);
    for (std::int64_t n_prune : {std::int64_t{0}, std::int64_t{1}, k / 3, k / 2, k - 1, k}) {
      if (n_prune < 0 || n_prune > k) continue;
      test_against_sort(weight, norm, n_prune);
      test_against_sort(weight, {}, n_prune);
    }
  }
}

// Few distinct scores of both signs, zeros of both signs and zero norms: ties everywhere.
void test_ties(DType dtype) {
  Random random(2);
  const std::int64_t k = 900;
  Matrix weight(dtype, 8, k);
  const float values[] = {0.0f, -0.0f, 1.0f, -1.0f, 2.0f};
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    const std::int64_t kinds = r == 0 ? 2 : r == 1 ? 4 : 5;
    for (std::int64_t c = 0; c < k; ++c) weight.set(r, c, values[random.below(kinds)]);
  }
  std::vector<float> norm(static_cast<std::size_t>(k));
  for (float& value : norm) value = static_cast<float>(random.below(2));
  for (std::int64_t n_prune : {0, 1, 100, 255, 256, 257, 450, 700, 899, 900}) {
    test_against_sort(weight, {}, n_prune);
    test_against_sort(weight, norm, n_prune);
  }
}

// Rows of one power of two from 2.0 on: their keys end in so many zeros that what lies one step
// above them does not fit an int32.
void test_powers_of_two(DType dtype) {
  Matrix weight(dtype, 15, 4);
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    for (std::int64_t c = 0; c < 4; ++c) {
      weight.set(r, c, std::ldexp(c % 2 ? -1.0f : 1.0f, static_cast<int>(r) + 1));
    }
  }
  for (std::int64_t n_prune : {1, 3, 4}) test_against_sort(weight, {}, n_prune);
}

// Scores over the whole range of fp32, denormals included: the guesses interpolate badly here.
void test_wild_scores() {
  Random random(3);
  const std::int64_t k = 2000;
  Matrix weight(DType::kFloat32, 6, k);
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    for (std::int64_t c = 0; c < k; ++c) {
      const int spread = r < 3 ? 140 : 4;
      const float scale = std::ldexp(1.0f, static_cast<int>(random.below(2 * spread)) - spread);
      weight.set(r, c, random.uniform() * scale);
    }
    weight.set(r, 0, 3e38f);  // one outlier makes every linear guess too low
  }
  for (std::int64_t n_prune : {1, 20, 1000, 1980, 1999}) test_against_sort(weight, {}, n_prune);
}

void test_wide() {
  Random random(4);
  Matrix weight(DType::kBFloat16, 2, kMaxCols);
  weight.fill(random);
  test_against_sort(weight, random_norm(random, kMaxCols), kMaxCols / 2);
}

void test_bad_rows(DType dtype) {
  Random random(5);
  Matrix weight(dtype, 7, 50);
  weight.fill(random);
  weight.set(2, 49, NAN);
  weight.set(2, 3, -0.0f);
  weight.set(5, 0, -INFINITY);
  test_against_sort(weight, {}, 20);
  test_against_sort(weight, {}, 0);
  std::vector<float> norm = random_norm(random, 50);
  test_against_sort(weight, norm, 20);
  norm[7] = INFINITY;  // a zero weight makes it NaN; every row is bad
  weight.set(0, 7, 0.0f);
  test_against_sort(weight, norm, 20);
  if (dtype == DType::kFloat32) {  // a finite weight and norm whose score overflows
    norm[7] = 1e30f;
    weight.set(4, 7, 1e30f);
    test_against_sort(weight, norm, 20);
  }
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 8);
  Random random(6);
  weight.fill(random);
  const Matrix before = weight;
  Workspace workspace(prune_rows_workspace(8, 1));
  const MatrixView view = weight.view();
  CHECK_INVALID(prune_rows(view, nullptr, -1, nullptr, workspace.data(), serial()), "got -1");
  CHECK_INVALID(prune_rows(view, nullptr, 9, nullptr, workspace.data(), serial()), "[0, 8]");
  CHECK_INVALID(prune_rows(view, nullptr, 4, nullptr, nullptr, serial()), "workspace");
  CHECK_INVALID(
      prune_rows(view, nullptr, 4, nullptr, static_cast<char*>(workspace.data()) + 4, serial()),
      "64-byte aligned");
  MatrixView wide = view;
  wide.cols = wide.ld = kMaxCols + 1;
  CHECK_INVALID(prune_rows(wide, nullptr, 4, nullptr, workspace.data(), serial()), "131072");
  wide = view;
  wide.ld = 4;
  CHECK_INVALID(prune_rows(wide, nullptr, 4, nullptr, workspace.data(), serial()), "ld >= cols");
  CHECK(weight == before);
  CHECK_OK(prune_rows(view, nullptr, 4, nullptr, workspace.data(), serial()));
  CHECK(!(weight == before));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (DType dtype : testing::kAllDTypes) {
    test_sizes(dtype);
    test_ties(dtype);
    test_powers_of_two(dtype);
    test_bad_rows(dtype);
  }
  test_wild_scores();
  test_wide();
  test_bad_arguments();
  return testing::finish();
}
