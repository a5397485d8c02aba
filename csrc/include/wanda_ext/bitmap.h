// The bitmap codec: how the non-zeros of 32 columns become a 32-bit mask and 16 values, and where a
// device wants them. Plain functions for host and device alike.
#pragma once

#include <cstdint>

#include "wanda_ext/host_device.h"

namespace wanda_ext {

// A record is 32 consecutive columns of one row: a mask with exactly 16 bits set (bit b: column b)
// and the 16 values there, the highest column first. 16:32 fits, and so do 2:4, 4:8 and 8:16, or
// any pattern of at most 16 non-zeros; spare bits carry +0.
constexpr int kRecordColumns = 32;
constexpr int kRecordValues = 16;
constexpr std::uint32_t kEmptyRecord = 0xffff0000u;  // of 32 zeros

// Records lie in tiles of 16 rows x 128 columns, the tiles of a matrix row by row. Of a tile, lane
// 4 * g + t of a warp owns the columns [32 * t, 32 * t + 32) of rows g and g + 8: it reads both of
// its masks at once and each record's values in two steps of 8, as all 32 lanes do side by side.
// One order only, in memory, in files and on devices: mask int32 [n16, k128, 64] and values
// [n16, k128, 1024]. Rows and columns that pad the last tiles are zeros.
constexpr int kBitmapTileRows = 16;
constexpr int kBitmapTileColumns = 128;
constexpr int kBitmapTileRecords = kBitmapTileColumns / kRecordColumns;  // of one row
constexpr int kBitmapTileMasks = kBitmapTileRows * kBitmapTileRecords;
constexpr int kBitmapTileValues = kBitmapTileMasks * kRecordValues;

WANDA_EXT_HOST_DEVICE constexpr std::int64_t bitmap_row_tiles(std::int64_t n) {
  return (n + kBitmapTileRows - 1) / kBitmapTileRows;
}
WANDA_EXT_HOST_DEVICE constexpr std::int64_t bitmap_column_tiles(std::int64_t k) {
  return (k + kBitmapTileColumns - 1) / kBitmapTileColumns;
}

// The lane that owns record `record` (0..3) of a row of the tile (0..15); row / 8 says which half.
WANDA_EXT_HOST_DEVICE constexpr int bitmap_lane(int row, int record) {
  return row % 8 * kBitmapTileRecords + record;
}
// In a tile: where the mask of a record is, and its value j.
WANDA_EXT_HOST_DEVICE constexpr int bitmap_mask_index(int row, int record) {
  return bitmap_lane(row, record) * 2 + row / 8;
}
WANDA_EXT_HOST_DEVICE constexpr int bitmap_value_index(int row, int record, int j) {
  return ((row / 8 * 2 + j / 8) * 32 + bitmap_lane(row, record)) * 8 + j % 8;
}

WANDA_EXT_HOST_DEVICE constexpr int count_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The 16 lowest set bits, or all where there are no more.
WANDA_EXT_HOST_DEVICE constexpr std::uint32_t lowest_16(std::uint32_t bits) {
  if (count_bits(bits) <= 16) return bits;
  int columns = 16;  // as many as hold no more than 16 set bits
  for (int step = 8; step > 0; step /= 2) {
    if (count_bits(bits & ((1u << (columns + step)) - 1)) <= 16) columns += step;
  }
  return bits & ((1u << columns) - 1);
}

// The mask of a record, from the bits of its non-zeros. With fewer than 16 the highest zero columns
// fill up; of more, the 16 lowest stay.
WANDA_EXT_HOST_DEVICE constexpr std::uint32_t bitmap_of(std::uint32_t nonzeros) {
  return lowest_16(nonzeros) | (~nonzeros & ~lowest_16(~nonzeros));
}

}  // namespace wanda_ext
