// The 2:4 codec: how two kept columns of four become a nibble, four nibbles an int16, and where a
// device wants that int16. Plain functions for host and device alike.
#pragma once

#include <cstdint>

#include "wanda_ext/host_device.h"

namespace wanda_ext {

// A packed 2:4 matrix W[n,k] is values[n,k/2], row-major, and meta[n,k/16]: one 16-bit word for 16
// columns of a row, lowest nibble first. A nibble holds the two kept columns of a group of four,
// low | high << 2, with low < high always.
constexpr int kColumnsPerMeta = 16;
constexpr std::uint16_t kPaddingMeta = 0x4444;  // columns 0 and 1 of every group

// Where the 16-bit words lie. Canonical is row-major [n,k/16] and the only order on disk; a device
// order is a permutation of the same words after padding n and k.
enum class MetaOrder : int { kCanonical = 0, kSm80 = 80, kSm90 = 90 };

WANDA_EXT_HOST_DEVICE constexpr bool is_meta_order(int order) {
  return order == 0 || order == 80 || order == 90;
}

// Padded size of each order: sm80 tiles are 32 x 32, sm90 atoms 64 x 128 (TileK >= 128, 16-bit
// values), of rows x columns of W.
WANDA_EXT_HOST_DEVICE constexpr std::int64_t padded_rows_24(MetaOrder order, std::int64_t n) {
  return order == MetaOrder::kSm80   ? (n + 31) / 32 * 32
         : order == MetaOrder::kSm90 ? (n + 63) / 64 * 64
                                     : n;
}
WANDA_EXT_HOST_DEVICE constexpr std::int64_t padded_cols_24(MetaOrder order, std::int64_t k) {
  return order == MetaOrder::kSm80   ? (k + 31) / 32 * 32
         : order == MetaOrder::kSm90 ? (k + 127) / 128 * 128
                                     : k;
}

// Index, in 16-bit words, of the word for row `row` and columns [16 * word, 16 * word + 16): the
// sum of a part for the row and a part for the columns, in every order. `rows` and `cols` are the
// padded sizes. Both device orders pair row r (low half of a 32-bit word) with row r + 8 (high
// half), so that one load feeds one mma.sp lane.
WANDA_EXT_HOST_DEVICE constexpr std::int64_t meta_row_24(MetaOrder order, std::int64_t row,
                                                         std::int64_t cols) {
  return order == MetaOrder::kSm80 ? row / 32 * 64 + row % 8 * 8 + row % 32 / 16 * 4 + row % 16 / 8
         : order == MetaOrder::kSm90
             ? row / 64 * 512 + row % 64 / 16 * 128 + row % 8 * 8 + row % 16 / 8
             : row * (cols / kColumnsPerMeta);
}
WANDA_EXT_HOST_DEVICE constexpr std::int64_t meta_word_24(MetaOrder order, std::int64_t word,
                                                          std::int64_t rows) {
  return order == MetaOrder::kSm80   ? word / 2 * 2 * rows + word % 2 * 2
         : order == MetaOrder::kSm90 ? word / 8 * 8 * rows + word % 2 * 64 + word % 8 / 2 * 2
                                     : word;
}
WANDA_EXT_HOST_DEVICE constexpr std::int64_t meta_index_24(MetaOrder order, std::int64_t row,
                                                           std::int64_t word, std::int64_t rows,
                                                           std::int64_t cols) {
  return meta_row_24(order, row, cols) + meta_word_24(order, word, rows);
}

// The kept columns of one group of four, from the bits of its non-zeros (bit i: column i). With
// fewer than two non-zeros the highest zero columns fill up; with more, the two lowest stay.
WANDA_EXT_HOST_DEVICE constexpr unsigned nibble_24(unsigned nonzeros) {
  const unsigned low = (nonzeros & 1) ? 0 : (nonzeros & 2) ? 1 : 2;
  const unsigned high = (nonzeros & 3) == 3 ? 1 : (nonzeros & 3) && (nonzeros & 4) ? 2 : 3;
  return low | high << 2;
}

}  // namespace wanda_ext
