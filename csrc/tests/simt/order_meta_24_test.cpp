// The CUDA kernel of order_meta_24, run on the host, against the CPU op: the same bits.
#include "core/cuda/order_meta_24.cu"

#include "tests/check.h"

namespace wanda_ext {
namespace {

constexpr MetaOrder kOrders[] = {MetaOrder::kCanonical, MetaOrder::kSm80, MetaOrder::kSm90};

std::size_t words_of(MetaOrder order, std::int64_t n, std::int64_t k) {
  return static_cast<std::size_t>(padded_rows_24(order, n) * padded_cols_24(order, k) /
                                  kColumnsPerMeta);
}

void test_same_bits(testing::Random& random, std::int64_t n, std::int64_t k) {
  for (const MetaOrder from : kOrders) {
    for (const MetaOrder to : kOrders) {
      std::vector<std::int16_t> src(words_of(from, n, k));
      for (std::int16_t& word : src) word = static_cast<std::int16_t>(random.next());
      std::vector<std::int16_t> expected(words_of(to, n, k) + 1, 0x5a5a), moved = expected;
      CHECK_OK(order_meta_24(src.data(), from, expected.data(), to, n, k, serial()));
      CHECK_OK(cuda::order_meta_24(src.data(), from, moved.data(), to, n, k, nullptr));
      CHECK(moved == expected);
    }
  }
}

void test_bad_arguments() {
  std::int16_t words[4] = {};
  const MetaOrder order = MetaOrder::kCanonical;
  CHECK_INVALID(cuda::order_meta_24(words, order, words, order, 2, 24, nullptr), "multiple of 16");
  CHECK_INVALID(cuda::order_meta_24(words, order, nullptr, order, 2, 32, nullptr), "dst is a null");
  CHECK_INVALID(
      cuda::order_meta_24(words, static_cast<MetaOrder>(70), words, order, 2, 32, nullptr),
      "got 70");
  CHECK_OK(cuda::order_meta_24(nullptr, order, nullptr, order, 0, 32, nullptr));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  testing::Random random(7);
  for (int i = 0; i < 40; ++i) {
    simt::reverse_order = i % 2 == 1;
    test_same_bits(random, 1 + random.below(150), 16 * (1 + random.below(30)));
  }
  test_bad_arguments();
  return testing::finish();
}
