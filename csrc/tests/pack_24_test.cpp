// pack_24 and unpack_24 against the codec, one group at a time, and against each other.
#include "check.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

using testing::Matrix;
using testing::Random;

struct Packed {
  Matrix values;
  std::vector<std::int16_t> meta;
  std::int32_t bad = -7;

  Packed(DType dtype, std::int64_t n, std::int64_t k)
      : values(dtype, n, k / 2), meta(static_cast<std::size_t>(n * k / kColumnsPerMeta), 0x5a5a) {}

  bool operator==(const Packed& other) const {
    return values == other.values && meta == other.meta && bad == other.bad;
  }
};

int count_nonzeros(const Matrix& weight, std::int64_t r, std::int64_t first) {
  int count = 0;
  for (std::int64_t i = 0; i < 4; ++i) count += weight.get(r, first + i) != 0;  // NaN != 0
  return count;
}

Packed pack_by_hand(const Matrix& weight) {
  Packed packed(weight.dtype(), weight.rows(), weight.cols());
  const std::int64_t words = weight.cols() / kColumnsPerMeta;
  packed.bad = -1;
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    bool overfull = false;
    for (std::int64_t c = 0; c < weight.cols(); c += 4) {
      overfull |= count_nonzeros(weight, r, c) > 2;
    }
    if (overfull && packed.bad == -1) packed.bad = static_cast<std::int32_t>(r);
    for (std::int64_t w = 0; w < words; ++w) {
      unsigned word = 0;
      for (int g = 0; g < 4; ++g) {
        const std::int64_t first = w * 16 + g * 4;
        unsigned nonzeros = 0;
        for (int i = 0; i < 4 && !overfull; ++i) {
          nonzeros |= (weight.get(r, first + i) != 0 ? 1u : 0u) << i;
        }
        const unsigned nibble = nibble_24(nonzeros);
        word |= nibble << (4 * g);
        for (int i = 0; i < 2; ++i) {
          const std::int64_t c = first + (i == 0 ? nibble & 3 : nibble >> 2);
          const float value = overfull ? 0.0f : weight.get(r, c);
          packed.values.set(r, first / 2 + i, value == 0 ? 0.0f : value);
        }
      }
      packed.meta[static_cast<std::size_t>(r * words + w)] = static_cast<std::int16_t>(word);
    }
  }
  return packed;
}

Packed pack(Matrix& weight, const ParallelFor& parallel) {
  Packed packed(weight.dtype(), weight.rows(), weight.cols());
  CHECK_OK(
      pack_24(weight.view(), packed.values.view().data, packed.meta.data(), &packed.bad, parallel));
  return packed;
}

// A 2:4 weight: two columns of each group, either of which may be zero.
void fill_24(Matrix& weight, Random& random) {
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    for (std::int64_t c = 0; c < weight.cols(); c += 4) {
      for (int i = 0; i < 4; ++i) weight.set(r, c + i, 0.0f);
      for (int i = 0; i < 2; ++i) {
        weight.set(r, c + random.below(4), random.below(8) == 0 ? 0.0f : random.uniform());
      }
    }
  }
}

void test_against_codec(Matrix& weight) {
  const Packed expected = pack_by_hand(weight);
  for (int threads : {1, 3}) CHECK(pack(weight, std_threads(threads)) == expected);
}

// Every pattern of +0, -0 and a non-zero in a group; those with three non-zeros fill rows of their
// own.
void test_patterns(DType dtype) {
  const float values[] = {0.0f, -0.0f, -1.5f};
  Matrix weight(dtype, 81, 16, 19);
  for (std::int64_t pattern = 0; pattern < 81; ++pattern) {
    for (std::int64_t c = 0; c < 16; ++c) weight.set(pattern, c, 0.0f);
    std::int64_t rest = pattern;
    for (std::int64_t i = 0; i < 4; ++i, rest /= 3) {
      weight.set(pattern, pattern % 4 * 4 + i, values[rest % 3]);
    }
  }
  test_against_codec(weight);
}

void test_round_trip(DType dtype, std::int64_t n, std::int64_t k) {
  Random random(static_cast<std::uint64_t>(n * 1000 + k));
  Matrix weight(dtype, n, k, k + 3);
  fill_24(weight, random);
  if (n > 1) weight.set(1, k - 1, 0.0f), weight.set(1, k - 4, 0.0f);
  test_against_codec(weight);
  const Packed packed = pack(weight, serial());
  CHECK(packed.bad == -1);
  for (MetaOrder order : {MetaOrder::kCanonical, MetaOrder::kSm80, MetaOrder::kSm90}) {
    const std::int64_t rows = padded_rows_24(order, n);
    const std::int64_t cols = padded_cols_24(order, k);
    std::vector<std::int16_t> meta(static_cast<std::size_t>(rows * cols / kColumnsPerMeta));
    CHECK_OK(order_meta_24(packed.meta.data(), MetaOrder::kCanonical, meta.data(), order, n, k,
                           serial()));
    for (int threads : {1, 3}) {
      Matrix unpacked(dtype, n, k, k + 3);
      Packed copy = packed;
      CHECK_OK(unpack_24(copy.values.view().data, meta.data(), order, unpacked.view(),
                         std_threads(threads)));
      CHECK(unpacked == weight);
    }
  }
}

void test_bad_rows(DType dtype) {
  Random random(3);
  Matrix weight(dtype, 9, 1040);
  fill_24(weight, random);
  for (int i = 0; i < 4; ++i) weight.set(7, 1036 + i, 1.0f);
  for (int i = 1; i < 4; ++i) weight.set(4, i, -1.0f);
  weight.set(2, 4, NAN), weight.set(2, 5, INFINITY), weight.set(2, 6, 0.0f), weight.set(2, 7, 0.0f);
  test_against_codec(weight);
  Packed packed = pack(weight, std_threads(2));
  CHECK(packed.bad == 4);
  CHECK(std::isnan(packed.values.get(2, 2)) && std::isinf(packed.values.get(2, 3)));
  Matrix unpacked(dtype, 9, 1040);
  CHECK_OK(unpack_24(packed.values.view().data, packed.meta.data(), MetaOrder::kCanonical,
                     unpacked.view(), serial()));
  for (std::int64_t c = 0; c < 1040; ++c) CHECK(unpacked.get(4, c) == 0 && unpacked.get(7, c) == 0);
  CHECK_OK(
      pack_24(weight.view(), packed.values.view().data, packed.meta.data(), nullptr, serial()));
}

// The smallest denormals are non-zero.
void test_denormals(DType dtype) {
  const float smallest[] = {1e-45f, 1e-40f, 0x1p-24f};
  Matrix weight(dtype, 1, 16);
  for (std::int64_t c = 0; c < 16; ++c) {
    weight.set(0, c, c % 4 < 2 ? smallest[static_cast<int>(dtype)] : 0.0f);
  }
  const Packed packed = pack(weight, serial());
  CHECK(packed.meta[0] == static_cast<std::int16_t>(kPaddingMeta));
  CHECK(packed.values.get(0, 0) != 0);
}

void test_bad_arguments() {
  Matrix weight(DType::kFloat32, 2, 24, 32);
  Matrix values(DType::kFloat32, 2, 16);
  std::int16_t meta[4] = {};
  void* data = values.view().data;
  CHECK_INVALID(pack_24(weight.view(), data, meta, nullptr, serial()), "multiple of 16, got 24");
  CHECK_INVALID(unpack_24(data, meta, MetaOrder::kSm80, weight.view(), serial()), "got 24");
  MatrixView view = weight.view();
  view.cols = 32;
  CHECK_INVALID(pack_24(view, nullptr, meta, nullptr, serial()), "values is a null pointer");
  CHECK_INVALID(unpack_24(data, nullptr, MetaOrder::kCanonical, view, serial()), "meta is a null");
  CHECK_INVALID(unpack_24(data, meta, static_cast<MetaOrder>(70), view, serial()), "got 70");
  view.dtype = static_cast<DType>(5);
  CHECK_INVALID(pack_24(view, data, meta, nullptr, serial()), "dtype code 5");
  std::int32_t bad = 3;
  CHECK_OK(pack_24({nullptr, 0, 16, 16, DType::kFloat16}, nullptr, nullptr, &bad, serial()));
  CHECK(bad == -1);
  const MatrixView empty = {nullptr, 5, 0, 7, DType::kFloat32};
  CHECK_OK(pack_24(empty, nullptr, nullptr, &bad, serial()));
  CHECK_OK(unpack_24(nullptr, nullptr, MetaOrder::kSm80, empty, serial()));
}

}  // namespace
}  // namespace wanda_ext

int main() {
  using namespace wanda_ext;
  for (DType dtype : testing::kAllDTypes) {
    test_patterns(dtype);
    for (std::int64_t n : {1, 2, 5, 67}) {
      for (std::int64_t k : {16, 48, 144, 1040, 2064}) test_round_trip(dtype, n, k);
    }
    test_bad_rows(dtype);
    test_denormals(dtype);
  }
  test_bad_arguments();
  return testing::finish();
}
