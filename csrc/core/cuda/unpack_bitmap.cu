// unpack_bitmap on the device: the weight [n,k] back from records of a mask and 16 values.
//
//   unpack_tiles   a warp takes a tile of 16 rows x 128 columns. In shared memory it makes an
//                  image of it out of zeros and of what its lanes' records hold, and writes it row
//                  by row, 16 bytes a lane side by side.
//   put_surplus    then, where there is one, a warp puts the surplus of a row in its place
//
// Memory: 1 1/8 bytes read and 2 written a weight of a 16-bit type.
#include <algorithm>

#include "bitmap_ptx.h"
#include "core/check_bitmap.h"
#include "row.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr int kUnpackWarps = 4;

// Elements are their bits. Padding turns the banks from row to row.
template <typename Bits>
struct Image {
  static constexpr int kVec = 16 / sizeof(Bits);
  alignas(16) Bits at[kBitmapTileRows][kBitmapTileColumns + kVec];
};
template <typename Bits>
struct Images {
  Image<Bits> of[kUnpackWarps];
};

// kAligned: whole 16 bytes of columns are inside the weight, or none. Grid: tiles / kUnpackWarps.
template <typename Bits, bool kAligned>
__global__ void __launch_bounds__(kUnpackWarps* kWarp)
    unpack_tiles(const Bits* __restrict__ values, const unsigned* __restrict__ mask,
                 Bits* __restrict__ weight, std::int64_t n, std::int64_t k, std::int64_t ld,
                 std::int64_t tiles) {
  constexpr int kVec = Image<Bits>::kVec, kRowVecs = kBitmapTileColumns / kVec;
  constexpr int kVecs = kBitmapTileRows * kRowVecs;
  const int lane = static_cast<int>(threadIdx.x % kWarp),
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + warp;
  if (tile >= tiles) return;
  Image<Bits>& image = block_shared<Images<Bits>>().of[warp];
#pragma unroll
  for (int i = lane; i < kVecs; i += kWarp) {
    store_tile<Bits, kVec, 16>(&image.at[i / kRowVecs][i % kRowVecs * kVec], {});
  }
  __syncwarp(~0u);
  const auto masks = load_tile<unsigned, 2, 8>(mask + tile * kBitmapTileMasks + 2 * lane);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Bits* record =
        &image.at[lane / kBitmapTileRecords + 8 * h][lane % kBitmapTileRecords * kRecordColumns];
    unsigned rest = masks.at[h];
#pragma unroll
    for (int first = 0; first < kRecordValues; first += 8) {
      const auto eight = load_tile<Bits, 8, 16>(values + tile * kBitmapTileValues +
                                                ((2 * h + first / 8) * kWarp + lane) * 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned column = highest_bit(rest);
        rest = bits_below(rest, column);
        if (column < kRecordColumns) record[column] = eight.at[j];  // else the mask has too few
      }
    }
  }
  __syncwarp(~0u);
  const std::int64_t column_tiles = bitmap_column_tiles(k);
  const std::int64_t first_row = tile / column_tiles * kBitmapTileRows;
  const std::int64_t first_column = tile % column_tiles * kBitmapTileColumns;
#pragma unroll 4
  for (int i = lane; i < kVecs; i += kWarp) {
    const std::int64_t row = first_row + i / kRowVecs;
    const std::int64_t column = first_column + i % kRowVecs * kVec;
    if (row >= n || column >= k) continue;
    const Bits* from = &image.at[i / kRowVecs][i % kRowVecs * kVec];
    Bits* to = weight + row * ld + column;
    if constexpr (kAligned) {
      store_tile<Bits, kVec, 16>(to, load_tile<Bits, kVec, 16>(from));
    } else {
      for (int j = 0; j < kVec; ++j) {
        if (column + j < k) to[j] = from[j];
      }
    }
  }
}

// Grid: n / kUnpackWarps.
template <typename Bits>
__global__ void __launch_bounds__(kUnpackWarps* kWarp)
    put_surplus(Surplus surplus, Bits* __restrict__ weight, std::int64_t n, std::int64_t k,
                std::int64_t ld) {
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + threadIdx.x / kWarp;
  if (row >= n) return;
  const std::int64_t begin = std::max(surplus.rows[row], 0);
  const std::int64_t end = std::min<std::int64_t>(surplus.rows[row + 1], surplus.count);
  for (std::int64_t e = begin + threadIdx.x % kWarp; e < end; e += kWarp) {
    const std::int64_t column = surplus.columns[e];
    if (column >= k) continue;
    weight[row * ld + column] = static_cast<const Bits*>(surplus.values)[e];
  }
}

template <typename Bits>
Status run(const char* op, const void* values, const std::int32_t* mask, const Surplus& surplus,
           const MatrixView& weight, std::int64_t tiles, cudaStream_t stream) {
  const std::int64_t n = weight.rows, k = weight.cols;
  const bool aligned = has_aligned_tiles(weight);
  auto* bits = static_cast<Bits*>(weight.data);
  const auto blocks = [](std::int64_t warps) {
    return dim3(static_cast<unsigned>((warps + kUnpackWarps - 1) / kUnpackWarps));
  };
  const Status unpacked =
      launch(op, aligned ? unpack_tiles<Bits, true> : unpack_tiles<Bits, false>, blocks(tiles),
             dim3(kUnpackWarps * kWarp), stream, static_cast<const Bits*>(values),
             reinterpret_cast<const unsigned*>(mask), bits, n, k, weight.ld, tiles);
  if (!unpacked.ok() || surplus.rows == nullptr) return unpacked;
  return launch(op, put_surplus<Bits>, blocks(n), dim3(kUnpackWarps * kWarp), stream, surplus, bits,
                n, k, weight.ld);
}

}  // namespace

Status unpack_bitmap(const void* values, const std::int32_t* mask, const Surplus& surplus,
                     MatrixView weight, cudaStream_t stream) {
  const char* op = "unpack_bitmap";
  const std::int64_t n = weight.rows, k = weight.cols;
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_bitmap_on_device(op, values, mask, n, k); !status.ok()) return status;
  if (Status status = check_surplus(op, surplus, k); !status.ok()) return status;
  const std::int64_t tiles = bitmap_row_tiles(n) * bitmap_column_tiles(k);
  if (tiles == 0) return {};
  if (weight.dtype == DType::kFloat32) {
    return run<std::uint32_t>(op, values, mask, surplus, weight, tiles, stream);
  }
  return run<std::uint16_t>(op, values, mask, surplus, weight, tiles, stream);
}

}  // namespace cuda
}  // namespace wanda_ext
