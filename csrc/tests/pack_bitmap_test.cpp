// pack_bitmap and unpack_bitmap against the codec, one record at a time, and against each other.
#include "bitmap_cases.h"
#include "check.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

using testing::Bitmap;
using testing::fill_records;
using testing::Matrix;
using testing::pack_by_hand;
using testing::Random;

Bitmap pack(Matrix& weight, int threads) {
  Bitmap packed(weight.dtype(), weight.rows(), weight.cols());
  CHECK_OK(pack_bitmap(weight.view(), packed.values.view().data, packed.mask.data(), &packed.bad,
                       std_threads(threads)));
  return packed;
}

Matrix without_negative_zeros(Matrix weight) {
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    for (std::int64_t c = 0; c < weight.cols(); ++c) {
      if (weight.get(r, c) == 0) weight.set(r, c, 0.0f);
    }
  }
  return weight;
}

void test_round_trip(DType dtype, std::int64_t n, std::int64_t k, int nonzeros) {
  Random random(static_cast<std::uint64_t>(n * 1000 + k + nonzeros));
  Matrix weight(dtype, n, k, k + 3);
  fill_records(weight, random, nonzeros);
  const Bitmap expected = pack_by_hand(weight);
  CHECK(expected.bad == -1);
  const Matrix plain = without_negative_zeros(weight);
  for (int threads : {1, 3}) {
    Bitmap packed = pack(weight, threads);
    CHECK(packed == expected);
    Matrix unpacked(dtype, n, k, k + 3);
    CHECK_OK(unpack_bitmap(packed.values.view().data, packed.mask.data(), {}, unpacked.view(),
                           std_threads(threads)));
    CHECK(unpacked == plain);
  }
}

// Any number of non-zeros: of those above 16 the lowest columns stay.
void test_overfull(DType dtype) {
  Random random(9);
  for (int nonzeros : {17, 20, 32}) {
    Matrix weight(dtype, 40, 96);
    fill_records(weight, random);
    Matrix row(dtype, 1, 96);
    for (std::int64_t r : {37, 18}) {
      fill_records(row, random, nonzeros);
      for (std::int64_t c = 0; c < 32; ++c) weight.set(r, 64 + c, row.get(0, c));
    }
    CHECK(pack_by_hand(weight).bad == 18);
    CHECK(pack(weight, 1) == pack_by_hand(weight));
    CHECK(pack(weight, 2) == pack_by_hand(weight));
  }
}

void test_values_that_are_not_numbers(DType dtype) {
  const float smallest[] = {1e-45f, 1e-40f, 0x1p-24f};
  Matrix weight(dtype, 1, 40);
  for (std::int64_t c = 0; c < 40; ++c) weight.set(0, c, 0.0f);
  weight.set(0, 3, NAN);
  weight.set(0, 4, -INFINITY);
  weight.set(0, 5, smallest[static_cast<int>(dtype)]);
  weight.set(0, 39, -smallest[static_cast<int>(dtype)]);
  Bitmap packed = pack(weight, 1);
  CHECK(packed.bad == -1);
  CHECK((packed.mask[0] & 0xff) == 0x38 && packed.mask[2] >> 7 & 1);
  Matrix unpacked(dtype, 1, 40);
  CHECK_OK(
      unpack_bitmap(packed.values.view().data, packed.mask.data(), {}, unpacked.view(), serial()));
  CHECK(unpacked == weight);
}

// Rows of a matrix one tile at a time, each with its part of the surplus.
void test_surplus(DType dtype) {
  Random random(4);
  Matrix weight(dtype, 37, 130), body(dtype, 37, 130), values(dtype, 1, 37 * 3);
  fill_records(body, random);
  body = without_negative_zeros(body);
  weight = body;
  std::vector<std::int32_t> rows = {0};
  std::vector<std::uint16_t> columns;
  for (std::int64_t r = 0; r < 37; ++r) {
    for (std::int64_t c = r % 5 == 0 ? 130 : 0; c < 130; c += 50) {  // some rows have none
      if (weight.get(r, c) != 0) continue;
      weight.set(r, c, 2.0f);
      values.set(0, static_cast<std::int64_t>(columns.size()), 2.0f);
      columns.push_back(static_cast<std::uint16_t>(c));
    }
    rows.push_back(static_cast<std::int32_t>(columns.size()));
  }
  CHECK(columns.size() > 20);
  Bitmap packed = pack(body, 1);
  Surplus surplus = {rows.data(), columns.data(), values.view().data,
                     static_cast<std::int64_t>(columns.size())};
  Matrix unpacked(dtype, 37, 130);
  MatrixView view = unpacked.view();
  for (int threads : {1, 2}) {
    unpacked = Matrix(dtype, 37, 130);
    view = unpacked.view();
    CHECK_OK(unpack_bitmap(packed.values.view().data, packed.mask.data(), surplus, view,
                           std_threads(threads)));
    CHECK(unpacked == weight);
  }
  unpacked = Matrix(dtype, 37, 130);
  view = unpacked.view();
  for (std::int64_t first = 0; first < 37; first += 16) {
    const std::int64_t tile = first / 16 * bitmap_column_tiles(130);
    Surplus part = surplus;
    part.rows += first;
    MatrixView some = view;
    some.rows = std::min<std::int64_t>(16, 37 - first);
    some.data =
        static_cast<char*>(view.data) + static_cast<std::size_t>(first * view.ld) * size_of(dtype);
    const char* at = static_cast<const char*>(packed.values.view().data) +
                     static_cast<std::size_t>(tile * kBitmapTileValues) * size_of(dtype);
    CHECK_OK(unpack_bitmap(at, packed.mask.data() + tile * kBitmapTileMasks, part, some, serial()));
  }
  CHECK(unpacked == weight);

  const auto refused = [&](const Surplus& wrong) {
    return unpack_bitmap(packed.values.view().data, packed.mask.data(), wrong, view, serial());
  };
  columns[5] = 130;
  CHECK_INVALID(refused(surplus), "columns of a surplus must be in [0, 130)");
  columns[5] = 0xffff;
  CHECK_INVALID(refused(surplus), "columns of a surplus");
  rows[9] = -1;
  CHECK_INVALID(refused(surplus), "ascend from 0 to its count");
  --surplus.count;
  rows[9] = rows[8];
  CHECK_INVALID(refused(surplus), "ascend from 0 to its count");
  surplus.columns = nullptr;
  CHECK_INVALID(refused(surplus), "null pointer");
}

// Columns fill all 16 bits; wider weights have no surplus.
void test_the_widest_surplus(DType dtype) {
  constexpr std::int64_t k = kMaxSurplusCols;
  Matrix weight(dtype, 2, k + 1), values(dtype, 1, 4);
  Random random(5);
  fill_records(weight, random, 3);
  weight = without_negative_zeros(weight);
  MatrixView view = weight.view();
  view.cols = k;
  Bitmap packed(dtype, 2, k);
  CHECK_OK(pack_bitmap(view, packed.values.view().data, packed.mask.data(), nullptr, serial()));
  const std::int32_t rows[] = {0, 1, 4};
  const std::uint16_t columns[] = {40000, 32767, 32768, 65535};
  for (std::int64_t i = 0; i < 4; ++i) {
    values.set(0, i, 2.0f + static_cast<float>(i));
    weight.set(i > 0, columns[i], 2.0f + static_cast<float>(i));
  }
  const Surplus surplus = {rows, columns, values.view().data, 4};
  Matrix unpacked = weight;
  for (std::int64_t c = 0; c < k; ++c) unpacked.set(0, c, NAN), unpacked.set(1, c, NAN);
  MatrixView to = unpacked.view();
  to.cols = k;
  CHECK_OK(unpack_bitmap(packed.values.view().data, packed.mask.data(), surplus, to, serial()));
  CHECK(unpacked == weight);
  Bitmap wide(dtype, 2, k + 1);
  CHECK_INVALID(
      unpack_bitmap(wide.values.view().data, wide.mask.data(), surplus, unpacked.view(), serial()),
      "at most 65536 columns, got 65537");
}

// What a mask with any number of bits makes of a weight is not said, but it stays inside.
void test_damaged_masks() {
  Matrix weight(DType::kFloat16, 16, 128);
  Random random(2);
  fill_records(weight, random, 16);
  Bitmap packed = pack(weight, 1);
  for (std::size_t i = 0; i < packed.mask.size(); ++i) {
    packed.mask[i] = i % 2 == 0 ? -1 : static_cast<std::int32_t>(i);
  }
  Matrix unpacked(DType::kFloat16, 16, 128, 131);
  const Matrix before = unpacked;
  CHECK_OK(
      unpack_bitmap(packed.values.view().data, packed.mask.data(), {}, unpacked.view(), serial()));
  CHECK(!(unpacked == before));
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 40);
  Bitmap packed(DType::kFloat32, 2, 40);
  void* values = packed.values.view().data;
  std::int32_t* mask = packed.mask.data();
  MatrixView view = weight.view();
  CHECK_INVALID(pack_bitmap(view, nullptr, mask, nullptr, serial()), "values is a null pointer");
  CHECK_INVALID(unpack_bitmap(values, nullptr, {}, view, serial()), "mask is a null pointer");
  view.dtype = static_cast<DType>(5);
  CHECK_INVALID(pack_bitmap(view, values, mask, nullptr, serial()), "dtype code 5");
  CHECK_INVALID(unpack_bitmap(values, mask, {}, view, serial()), "dtype code 5");
  std::int32_t bad = 3;
  CHECK_OK(pack_bitmap({nullptr, 0, 16, 16, DType::kFloat16}, nullptr, nullptr, &bad, serial()));
  CHECK(bad == -1);
  const MatrixView empty = {nullptr, 5, 0, 7, DType::kFloat32};
  CHECK_OK(pack_bitmap(empty, nullptr, nullptr, nullptr, serial()));
  CHECK_OK(unpack_bitmap(nullptr, nullptr, {}, empty, serial()));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (DType dtype : testing::kAllDTypes) {
    for (int nonzeros = 0; nonzeros <= 16; ++nonzeros) test_round_trip(dtype, 17, 160, nonzeros);
    for (std::int64_t n : {1, 16, 67}) {
      for (std::int64_t k : {1, 31, 32, 33, 127, 128, 129, 1000}) {
        test_round_trip(dtype, n, k, -1);
      }
    }
    test_overfull(dtype);
    test_values_that_are_not_numbers(dtype);
    test_surplus(dtype);
    test_the_widest_surplus(dtype);
  }
  test_damaged_masks();
  test_bad_arguments();
  return testing::finish();
}
