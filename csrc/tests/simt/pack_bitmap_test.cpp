// The CUDA kernels of pack_bitmap and unpack_bitmap, run on the host, against the CPU ops: the same
// bits.
#include "core/cuda/pack_bitmap.cu"

#include "../bitmap_cases.h"
#include "core/cuda/unpack_bitmap.cu"

namespace wanda_ext {
namespace {

using testing::Bitmap;
using testing::Matrix;
using testing::Random;

// weight [n,k] inside a buffer; `skip` moves it off its alignment.
MatrixView part_of(Matrix& matrix, std::int64_t skip, std::int64_t k) {
  MatrixView view = matrix.view();
  view.data = static_cast<char*>(view.data) + static_cast<std::size_t>(skip) * size_of(view.dtype);
  view.cols = k;
  return view;
}

Bitmap test_pack(Matrix& weight, std::int64_t skip, std::int64_t k) {
  const Matrix before = weight;
  const MatrixView view = part_of(weight, skip, k);
  Bitmap expected(view.dtype, view.rows, k), packed = expected;
  CHECK_OK(pack_bitmap(view, expected.values.view().data, expected.mask.data(), &expected.bad,
                       serial()));
  CHECK_OK(
      cuda::pack_bitmap(view, packed.values.view().data, packed.mask.data(), &packed.bad, nullptr));
  CHECK(packed == expected);
  CHECK(weight == before);
  return packed;
}

// The surplus, if it is given, is every fifth column of every other row.
void test_unpack(Bitmap& packed, std::int64_t gap, std::int64_t skip, bool with_surplus) {
  const DType dtype = packed.values.dtype();
  std::vector<std::int32_t> rows = {0};
  std::vector<std::uint16_t> columns;
  for (std::int64_t r = 0; r < packed.n; ++r) {
    for (std::int64_t c = r % 5; c < packed.k && r % 2 == 0; c += 5) {
      columns.push_back(static_cast<std::uint16_t>(c));
    }
    rows.push_back(static_cast<std::int32_t>(columns.size()));
  }
  Matrix values(dtype, 1, static_cast<std::int64_t>(columns.size()));
  Random random(3);
  values.fill(random);
  Surplus surplus;
  if (with_surplus) {
    surplus = {rows.data(), columns.data(), values.view().data,
               static_cast<std::int64_t>(columns.size())};
  }
  Matrix expected(dtype, packed.n, skip + packed.k + gap), unpacked = expected;
  const void* data = packed.values.view().data;
  CHECK_OK(unpack_bitmap(data, packed.mask.data(), surplus, part_of(expected, skip, packed.k),
                         serial()));
  CHECK_OK(cuda::unpack_bitmap(data, packed.mask.data(), surplus, part_of(unpacked, skip, packed.k),
                               nullptr));
  CHECK(unpacked == expected);
}

void test_random(Random& random) {
  for (int i = 0; i < 120; ++i) {
    simt::reverse_order = i % 2 == 1;
    const DType dtype = testing::kAllDTypes[random.below(3)];
    const std::int64_t k =
        random.below(3) == 0 ? 8 * (1 + random.below(60)) : 1 + random.below(400);
    const std::int64_t skip = random.below(4) == 0, gap = random.below(2) * 8;
    Matrix weight(dtype, 1 + random.below(60), skip + k + gap);
    testing::fill_records(weight, random);
    if (random.below(3) == 0) {  // NaN, and rows that hold too much
      weight.set(random.below(weight.rows()), skip + random.below(k), NAN);
      for (std::int64_t r = random.below(weight.rows()); r < weight.rows(); r += 7) {
        for (std::int64_t c = 0; c < k; c += 1 + random.below(3)) weight.set(r, skip + c, 1);
      }
    }
    Bitmap packed = test_pack(weight, skip, k);
    test_unpack(packed, gap, skip, random.below(2));
  }
}

// Rows of tiles apart, as a caller with a small workspace unpacks them.
void test_some_rows(Random& random) {
  Matrix weight(DType::kBFloat16, 50, 264);
  testing::fill_records(weight, random);
  Bitmap packed = test_pack(weight, 0, 264);
  Matrix whole(DType::kBFloat16, 50, 264), parts = whole;
  CHECK_OK(cuda::unpack_bitmap(packed.values.view().data, packed.mask.data(), {}, whole.view(),
                               nullptr));
  for (std::int64_t first = 0; first < 50; first += 32) {
    const std::int64_t tile = first / kBitmapTileRows * bitmap_column_tiles(264);
    MatrixView rows = parts.view();
    rows.data = static_cast<char*>(rows.data) + first * 264 * 2;
    rows.rows = std::min<std::int64_t>(32, 50 - first);
    CHECK_OK(cuda::unpack_bitmap(
        static_cast<char*>(packed.values.view().data) + tile * kBitmapTileValues * 2,
        packed.mask.data() + tile * kBitmapTileMasks, {}, rows, nullptr));
  }
  CHECK(parts == whole);
}

// Columns fill all 16 bits; wider weights have no surplus.
void test_the_widest_surplus() {
  constexpr std::int64_t k = kMaxSurplusCols;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Bitmap packed(dtype, 3, k);
    std::fill(packed.mask.begin(), packed.mask.end(), static_cast<std::int32_t>(kEmptyRecord));
    test_unpack(packed, 0, 0, true);
  }
  Matrix weight(DType::kFloat16, 1, k + 1), value(DType::kFloat16, 1, 1);
  Bitmap packed(DType::kFloat16, 1, k + 1);
  std::int32_t rows[] = {0, 1};
  std::uint16_t column = 0;
  CHECK_INVALID(cuda::unpack_bitmap(packed.values.view().data, packed.mask.data(),
                                    {rows, &column, value.view().data, 1}, weight.view(), nullptr),
                "at most 65536 columns, got 65537");
}

// Masks with too few bits, and a surplus that points outside, do no harm.
void test_wrong_contents() {
  Bitmap packed(DType::kFloat16, 3, 40);
  std::fill(packed.mask.begin(), packed.mask.end(), 1);
  Matrix value(DType::kFloat16, 1, 1);
  std::int32_t rows[] = {-3, 9, 1, 1 << 30};
  std::uint16_t columns[] = {40};
  Matrix weight(DType::kFloat16, 3, 40, 48);
  CHECK_OK(cuda::unpack_bitmap(packed.values.view().data, packed.mask.data(),
                               {rows, columns, value.view().data, 1}, weight.view(), nullptr));
  CHECK(weight.get(2, 1) == 0);
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 24);
  Bitmap packed(DType::kFloat32, 2, 24);
  void* values = packed.values.view().data;
  CHECK_INVALID(cuda::pack_bitmap(weight.view(), values, nullptr, nullptr, nullptr), "mask is a");
  CHECK_INVALID(cuda::unpack_bitmap(nullptr, packed.mask.data(), {}, weight.view(), nullptr),
                "values is a null");
  CHECK_INVALID(cuda::pack_bitmap(weight.view(), static_cast<char*>(values) + 4, packed.mask.data(),
                                  nullptr, nullptr),
                "16 bytes");
  Matrix empty(DType::kFloat32, 0, 24);
  std::int32_t bad = 5;
  CHECK_OK(cuda::pack_bitmap(empty.view(), nullptr, nullptr, &bad, nullptr));
  CHECK(bad == -1);
}

}  // namespace
}  // namespace wanda_ext

int main() {
  wanda_ext::testing::Random random(16);
  wanda_ext::test_random(random);
  wanda_ext::test_some_rows(random);
  wanda_ext::test_the_widest_surplus();
  wanda_ext::test_wrong_contents();
  wanda_ext::test_bad_arguments();
  return wanda_ext::testing::finish();
}
