// unpack_24 on the device: the weight [n,k] back from values and metadata in any order.
//
// A thread writes 8 columns of two rows, r and r + 8, whose metadata lies side by side in both
// device orders; a CTA 16 rows x 256 columns, so that each sector of metadata is used whole.
//
// Memory: 1 1/8 bytes read and 2 written a weight of a 16-bit type.
#include <cstdint>

#include "core/check_args.h"
#include "core/check_packed.h"
#include "row.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr int kRowsPerBlock = 16;
constexpr int kColumnsPerBlock = kWarp * kColumnsPerTile;
constexpr int kThreads = kRowsPerBlock / 2 * kWarp;

template <typename Bits>
__device__ Bits column_of_group(const Bits* pair, unsigned nibble, unsigned column) {
  const Bits low = (nibble & 3) == column ? pair[0] : Bits{0};
  const Bits high = nibble >> 2 == column ? pair[1] : Bits{0};
  return low | high;
}

// Elements are their bits. Grid: column blocks fastest.
template <typename Bits, int kAlign>
__global__ void __launch_bounds__(kThreads)
    unpack(const Bits* __restrict__ values, const std::uint16_t* __restrict__ meta, MetaOrder order,
           Bits* __restrict__ weight, std::int64_t n, std::int64_t k, std::int64_t ld,
           unsigned column_blocks) {
  constexpr int kPairAlign = kAlign < 4 * sizeof(Bits) ? kAlign : 4 * sizeof(Bits);
  const std::int64_t column =
      static_cast<std::int64_t>(blockIdx.x % column_blocks) * kColumnsPerBlock +
      threadIdx.x % kWarp * kColumnsPerTile;
  const std::int64_t first_row =
      static_cast<std::int64_t>(blockIdx.x / column_blocks) * kRowsPerBlock + threadIdx.x / kWarp;
  if (column >= k) return;
  const std::int64_t rows = padded_rows_24(order, n);
  const std::int64_t cols = padded_cols_24(order, k);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::int64_t row = first_row + half * (kRowsPerBlock / 2);
    if (row >= n) continue;
    const unsigned word = meta[meta_index_24(order, row, column / kColumnsPerMeta, rows, cols)];
    const unsigned nibbles = word >> (column % kColumnsPerMeta);
    const auto pairs = load_tile<Bits, 4, kPairAlign>(values + (row * k + column) / 2);
    Tile<Bits, kColumnsPerTile, kAlign> tile;
#pragma unroll
    for (int i = 0; i < kColumnsPerTile; ++i) {
      const int g = i / 4;
      tile.at[i] =
          column_of_group(pairs.at + 2 * g, nibbles >> 4 * g & 15, static_cast<unsigned>(i % 4));
    }
    store_tile<Bits, kColumnsPerTile, kAlign>(weight + row * ld + column, tile);
  }
}

template <typename Bits>
Status run(const void* values, const std::int16_t* meta, MetaOrder order, MatrixView weight,
           cudaStream_t stream) {
  const std::int64_t column_blocks = (weight.cols + kColumnsPerBlock - 1) / kColumnsPerBlock;
  const std::int64_t row_blocks = (weight.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  if (row_blocks > INT32_MAX / column_blocks) {
    return make_error(
        StatusCode::kInvalidArgument,
        "unpack_24: the weight is %lld x %lld, too large for one call; split its rows",
        static_cast<long long>(weight.rows), static_cast<long long>(weight.cols));
  }
  const bool aligned = has_aligned_tiles(weight) && is_aligned(values);
  return launch("unpack_24", aligned ? unpack<Bits, 16> : unpack<Bits, sizeof(Bits)>,
                dim3(static_cast<unsigned>(row_blocks * column_blocks)), dim3(kThreads), stream,
                static_cast<const Bits*>(values), reinterpret_cast<const std::uint16_t*>(meta),
                order, static_cast<Bits*>(weight.data), weight.rows, weight.cols, weight.ld,
                static_cast<unsigned>(column_blocks));
}

}  // namespace

Status unpack_24(const void* values, const std::int16_t* meta, MetaOrder order, MatrixView weight,
                 cudaStream_t stream) {
  const char* op = "unpack_24";
  if (Status status = check_matrix(op, "weight", weight); !status.ok()) return status;
  if (Status status = check_order(op, order); !status.ok()) return status;
  if (Status status = check_packed(op, values, meta, weight.rows, weight.cols); !status.ok()) {
    return status;
  }
  if (weight.rows == 0 || weight.cols == 0) return {};
  if (weight.dtype == DType::kFloat32) {
    return run<std::uint32_t>(values, meta, order, weight, stream);
  }
  return run<std::uint16_t>(values, meta, order, weight, stream);
}

}  // namespace cuda
}  // namespace wanda_ext
