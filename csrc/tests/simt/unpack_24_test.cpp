// The CUDA kernel of unpack_24, run on the host, against the CPU op: the same bits.
#include "core/cuda/unpack_24.cu"

#include "tests/check.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;

// `skip` moves values and weight off their alignment.
void test_same_bits(Random& random, DType dtype, MetaOrder order, std::int64_t n, std::int64_t k,
                    std::int64_t ld, std::int64_t skip) {
  Matrix values(dtype, 1, n * k / 2 + skip);
  values.fill(random);
  std::vector<std::int16_t> meta(
      static_cast<std::size_t>(padded_rows_24(order, n) * padded_cols_24(order, k) / 16));
  constexpr unsigned kGroups[] = {0x4, 0x8, 0xc, 0x9, 0xd, 0xe};  // the first column, the second
  for (std::int16_t& word : meta) {
    unsigned bits = 0;
    for (int group = 0; group < 4; ++group) bits = bits << 4 | kGroups[random.below(6)];
    word = static_cast<std::int16_t>(bits);
  }
  const std::size_t skipped = static_cast<std::size_t>(skip) * size_of(dtype);
  const void* data = static_cast<char*>(values.view().data) + skipped;
  Matrix expected(dtype, n, ld + skip), unpacked = expected;
  const auto view_of = [&](Matrix& matrix) {
    MatrixView view = matrix.view();
    view.data = static_cast<char*>(view.data) + skipped;
    view.cols = k;
    return view;
  };
  CHECK_OK(unpack_24(data, meta.data(), order, view_of(expected), serial()));
  CHECK_OK(cuda::unpack_24(data, meta.data(), order, view_of(unpacked), nullptr));
  CHECK(unpacked == expected);
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 16);
  std::int16_t meta[2];
  float values[16];
  CHECK_INVALID(cuda::unpack_24(values, meta, static_cast<MetaOrder>(3), weight.view(), nullptr),
                "0 (canonical), 80 or 90");
  CHECK_INVALID(cuda::unpack_24(values, nullptr, MetaOrder::kCanonical, weight.view(), nullptr),
                "meta is a null");
  Matrix empty(DType::kFloat32, 0, 16);
  CHECK_OK(cuda::unpack_24(nullptr, nullptr, MetaOrder::kCanonical, empty.view(), nullptr));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  testing::Random random(6);
  for (int i = 0; i < 300; ++i) {
    simt::reverse_order = i % 2 == 1;
    const MetaOrder orders[] = {MetaOrder::kCanonical, MetaOrder::kSm80, MetaOrder::kSm90};
    const std::int64_t k = 16 * (1 + random.below(40));
    test_same_bits(random, testing::kAllDTypes[random.below(3)], orders[random.below(3)],
                   1 + random.below(80), k, k + 4 * random.below(3), random.below(4) == 0);
  }
  test_bad_arguments();
  return testing::finish();
}
