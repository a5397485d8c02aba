// The 2:4 codec: nibbles, and the orders of metadata as permutations with padding.
#include "wanda_ext/nm24.h"

#include "check.h"

namespace wanda_ext {
namespace {

constexpr MetaOrder kAllOrders[] = {MetaOrder::kCanonical, MetaOrder::kSm80, MetaOrder::kSm90};

void test_nibbles() {
  for (unsigned nonzeros = 0; nonzeros < 16; ++nonzeros) {
    std::vector<unsigned> kept;
    for (unsigned i = 0; i < 4 && kept.size() < 2; ++i) {
      if (nonzeros >> i & 1) kept.push_back(i);
    }
    // Too few: the highest other columns fill up.
    for (unsigned i = 4; i-- > 0 && kept.size() < 2;) {
      if (kept.empty() || kept[0] != i) kept.insert(kept.begin(), i);
    }
    const unsigned low = kept[0] < kept[1] ? kept[0] : kept[1];
    const unsigned high = kept[0] + kept[1] - low;
    CHECK(nibble_24(nonzeros) == (low | high << 2));
  }
  CHECK(nibble_24(0b0000) == 0xe);
  CHECK(nibble_24(0b0001) == 0xc);
  CHECK(nibble_24(0b0111) == 0x4);
  CHECK(kPaddingMeta == nibble_24(0b0011) * 0x1111);
}

void test_padding() {
  CHECK(padded_rows_24(MetaOrder::kCanonical, 33) == 33);
  CHECK(padded_rows_24(MetaOrder::kSm80, 33) == 64);
  CHECK(padded_rows_24(MetaOrder::kSm90, 33) == 64);
  CHECK(padded_rows_24(MetaOrder::kSm90, 65) == 128);
  CHECK(padded_cols_24(MetaOrder::kCanonical, 48) == 48);
  CHECK(padded_cols_24(MetaOrder::kSm80, 48) == 64);
  CHECK(padded_cols_24(MetaOrder::kSm90, 144) == 256);
  for (MetaOrder order : kAllOrders) {
    CHECK(padded_rows_24(order, 0) == 0);
    CHECK(padded_cols_24(order, 0) == 0);
    CHECK(padded_rows_24(order, 192) == 192);
    CHECK(padded_cols_24(order, 384) == 384);
  }
}

// Every word has a place of its own, and none is left over.
void test_permutation(MetaOrder order, std::int64_t n, std::int64_t k) {
  const std::int64_t rows = padded_rows_24(order, n);
  const std::int64_t cols = padded_cols_24(order, k);
  const std::int64_t words = cols / kColumnsPerMeta;
  std::vector<int> taken(static_cast<std::size_t>(rows * words));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t w = 0; w < words; ++w) {
      const std::int64_t index = meta_index_24(order, r, w, rows, cols);
      if (!CHECK(index >= 0 && index < rows * words)) return;
      CHECK(taken[static_cast<std::size_t>(index)]++ == 0);
      CHECK(index == meta_row_24(order, r, cols) + meta_word_24(order, w, rows));
    }
  }
}

// Places worked out by hand from the layouts: sm80 interleaves two columns of words; an sm90 atom
// gives a lane four blocks of 32 columns in 16 bytes.
void test_known_places() {
  CHECK(meta_index_24(MetaOrder::kCanonical, 3, 5, 64, 128) == 29);
  CHECK(meta_index_24(MetaOrder::kSm80, 8, 0, 64, 128) == 1);
  CHECK(meta_index_24(MetaOrder::kSm80, 0, 1, 64, 128) == 2);
  CHECK(meta_index_24(MetaOrder::kSm80, 16, 0, 64, 128) == 4);
  CHECK(meta_index_24(MetaOrder::kSm80, 1, 0, 64, 128) == 8);
  CHECK(meta_index_24(MetaOrder::kSm80, 32, 0, 64, 128) == 64);
  CHECK(meta_index_24(MetaOrder::kSm80, 0, 2, 64, 128) == 128);
  CHECK(meta_index_24(MetaOrder::kSm90, 8, 0, 128, 256) == 1);
  CHECK(meta_index_24(MetaOrder::kSm90, 0, 2, 128, 256) == 2);
  CHECK(meta_index_24(MetaOrder::kSm90, 1, 0, 128, 256) == 8);
  CHECK(meta_index_24(MetaOrder::kSm90, 0, 1, 128, 256) == 64);
  CHECK(meta_index_24(MetaOrder::kSm90, 16, 0, 128, 256) == 128);
  CHECK(meta_index_24(MetaOrder::kSm90, 64, 0, 128, 256) == 512);
  CHECK(meta_index_24(MetaOrder::kSm90, 0, 8, 128, 256) == 1024);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  test_nibbles();
  test_padding();
  test_known_places();
  for (MetaOrder order : kAllOrders) {
    CHECK(is_meta_order(static_cast<int>(order)));
    for (std::int64_t n : {1, 31, 64, 65, 192}) {
      for (std::int64_t k : {16, 48, 128, 400}) test_permutation(order, n, k);
    }
  }
  CHECK(!is_meta_order(1));
  CHECK(!is_meta_order(100));
  return testing::finish();
}
