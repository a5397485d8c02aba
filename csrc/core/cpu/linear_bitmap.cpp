// y = x W^T (+ bias), W packed as a bitmap, with its surplus.
//
// For a few tokens, a record is spread to its 32 columns in registers and multiplied as it stands,
// zeros too, for that costs less than to gather x: lane c % 8 adds up the products of column c, in
// order, over each chunk of kColumnsPerChunk columns. The chunks' sums add up as linear_panels.h
// says, and so do the surplus and the bias. For more tokens only the 16 values of a record are
// multiplied, dealt to the lanes in order: linear_panels.h.
//
// workspace: x in fp32, all of it for a few tokens, else kTokensPerBlock tokens of it; a Tile for
// each thread.
#include <cstring>

#include "bitmap_registers.h"
#include "core/check_bitmap.h"
#include "dtype.h"
#include "linear_panels.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "surplus.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr int kTilesPerChunk = kColumnsPerChunk / kBitmapTileColumns;
constexpr int kHighValues = bitmap_value_index(0, 0, 8);  // where the last 8 of a record are

// Eight elements in fp32.
template <typename T>
WANDA_EXT_INLINE void widen_8(const T* from, float* to) {
  for (int i = 0; i < 8; ++i) to[i] = to_float(from[i]);
}
template <>
WANDA_EXT_INLINE void widen_8(const BFloat16* from, float* to) {
  Eight wide;
  widen(&from->bits, wide);
  wide <<= 16;
  std::memcpy(to, &wide, sizeof(wide));
}

// The 16 values of a record.
template <typename T>
WANDA_EXT_INLINE void widen_record(const T* from, float* to) {
  widen_8(from, to);
  widen_8(from + kHighValues, to + 8);
}

// Asks for the same record a chunk further on: a row goes from tile to tile in pieces of 64 bytes,
// which the hardware does not foresee. Past the end it does nothing.
template <typename T>
WANDA_EXT_INLINE void prefetch_record(const T* from) {
  __builtin_prefetch(from + kTilesPerChunk * kBitmapTileValues);
  __builtin_prefetch(from + kTilesPerChunk * kBitmapTileValues + kHighValues);
}

struct Call : Product {
  const void* values;
  const std::int32_t* mask;

  std::int64_t tiles_of_row() const { return bitmap_column_tiles(x.cols); }

  // Columns [first, first + count) of a row, no more than a chunk.
  template <typename T>
  WANDA_EXT_INLINE void expand(std::int64_t row, std::int64_t first, std::int64_t count,
                               Kept& kept) const {
    for (std::int64_t c = 0; c < count; c += kRecordColumns) {
      const std::int64_t tile =
          row / kBitmapTileRows * tiles_of_row() + (first + c) / kBitmapTileColumns;
      const auto record = static_cast<int>(c % kBitmapTileColumns / kRecordColumns);
      const auto tile_row = static_cast<int>(row % kBitmapTileRows);
      const T* from = static_cast<const T*>(values) + tile * kBitmapTileValues +
                      bitmap_value_index(tile_row, record, 0);
      prefetch_record(from);
      widen_record(from, kept.values + c / 2);
      auto bits = static_cast<std::uint32_t>(
          mask[tile * kBitmapTileMasks + bitmap_mask_index(tile_row, record)]);
      // A damaged mask must not lead to columns that are not there.
      if (count_bits(bits) != kRecordValues) bits = bitmap_of(bits);
      kept_columns(bits, static_cast<std::int32_t>(c), kTokensPerPanel, kept.columns + c / 2);
    }
  }
};

// --- A few tokens: eight columns of a record are the vector lanes ---

template <int kTokens>
using Lanes = FloatVector[kTokens][kVectorsPerLanes];

// Adds the products of one row of one tile and kTokens tokens to their lanes, which stay in
// registers meanwhile.
template <typename T, int kTokens>
WANDA_EXT_INLINE void multiply_tile_row(const T* values, const std::int32_t* mask, int row,
                                        const float* x, std::int64_t x_ld,
                                        Lanes<kTokens>& row_lanes) {
  Lanes<kTokens> lanes;
  std::memcpy(lanes, row_lanes, sizeof(lanes));
#pragma GCC unroll 4
  for (int record = 0; record < kBitmapTileRecords; ++record) {
    const T* from = values + bitmap_value_index(row, record, 0);
    if (record % 2 == 0) prefetch_record(from);
    float wide[kRecordValues];
    widen_record(from, wide);
    Eight low, high;
    std::memcpy(&low, wide, sizeof(low));
    std::memcpy(&high, wide + 8, sizeof(high));
    const auto bits = static_cast<std::uint32_t>(mask[bitmap_mask_index(row, record)]);
#pragma GCC unroll 4
    for (int byte = 0; byte < kBytesPerRecord; ++byte) {
      Eight columns;
      expand_byte(bits, byte, low, high, columns);
      FloatVector factors[kVectorsPerLanes];
      std::memcpy(factors, &columns, sizeof(columns));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        FloatVector tokens[kVectorsPerLanes];
        std::memcpy(tokens, x + t * x_ld + record * kRecordColumns + 8 * byte, sizeof(tokens));
        for (int v = 0; v < kVectorsPerLanes; ++v) lanes[t][v] += factors[v] * tokens[v];
      }
    }
  }
  std::memcpy(row_lanes, lanes, sizeof(lanes));
}

template <typename T>
WANDA_EXT_INLINE float surplus_of(const Product& call, std::int64_t token, std::int64_t row) {
  const float* x = call.x_float + token * call.columns;
  float sum = 0;
  for (std::int64_t i = call.surplus.rows[row]; i < call.surplus.rows[row + 1]; ++i) {
    sum += to_float(static_cast<const T*>(call.surplus.values)[i]) * x[call.surplus.columns[i]];
  }
  return sum;
}

// The products of a row of tiles and kTokens tokens, whole. The rows go through each tile together,
// so that the weight is read in the order it lies in.
template <typename T, int kTokens>
WANDA_EXT_INLINE void multiply_row_tile(const Call& call, std::int64_t row_tile) {
  const std::int64_t tiles = call.tiles_of_row();
  const std::int64_t first_row = row_tile * kBitmapTileRows;
  const std::int64_t rest = call.y.cols - first_row;
  const int rows = static_cast<int>(rest < kBitmapTileRows ? rest : kBitmapTileRows);
  float sums[kBitmapTileRows][kTokens] = {};
  for (std::int64_t first = 0; first < tiles; first += kTilesPerChunk) {
    Lanes<kTokens> lanes[kBitmapTileRows] = {};
    for (std::int64_t t = first; t < tiles && t < first + kTilesPerChunk; ++t) {
      const std::int64_t tile = row_tile * tiles + t;
      const T* values = static_cast<const T*>(call.values) + tile * kBitmapTileValues;
      const std::int32_t* mask = call.mask + tile * kBitmapTileMasks;
      const float* x = call.x_float + t * kBitmapTileColumns;
      for (int row = 0; row < kBitmapTileRows; ++row) {  // those past n are there, as zeros
        multiply_tile_row<T, kTokens>(values, mask, row, x, call.columns, lanes[row]);
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int t = 0; t < kTokens; ++t) sums[row][t] += sum_lanes(lanes[row][t]);
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int t = 0; t < kTokens; ++t) {
      if (call.surplus.rows != nullptr) sums[row][t] += surplus_of<T>(call, t, first_row + row);
      write<T>(call, t, first_row + row, sums[row][t]);
    }
  }
}

template <typename T>
WANDA_EXT_INLINE void multiply_row_tiles(const Call& call, std::int64_t begin, std::int64_t end) {
  static_assert(kFewTokens == 4, "one case for each number of tokens");
  for (std::int64_t row = begin; row < end; row += kBitmapTileRows) {
    const std::int64_t tile = row / kBitmapTileRows;
    switch (call.x.rows) {
      case 1:
        multiply_row_tile<T, 1>(call, tile);
        break;
      case 2:
        multiply_row_tile<T, 2>(call, tile);
        break;
      case 3:
        multiply_row_tile<T, 3>(call, tile);
        break;
      default:
        multiply_row_tile<T, 4>(call, tile);
    }
  }
}

// --- One entry of each kind for all dtypes, compiled for every ISA ---

WANDA_EXT_CLONES void multiply_row_tiles_any(const Call& call, std::int64_t begin,
                                             std::int64_t end) {
  WANDA_EXT_FOR_DTYPE(multiply_row_tiles, call, begin, end);
}

WANDA_EXT_CLONES void multiply_range_any(const Call& call, std::int64_t begin, std::int64_t end,
                                         std::int64_t token, std::int64_t tokens, Tile& tile) {
  WANDA_EXT_FOR_DTYPE(multiply_range, call, begin, end, token, tokens, tile);
}

ProductLayout layout_of(std::int64_t m, std::int64_t k, int threads) {
  return product_layout(0, m, bitmap_column_tiles(k) * kBitmapTileColumns, threads);
}

}  // namespace

std::size_t linear_bitmap_workspace(std::int64_t m, std::int64_t /*n*/, std::int64_t k,
                                    int threads) {
  return layout_of(m, k, threads).bytes;
}

Status linear_bitmap(ConstMatrixView x, const void* values, const std::int32_t* mask,
                     const Surplus& surplus, const void* bias, MatrixView y, void* workspace,
                     const ParallelFor& parallel) {
  const char* op = "linear_bitmap";
  const std::int64_t m = x.rows;
  const std::int64_t n = y.cols;
  if (x.cols == 0) x.ld = 0;  // x.data may be null then
  if (Status status = check_linear_bitmap(x, values, mask, surplus, y); !status.ok()) return status;
  if (Status status = check_surplus_entries(op, surplus, n, x.cols, parallel); !status.ok())
    return status;
  if (Status status = check_workspace(op, workspace); !status.ok()) return status;
  if (m == 0 || n == 0) return {};

  const ProductLayout layout = layout_of(m, x.cols, parallel.threads);
  auto* bytes = static_cast<char*>(workspace);
  const Call call = {{x, surplus, bias, y, bitmap_column_tiles(x.cols) * kBitmapTileColumns,
                      reinterpret_cast<float*>(bytes + layout.x_float),
                      reinterpret_cast<Tile*>(bytes + layout.tiles)},
                     values,
                     mask};

  multiply(call, parallel, kBitmapTileRows, multiply_row_tiles_any, multiply_range_any);
  return {};
}

}  // namespace wanda_ext
