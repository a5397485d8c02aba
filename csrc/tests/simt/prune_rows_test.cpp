// The CUDA kernel of prune_rows, run on the host, against the CPU op: the same bits.
#include "core/cuda/prune_rows.cu"

#include "prune_cases.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::PruneCase;
using testing::Random;

void test_same_bits(const PruneCase& test, std::int64_t n_prune) {
  Matrix expected = test.weight;
  std::int32_t expected_bad = -7;
  std::vector<std::int32_t> keys(prune_rows_workspace(test.k(), 1) / 4 + 16);
  void* workspace = keys.data() + (64 - reinterpret_cast<std::uintptr_t>(keys.data()) % 64) / 4;
  CHECK_OK(
      prune_rows(test.view_of(expected), test.norm(), n_prune, &expected_bad, workspace, serial()));
  std::int32_t bad = -7;
  Matrix pruned = test.weight;
  CHECK_OK(cuda::prune_rows(test.view_of(pruned), test.norm(), n_prune, &bad, nullptr));
  CHECK(pruned == expected);
  CHECK(bad == expected_bad);
}

void test_random(Random& random) {
  for (int i = 0; i < 700; ++i) {
    simt::reverse_order = i % 2 == 1;
    const std::int64_t k = 1 + random.below(random.below(4) == 0 ? 1500 : 100);
    PruneCase test = testing::random_prune_case(random, 1 + random.below(3),
                                                random.below(2) == 0 ? k : (k + 7) / 8 * 8);
    const std::int64_t choices[] = {0, test.k(), test.k() / 2, random.below(test.k() + 1)};
    test_same_bits(test, choices[random.below(4)]);
  }
}

// Rows of every way to be held, each with the largest and smallest of its length.
void test_lengths(Random& random) {
  for (const std::int64_t k : {1, 8, 512, 8192, 8200, 32768, 32776, 40001, 131071, 131072}) {
    for (const DType dtype : testing::kAllDTypes) {
      if (k > 40001 && dtype != DType::kBFloat16) continue;
      PruneCase test(random, dtype, 1, k, /*skip=*/0, /*with_norm=*/dtype != DType::kBFloat16);
      test_same_bits(test, k / 2);  // bfloat16 without norms: many ties
    }
  }
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 8);
  CHECK_INVALID(cuda::prune_rows(weight.view(), nullptr, 9, nullptr, nullptr), "n_prune");
  Matrix wide(DType::kFloat32, 1, kMaxCols + 1);
  CHECK_INVALID(cuda::prune_rows(wide.view(), nullptr, 9, nullptr, nullptr), "at most 131072");
  Matrix empty(DType::kFloat32, 0, 8);
  std::int32_t bad = 5;
  CHECK_OK(cuda::prune_rows(empty.view(), nullptr, 4, &bad, nullptr));
  CHECK(bad == -1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::testing::Random random(3);
  wanda_ext::test_random(random);
  wanda_ext::test_lengths(random);
  wanda_ext::test_bad_arguments();
  return wanda_ext::testing::finish();
}
