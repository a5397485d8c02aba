// The weight back from records of a mask and 16 values (bitmap.h), one tile of 16 rows and 128
// columns after the other, then the surplus of its rows.
#include "bitmap_registers.h"
#include "core/check_bitmap.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "surplus.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

template <typename Bits>
WANDA_EXT_INLINE void unpack_record(const Bits* values, std::uint32_t mask, Bits* weight) {
  Eight low, high;
  widen(values, low);
  widen(values + bitmap_value_index(0, 0, 8), high);
#pragma GCC unroll 4
  for (int byte = 0; byte < kBytesPerRecord; ++byte) {
    Eight columns;
    expand_byte(mask, byte, low, high, columns);
    narrow(columns, weight + 8 * byte);
  }
}

// One row of one tile, `cols` columns of it.
template <typename Bits>
WANDA_EXT_INLINE void unpack_tile_row(const Bits* values, const std::int32_t* mask, int row,
                                      std::int64_t cols, Bits* weight) {
  Bits padded[kBitmapTileColumns];
  Bits* columns = cols < kBitmapTileColumns ? padded : weight;
  for (int record = 0; record < kBitmapTileRecords; ++record) {
    unpack_record(values + bitmap_value_index(row, record, 0),
                  static_cast<std::uint32_t>(mask[bitmap_mask_index(row, record)]),
                  columns + record * kRecordColumns);
  }
  if (cols < kBitmapTileColumns) {
    for (std::int64_t c = 0; c < cols; ++c) weight[c] = padded[c];
  }
}

// Row tiles [begin, end).
template <typename Bits>
WANDA_EXT_INLINE void unpack_range(const Bits* values, const std::int32_t* mask,
                                   const Surplus& surplus, const MatrixView& weight,
                                   std::int64_t begin, std::int64_t end) {
  const std::int64_t tiles = bitmap_column_tiles(weight.cols);
  Bits* rows = static_cast<Bits*>(weight.data);
  for (std::int64_t tile = begin * tiles; tile < end * tiles; ++tile) {
    const std::int64_t first_row = tile / tiles * kBitmapTileRows;
    const std::int64_t first = tile % tiles * kBitmapTileColumns;
    for (int row = 0; row < kBitmapTileRows && first_row + row < weight.rows; ++row) {
      unpack_tile_row(values + tile * kBitmapTileValues, mask + tile * kBitmapTileMasks, row,
                      weight.cols - first, rows + (first_row + row) * weight.ld + first);
    }
  }
  if (surplus.rows == nullptr) return;
  for (std::int64_t r = begin * kBitmapTileRows; r < end * kBitmapTileRows && r < weight.rows;
       ++r) {
    for (std::int64_t i = surplus.rows[r]; i < surplus.rows[r + 1]; ++i) {
      rows[r * weight.ld + surplus.columns[i]] = static_cast<const Bits*>(surplus.values)[i];
    }
  }
}

WANDA_EXT_CLONES void unpack_range_any(const void* values, const std::int32_t* mask,
                                       const Surplus& surplus, const MatrixView& weight,
                                       std::int64_t begin, std::int64_t end) {
  if (weight.dtype == DType::kFloat32) {
    unpack_range(static_cast<const std::uint32_t*>(values), mask, surplus, weight, begin, end);
  } else {
    unpack_range(static_cast<const std::uint16_t*>(values), mask, surplus, weight, begin, end);
  }
}

}  // namespace

Status unpack_bitmap(const void* values, const std::int32_t* mask, const Surplus& surplus,
                     MatrixView weight, const ParallelFor& parallel) {
  const char* op = "unpack_bitmap";
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_bitmap(op, values, mask, weight.rows, weight.cols); !status.ok()) {
    return status;
  }
  if (Status status = check_surplus_entries(op, surplus, weight.rows, weight.cols, parallel);
      !status.ok()) {
    return status;
  }
  const std::int64_t row_tiles = weight.cols == 0 ? 0 : bitmap_row_tiles(weight.rows);
  for_each_range(parallel, row_tiles, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    unpack_range_any(values, mask, surplus, weight, begin, end);
  });
  return {};
}

}  // namespace wanda_ext
