// A weight as records of a mask and 16 values (bitmap.h). Elements are their bits: -0.0 counts as
// zero and NaN as non-zero, whatever the floating-point mode.
#include "bitmap_registers.h"
#include "core/check_bitmap.h"
#include "parallel_chunks.h"
#include "scores.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

// The 32 columns of a record widened, any zero as +0, and which are not zero.
template <typename Bits>
WANDA_EXT_INLINE std::uint32_t load_record(const Bits* weight, std::int32_t* columns) {
  std::uint32_t nonzeros = 0;
  for (int c = 0; c < kRecordColumns; ++c) {
    const bool nonzero = static_cast<Bits>(weight[c] << 1) != 0;
    columns[c] = static_cast<std::int32_t>(nonzero ? weight[c] : 0);
    nonzeros |= static_cast<std::uint32_t>(nonzero) << c;
  }
  return nonzeros;
}

// Writes one record; returns whether it has more than 16 non-zeros.
template <typename Bits>
WANDA_EXT_INLINE bool pack_record(const Bits* weight, Bits* values, std::int32_t* mask) {
  std::int32_t columns[kRecordColumns];
  const std::uint32_t nonzeros = load_record(weight, columns);
  const int count = count_bits(nonzeros);
  const std::uint32_t kept = count == kRecordValues ? nonzeros : bitmap_of(nonzeros);
  std::int32_t wide[kRecordValues + 8];
  compress_record(kept, columns, wide);
  for (int j = 0; j < 8; ++j) values[j] = static_cast<Bits>(wide[j]);
  Bits* high = values + bitmap_value_index(0, 0, 8);
  for (int j = 0; j < 8; ++j) high[j] = static_cast<Bits>(wide[8 + j]);
  *mask = static_cast<std::int32_t>(kept);
  return count > kRecordValues;
}

// One row of one tile, `cols` columns of it; returns whether a record has more than 16 non-zeros.
template <typename Bits>
WANDA_EXT_INLINE bool pack_tile_row(const Bits* weight, std::int64_t cols, int row, Bits* values,
                                    std::int32_t* mask) {
  Bits padded[kBitmapTileColumns];
  if (cols < kBitmapTileColumns) {
    for (std::int64_t c = 0; c < kBitmapTileColumns; ++c) padded[c] = c < cols ? weight[c] : 0;
    weight = padded;
  }
  bool overfull = false;
  for (int record = 0; record < kBitmapTileRecords; ++record) {
    overfull |=
        pack_record(weight + record * kRecordColumns, values + bitmap_value_index(row, record, 0),
                    mask + bitmap_mask_index(row, record));
  }
  return overfull;
}

// Row tiles [begin, end); returns the first bad row, or the rows of the weight.
template <typename Bits>
WANDA_EXT_INLINE std::int64_t pack_range(const ConstMatrixView& weight, Bits* values,
                                         std::int32_t* mask, std::int64_t begin, std::int64_t end) {
  const std::int64_t tiles = bitmap_column_tiles(weight.cols);
  std::int64_t first_bad = weight.rows;
  for (std::int64_t tile = begin * tiles; tile < end * tiles; ++tile) {
    const std::int64_t first_row = tile / tiles * kBitmapTileRows;
    const std::int64_t first = tile % tiles * kBitmapTileColumns;
    for (int row = 0; row < kBitmapTileRows; ++row) {
      const std::int64_t r = first_row + row;
      const bool inside = r < weight.rows;
      const Bits* columns = static_cast<const Bits*>(weight.data) + (inside ? r : 0) * weight.ld;
      const bool overfull =
          pack_tile_row(columns + first, inside ? weight.cols - first : 0, row,
                        values + tile * kBitmapTileValues, mask + tile * kBitmapTileMasks);
      first_bad = overfull && r < first_bad ? r : first_bad;
    }
  }
  return first_bad;
}

WANDA_EXT_CLONES std::int64_t pack_range_any(const ConstMatrixView& weight, void* values,
                                             std::int32_t* mask, std::int64_t begin,
                                             std::int64_t end) {
  if (weight.dtype == DType::kFloat32) {
    return pack_range(weight, static_cast<std::uint32_t*>(values), mask, begin, end);
  }
  return pack_range(weight, static_cast<std::uint16_t*>(values), mask, begin, end);
}

}  // namespace

Status pack_bitmap(ConstMatrixView weight, void* values, std::int32_t* mask, std::int32_t* bad,
                   const ParallelFor& parallel) {
  if (Status status = check_matrix("pack_bitmap", "weight", weight); !status.ok()) return status;
  if (Status status = check_bitmap("pack_bitmap", values, mask, weight.rows, weight.cols);
      !status.ok()) {
    return status;
  }
  FirstBadRow first_bad;
  const std::int64_t row_tiles = weight.cols == 0 ? 0 : bitmap_row_tiles(weight.rows);
  for_each_range(parallel, row_tiles, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    const std::int64_t row = pack_range_any(weight, values, mask, begin, end);
    if (row < weight.rows) first_bad.report(row);
  });
  if (bad != nullptr) *bad = first_bad.row();
  return {};
}

}  // namespace wanda_ext
