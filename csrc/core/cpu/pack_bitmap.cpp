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
  constexpr int kSign = 33 - 8 * static_cast<int>(sizeof(Bits));  // shifts the sign out
  const Eight bit = {1, 2, 4, 8, 16, 32, 64, 128};
  Eight bits = {};
#pragma GCC unroll 4
  for (int byte = 0; byte < kBytesPerRecord; ++byte) {
    Eight eight;
    widen(weight + 8 * byte, eight);
    const Eight nonzero = (eight << kSign) != 0;  // -1 where true
    eight &= nonzero;
    std::memcpy(columns + 8 * byte, &eight, sizeof(eight));
    bits |= (nonzero & bit) << (8 * byte);
  }
  std::uint64_t pairs[4];
  std::memcpy(pairs, &bits, sizeof(bits));
  const std::uint64_t pair = (pairs[0] | pairs[1]) | (pairs[2] | pairs[3]);
  return static_cast<std::uint32_t>(pair | pair >> 32);
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
  // The values are read back when all records are written, or each read would wait for its writes.
  std::int32_t wide[kBitmapTileRecords][kRecordValues + 8];
  bool overfull = false;
#pragma GCC unroll 4
  for (int record = 0; record < kBitmapTileRecords; ++record) {
    std::int32_t columns[kRecordColumns];
    const std::uint32_t nonzeros = load_record(weight + record * kRecordColumns, columns);
    const int count = count_bits(nonzeros);
    const std::uint32_t kept = count == kRecordValues ? nonzeros : bitmap_of(nonzeros);
    compress_record(kept, columns, wide[record]);
    mask[bitmap_mask_index(row, record)] = static_cast<std::int32_t>(kept);
    overfull |= count > kRecordValues;
  }
#pragma GCC unroll 4
  for (int record = 0; record < kBitmapTileRecords; ++record) {
    Eight low, high;
    std::memcpy(&low, wide[record], sizeof(low));
    std::memcpy(&high, wide[record] + 8, sizeof(high));
    narrow(low, values + bitmap_value_index(row, record, 0));
    narrow(high, values + bitmap_value_index(row, record, 8));
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
