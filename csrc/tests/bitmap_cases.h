// What the tests of the bitmap ops share: weights with given non-zeros, packed by plain loops.
#pragma once

#include <vector>

#include "check.h"
#include "wanda_ext/bitmap.h"

namespace wanda_ext::testing {

// A packed weight, packed record by record from the codec's words.
struct Bitmap {
  std::int64_t n, k;
  Matrix values;
  std::vector<std::int32_t> mask;
  std::int32_t bad = -7;

  Bitmap(DType dtype, std::int64_t n, std::int64_t k)
      : n(n),
        k(k),
        values(dtype, bitmap_row_tiles(n) * bitmap_column_tiles(k), kBitmapTileValues),
        mask(static_cast<std::size_t>(values.rows() * kBitmapTileMasks), 0x5a5a5a5a) {}

  bool operator==(const Bitmap& other) const {
    return values == other.values && mask == other.mask && bad == other.bad;
  }
};

// The 16 columns a record keeps, by the words of the contract.
inline std::uint32_t kept_columns(std::uint32_t nonzeros) {
  int count = 0;
  std::uint32_t kept = 0;
  for (int b = 0; b < 32 && count < 16; ++b) {
    if (nonzeros >> b & 1) kept |= 1u << b, ++count;
  }
  for (int b = 31; b >= 0 && count < 16; --b) {
    if (!(kept >> b & 1)) kept |= 1u << b, ++count;
  }
  return kept;
}

inline Bitmap pack_by_hand(const Matrix& weight) {
  Bitmap packed(weight.dtype(), weight.rows(), weight.cols());
  packed.bad = -1;
  const std::int64_t tiles = bitmap_column_tiles(packed.k);
  for (std::int64_t tile = 0; tile < packed.values.rows(); ++tile) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int h = 0; h < 2; ++h) {
        const std::int64_t r = tile / tiles * 16 + lane / 4 + 8 * h;
        const std::int64_t first = tile % tiles * 128 + lane % 4 * 32;
        const auto at = [&](std::int64_t b) {
          return r < packed.n && first + b < packed.k ? weight.get(r, first + b) : 0.0f;
        };
        std::uint32_t nonzeros = 0;
        for (int b = 0; b < 32; ++b) nonzeros |= (at(b) != 0 ? 1u : 0u) << b;  // NaN != 0
        const std::uint32_t kept = kept_columns(nonzeros);
        const bool overfull = (nonzeros & ~kept) != 0;
        if (overfull && (packed.bad == -1 || r < packed.bad)) {
          packed.bad = static_cast<std::int32_t>(r);
        }
        packed.mask[static_cast<std::size_t>(tile * 64 + 2 * lane + h)] =
            static_cast<std::int32_t>(kept);
        int j = 0;
        for (int b = 31; b >= 0; --b) {
          if (!(kept >> b & 1)) continue;
          const float value = at(b);
          packed.values.set(tile, ((2 * h + j / 8) * 32 + lane) * 8 + j % 8,
                            value == 0 ? 0.0f : value);
          ++j;
        }
      }
    }
  }
  return packed;
}

// Each record gets `nonzeros` non-zeros, or 0 to 16 of them at random where it is negative; the
// other elements are +0 and -0.
inline void fill_records(Matrix& weight, Random& random, int nonzeros = -1) {
  for (std::int64_t r = 0; r < weight.rows(); ++r) {
    for (std::int64_t first = 0; first < weight.cols(); first += 32) {
      auto left = nonzeros < 0 ? random.below(17) : nonzeros;
      for (std::int64_t c = first; c < first + 32 && c < weight.cols(); ++c) {
        const bool kept = random.below(first + 32 - c) < left;
        left -= kept;
        const float zero = random.below(2) == 0 ? 0.0f : -0.0f;
        weight.set(r, c, kept ? std::copysign(0.125f, random.uniform()) + random.uniform() : zero);
      }
    }
  }
}

}  // namespace wanda_ext::testing
