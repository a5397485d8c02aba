// The CUDA kernels of pack_24 and prune_pack_24, run on the host, against the CPU ops: the same
// bits.
#include "core/cuda/pack_24.cu"

#include "prune_cases.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::PruneCase;
using testing::Random;

struct PackedBits {
  Matrix values;
  std::vector<std::int16_t> meta;
  std::int32_t bad = -7;

  PackedBits(DType dtype, std::int64_t n, std::int64_t k, std::int64_t skip)
      : values(dtype, 1, n * k / 2 + skip + 1),
        meta(static_cast<std::size_t>(n * k / kColumnsPerMeta) + 1, 0x5a5a),
        skip_(skip) {}

  void* data() {
    return static_cast<char*>(values.view().data) +
           static_cast<std::size_t>(skip_) * size_of(values.dtype());
  }
  bool operator==(const PackedBits& other) const {
    return values == other.values && meta == other.meta && bad == other.bad;
  }

 private:
  std::int64_t skip_;
};

// `skip` moves the values off their alignment.
void test_pack(const PruneCase& test, std::int64_t skip) {
  Matrix weight = test.weight;
  const MatrixView view = test.view_of(weight);
  PackedBits expected(view.dtype, view.rows, view.cols, skip), packed = expected;
  CHECK_OK(pack_24(view, expected.data(), expected.meta.data(), &expected.bad, serial()));
  CHECK_OK(cuda::pack_24(view, packed.data(), packed.meta.data(), &packed.bad, nullptr));
  CHECK(packed == expected);
  CHECK(weight == test.weight);
}

// What the two ops give one after the other. A row that prune_nm leaves alone is packed as zeros.
void test_prune_pack(const PruneCase& test, std::int64_t skip) {
  Matrix weight = test.weight;
  const MatrixView view = test.view_of(weight);
  PackedBits expected(view.dtype, view.rows, view.cols, skip), packed = expected;
  for (std::int64_t r = view.rows - 1; r >= 0; --r) {
    MatrixView row = view;
    row.data =
        static_cast<char*>(view.data) + static_cast<std::size_t>(r * view.ld) * size_of(view.dtype);
    row.rows = 1;
    std::int32_t bad = -7;
    CHECK_OK(prune_nm(row, test.norm(), 2, 4, &bad, serial()));
    if (bad != 0) continue;
    expected.bad = static_cast<std::int32_t>(r);
    for (std::int64_t c = 0; c < view.cols; ++c) weight.set(r, test.skip + c, 0);
  }
  const std::int32_t expected_bad = expected.bad == -7 ? -1 : expected.bad;
  CHECK_OK(pack_24(view, expected.data(), expected.meta.data(), &expected.bad, serial()));
  expected.bad = expected_bad;

  weight = test.weight;
  CHECK_OK(cuda::prune_pack_24(view, test.norm(), packed.data(), packed.meta.data(), &packed.bad,
                               nullptr));
  CHECK(packed == expected);
  CHECK(weight == test.weight);
}

void test_random(Random& random) {
  for (int i = 0; i < 700; ++i) {
    simt::reverse_order = i % 2 == 1;
    const std::int64_t k = 16 * (1 + random.below(random.below(6) == 0 ? 40 : 8));
    PruneCase test = testing::random_prune_case(random, 1 + random.below(3), k);
    const std::int64_t skip = random.below(4) == 0;
    test_prune_pack(test, skip);
    // Then as pack_24 wants it, but for a rare row.
    Matrix pruned = test.weight;
    CHECK_OK(prune_nm(test.view_of(pruned), test.norm(), 2, 4, nullptr, serial()));
    test.weight = pruned;
    if (random.below(4) == 0) test.set(0, random.below(k), NAN);
    test_pack(test, skip);
  }
}

void test_lengths(Random& random) {
  for (const std::int64_t k : {16, 8192, 8208, 32768, 32784, 131072}) {
    for (const DType dtype : testing::kAllDTypes) {
      if (k > 32784 && dtype != DType::kBFloat16) continue;
      const PruneCase test(random, dtype, 1, k, 0, true);
      test_prune_pack(test, 0);
      if (k <= 8208) test_pack(test, 0);  // dense, so bad
    }
  }
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 24);
  std::int16_t meta[4];
  float values[24];
  CHECK_INVALID(cuda::pack_24(weight.view(), values, meta, nullptr, nullptr), "multiple of 16");
  Matrix good(DType::kFloat32, 2, 16);
  CHECK_INVALID(cuda::pack_24(good.view(), values, nullptr, nullptr, nullptr), "meta is a null");
  CHECK_INVALID(cuda::prune_pack_24(good.view(), nullptr, nullptr, meta, nullptr, nullptr),
                "values is a null");
  Matrix empty(DType::kFloat32, 0, 16);
  std::int32_t bad = 5;
  CHECK_OK(cuda::pack_24(empty.view(), nullptr, nullptr, &bad, nullptr));
  CHECK(bad == -1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::testing::Random random(5);
  wanda_ext::test_random(random);
  wanda_ext::test_lengths(random);
  wanda_ext::test_bad_arguments();
  return wanda_ext::testing::finish();
}
