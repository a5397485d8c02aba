// pack_bitmap on the device: a weight [n,k] as records of a mask and 16 values (bitmap.h).
//
// A warp takes a tile of 16 rows x 128 columns, a lane the two records that it owns there, one
// after the other. A lane writes the kept values, the highest column first, to words of its own
// bank of shared memory and reads them back as they are stored: where a value goes depends on the
// mask, and registers cannot be indexed.
//
// Memory: 2 bytes read and 1 1/8 written a weight of a 16-bit type.
#include "core/check_bitmap.h"
#include "row.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr int kPackWarps = 8;

// value j of each lane's record.
template <typename T>
struct PackedValues {
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  T at[kRecordValues / kPerWord][kWarp][kPerWord];

  __device__ T& of(int lane, int j) { return at[j / kPerWord][lane][j % kPerWord]; }
};
template <typename T>
struct PackedWarps {
  PackedValues<T> of[kPackWarps];
};

// A record's columns; zeros outside the weight.
template <typename T, bool kAligned>
__device__ void load_record(T (&columns)[kRecordColumns], const T* from, std::int64_t count) {
  constexpr int kVec = 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < kRecordColumns; first += kVec) {
    Tile<T, kVec, 16> tile = {};
    if constexpr (kAligned) {
      if (first < count) tile = load_tile<T, kVec, 16>(from + first);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (first + i < count) tile.at[i] = from[first + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) columns[first + i] = tile.at[i];
  }
}

// kAligned: whole 16 bytes of columns are inside the weight, or none. Grid: tiles / kPackWarps.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPackWarps* kWarp)
    pack_tiles(const T* __restrict__ weight, std::int64_t n, std::int64_t k, std::int64_t ld,
               std::int64_t tiles, T* __restrict__ values, unsigned* __restrict__ mask,
               std::int32_t* bad) {
  constexpr int kVec = 8;  // values side by side
  const int lane = static_cast<int>(threadIdx.x % kWarp),
            warp = static_cast<int>(threadIdx.x) / kWarp;
  const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
  if (tile >= tiles) return;
  PackedValues<T>& packed = block_shared<PackedWarps<T>>().of[warp];
  const std::int64_t column_tiles = bitmap_column_tiles(k);
  const std::int64_t column =
      tile % column_tiles * kBitmapTileColumns + lane % kBitmapTileRecords * kRecordColumns;
  Tile<unsigned, 2, 8> masks;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::int64_t row =
        tile / column_tiles * kBitmapTileRows + lane / kBitmapTileRecords + h * 8;
    T columns[kRecordColumns];
    load_record<T, kAligned>(columns, weight + row * ld + column, row < n ? k - column : 0);
    unsigned nonzeros = 0;
#pragma unroll
    for (int c = 0; c < kRecordColumns; ++c) {
      nonzeros |= static_cast<unsigned>(to_float(columns[c]) != 0.0f) << c;
    }
    if (count_bits(nonzeros) > kRecordValues && bad != nullptr) {
      atomicMin(reinterpret_cast<unsigned*>(bad), static_cast<unsigned>(row));
    }
    const unsigned kept = bitmap_of(nonzeros);
    masks.at[h] = kept;
    int j = 0;
#pragma unroll
    for (int c = kRecordColumns - 1; c >= 0; --c) {
      if (!(kept >> c & 1)) continue;
      packed.of(lane, j++) = nonzeros >> c & 1 ? columns[c] : T{};
    }
#pragma unroll
    for (int first = 0; first < kRecordValues; first += kVec) {
      Tile<T, kVec, 16> out;
#pragma unroll
      for (int i = 0; i < kVec; ++i) out.at[i] = packed.of(lane, first + i);
      store_tile<T, kVec, 16>(
          values + tile * kBitmapTileValues + ((2 * h + first / kVec) * kWarp + lane) * kVec, out);
    }
  }
  store_tile<unsigned, 2, 8>(mask + tile * kBitmapTileMasks + 2 * lane, masks);
}

}  // namespace

Status pack_bitmap(ConstMatrixView weight, void* values, std::int32_t* mask, std::int32_t* bad,
                   cudaStream_t stream) {
  const char* op = "pack_bitmap";
  const std::int64_t n = weight.rows, k = weight.cols;
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_bitmap_on_device(op, values, mask, n, k); !status.ok()) return status;
  const std::int64_t tiles = bitmap_row_tiles(n) * bitmap_column_tiles(k);
  if (Status status = clear_bad(op, bad, stream); !status.ok()) return status;
  if (tiles == 0) return {};
  const bool aligned = has_aligned_tiles(weight);
  const dim3 grid(static_cast<unsigned>((tiles + kPackWarps - 1) / kPackWarps));
  return with_element(weight.dtype, [&](auto element) {
    using T = decltype(element);
    return launch(op, aligned ? pack_tiles<T, true> : pack_tiles<T, false>, grid,
                  dim3(kPackWarps * kWarp), stream, static_cast<const T*>(weight.data), n, k,
                  weight.ld, tiles, static_cast<T*>(values), reinterpret_cast<unsigned*>(mask),
                  bad);
  });
}

}  // namespace cuda
}  // namespace wanda_ext
