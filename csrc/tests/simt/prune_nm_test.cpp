// The CUDA kernels of prune_nm, run on the host, against the CPU op: the same bits.
#include "core/cuda/prune_nm.cu"

#include "prune_cases.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::PruneCase;
using testing::Random;

void test_same_bits(const PruneCase& test, int keep, int group) {
  Matrix expected = test.weight;
  std::int32_t expected_bad = -7;
  CHECK_OK(prune_nm(test.view_of(expected), test.norm(), keep, group, &expected_bad, serial()));
  std::int32_t bad = -7;
  Matrix pruned = test.weight;
  CHECK_OK(cuda::prune_nm(test.view_of(pruned), test.norm(), keep, group, &bad, nullptr));
  CHECK(pruned == expected);
  CHECK(bad == expected_bad);
}

void test_random(Random& random) {
  for (int i = 0; i < 900; ++i) {
    simt::reverse_order = i % 2 == 1;
    const int common[] = {4, 8, 16, 32};
    const int group =
        random.below(3) ? common[random.below(4)] : 1 + static_cast<int>(random.below(kMaxGroup));
    const std::int64_t groups = 1 + random.below(random.below(6) == 0 ? 200 : 20);
    const PruneCase test = testing::random_prune_case(random, 1 + random.below(3), groups * group);
    test_same_bits(test, 1 + static_cast<int>(random.below(group)), group);
  }
}

// Rows of every way to be held, each with the largest and smallest of its length.
void test_lengths(Random& random) {
  for (const std::int64_t k : {8, 8192, 8200, 16384, 16416, 32768, 32776, 131072}) {
    for (const int group : {4, 8, 16, 32}) {
      if (k % group != 0) continue;
      test_same_bits(PruneCase(random, DType::kBFloat16, 1, k, 0, true), group / 2, group);
    }
  }
  test_same_bits(PruneCase(random, DType::kFloat32, 1, 11008, 0, true), 2, 4);
  test_same_bits(PruneCase(random, DType::kFloat16, 1, 11008, 0, false), 16, 32);
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 12);
  CHECK_INVALID(cuda::prune_nm(weight.view(), nullptr, 2, 8, nullptr, nullptr), "multiple");
  CHECK_INVALID(cuda::prune_nm(weight.view(), nullptr, 0, 4, nullptr, nullptr), "0 < keep");
  Matrix empty(DType::kFloat32, 3, 0);
  std::int32_t bad = 5;
  CHECK_OK(cuda::prune_nm(empty.view(), nullptr, 2, 4, &bad, nullptr));
  CHECK(bad == -1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::testing::Random random(4);
  wanda_ext::test_random(random);
  wanda_ext::test_lengths(random);
  wanda_ext::test_bad_arguments();
  return wanda_ext::testing::finish();
}
