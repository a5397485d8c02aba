// order_meta_24: every order to every other, word by word, and back.
#include "check.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

using testing::Random;

constexpr MetaOrder kAllOrders[] = {MetaOrder::kCanonical, MetaOrder::kSm80, MetaOrder::kSm90};

using Words = std::vector<std::int16_t>;

std::size_t size_in(MetaOrder order, std::int64_t n, std::int64_t k) {
  return static_cast<std::size_t>(padded_rows_24(order, n) * padded_cols_24(order, k) /
                                  kColumnsPerMeta);
}

Words order_by_hand(const Words& canonical, MetaOrder order, std::int64_t n, std::int64_t k) {
  const std::int64_t rows = padded_rows_24(order, n);
  const std::int64_t cols = padded_cols_24(order, k);
  const std::int64_t words = k / kColumnsPerMeta;
  Words ordered(size_in(order, n, k), static_cast<std::int16_t>(kPaddingMeta));
  for (std::int64_t r = 0; r < n; ++r) {
    for (std::int64_t w = 0; w < words; ++w) {
      ordered[static_cast<std::size_t>(meta_index_24(order, r, w, rows, cols))] =
          canonical[static_cast<std::size_t>(r * words + w)];
    }
  }
  return ordered;
}

void test_all_orders(std::int64_t n, std::int64_t k) {
  Random random(static_cast<std::uint64_t>(n + k));
  Words canonical(size_in(MetaOrder::kCanonical, n, k));
  for (std::int16_t& word : canonical) word = static_cast<std::int16_t>(random.next());
  for (MetaOrder src : kAllOrders) {
    const Words from = order_by_hand(canonical, src, n, k);
    for (MetaOrder dst : kAllOrders) {
      for (int threads : {1, 3}) {
        Words to(size_in(dst, n, k), 0x5a5a);
        CHECK_OK(order_meta_24(from.data(), src, to.data(), dst, n, k, std_threads(threads)));
        CHECK(to == order_by_hand(canonical, dst, n, k));
      }
    }
  }
}

void test_bad_arguments() {
  std::int16_t word = 0;
  const MetaOrder canonical = MetaOrder::kCanonical;
  const MetaOrder unknown = static_cast<MetaOrder>(7);
  CHECK_INVALID(order_meta_24(&word, unknown, &word, canonical, 1, 16, serial()), "got 7");
  CHECK_INVALID(order_meta_24(&word, canonical, &word, unknown, 1, 16, serial()), "got 7");
  CHECK_INVALID(order_meta_24(&word, canonical, &word, canonical, 1, 8, serial()), "got 1 x 8");
  CHECK_INVALID(order_meta_24(&word, canonical, &word, canonical, -1, 16, serial()), "n >= 0");
  CHECK_INVALID(order_meta_24(nullptr, canonical, &word, canonical, 1, 16, serial()), "src is");
  CHECK_INVALID(order_meta_24(&word, canonical, nullptr, canonical, 1, 16, serial()), "dst is");
  CHECK_OK(order_meta_24(nullptr, canonical, nullptr, MetaOrder::kSm90, 0, 16, serial()));
  CHECK_OK(order_meta_24(nullptr, MetaOrder::kSm80, nullptr, canonical, 3, 0, serial()));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  for (std::int64_t n : {1, 17, 32, 64, 100, 256}) {
    for (std::int64_t k : {16, 32, 80, 128, 144, 512}) wanda_ext::test_all_orders(n, k);
  }
  wanda_ext::test_bad_arguments();
  return wanda_ext::testing::finish();
}
