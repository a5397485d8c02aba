// The codec by itself: which columns a record keeps, and that its indices fill a tile once.
#include "wanda_ext/bitmap.h"

#include <vector>

#include "bitmap_cases.h"
#include "check.h"

namespace wanda_ext {
namespace {

static_assert(bitmap_of(0) == kEmptyRecord);
static_assert(bitmap_of(0xffffffffu) == 0x0000ffffu);
static_assert(bitmap_of(0x55555555u) == 0x55555555u);
static_assert(bitmap_row_tiles(0) == 0 && bitmap_row_tiles(16) == 1 && bitmap_row_tiles(17) == 2);
static_assert(bitmap_column_tiles(128) == 1 && bitmap_column_tiles(129) == 2);

void test_kept_columns() {
  testing::Random random(1);
  for (int i = 0; i < 200000; ++i) {
    auto nonzeros = static_cast<std::uint32_t>(random.next());
    for (std::int64_t j = random.below(3); j > 0; --j) {  // sparser or denser records
      const auto other = static_cast<std::uint32_t>(random.next());
      nonzeros = i % 2 ? nonzeros & other : nonzeros | other;
    }
    const std::uint32_t kept = bitmap_of(nonzeros);
    CHECK(kept == testing::kept_columns(nonzeros));
    CHECK(count_bits(kept) == kRecordValues);
  }
  for (int b = 0; b <= 32; ++b) {
    const std::uint32_t low = b == 32 ? 0xffffffffu : (1u << b) - 1;
    for (const std::uint32_t run : {low, ~low}) {
      CHECK(bitmap_of(run) == testing::kept_columns(run));
    }
  }
}

void test_indices() {
  std::vector<int> masks(kBitmapTileMasks), values(kBitmapTileValues);
  for (int row = 0; row < kBitmapTileRows; ++row) {
    for (int record = 0; record < kBitmapTileRecords; ++record) {
      ++masks[static_cast<std::size_t>(bitmap_mask_index(row, record))];
      for (int j = 0; j < kRecordValues; ++j) {
        ++values[static_cast<std::size_t>(bitmap_value_index(row, record, j))];
      }
    }
  }
  for (int count : masks) CHECK(count == 1);
  for (int count : values) CHECK(count == 1);
  CHECK(bitmap_mask_index(11, 2) == 2 * (4 * 3 + 2) + 1);
  CHECK(bitmap_value_index(11, 2, 13) == ((2 + 1) * 32 + 14) * 8 + 5);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::test_kept_columns();
  wanda_ext::test_indices();
  return wanda_ext::testing::finish();
}
