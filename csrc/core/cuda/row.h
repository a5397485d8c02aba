// One row of a matrix as the threads of a CTA hold it, and the choice of how they do.
#pragma once

#include <cstdint>

#include "device.h"
#include "wanda_ext/status.h"

namespace wanda_ext {
namespace cuda {

constexpr int kColumnsPerTile = 8;  // 16 bytes of a 16-bit type

// Tile i of thread t starts at column (i * blockDim.x + t) * kVec. kTiles of them stay in the
// thread's registers; with kTiles == 0 every visit reads the row again, out of the L2 cache.
template <int kVecs, int kTilesHeld, int kAlignment, int kMaxThreads>
struct RowShape {
  static constexpr int kVec = kVecs;
  static constexpr int kTiles = kTilesHeld;
  static constexpr int kAlign = kAlignment;
  static constexpr int kThreads = kMaxThreads;
};

template <typename T, typename Shape>
class Row {
 public:
  using Values = Tile<T, Shape::kVec, Shape::kAlign>;

  __device__ Row(const T* row, int k) : row_(row), k_(k) {
    if constexpr (Shape::kTiles > 0) {
#pragma unroll
      for (int i = 0; i < Shape::kTiles; ++i) {
        if (column_of(i) < k_) held_[i] = load(column_of(i));
      }
    }
  }

  // visit(values, column) for every tile of this thread.
  template <typename Visit>
  __device__ void for_each(Visit visit) {
    if constexpr (Shape::kTiles > 0) {
#pragma unroll
      for (int i = 0; i < Shape::kTiles; ++i) {
        forget(held_[i]);
        if (column_of(i) < k_) visit(held_[i], column_of(i));
      }
    } else {
      for (int i = 0; column_of(i) < k_; ++i) visit(load(column_of(i)), column_of(i));
    }
  }

 private:
  __device__ static int column_of(int i) {
    return (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * Shape::kVec;
  }
  __device__ Values load(int column) const {
    return load_tile<T, Shape::kVec, Shape::kAlign>(row_ + column);
  }

  const T* row_;
  int k_;
  Values held_[Shape::kTiles > 0 ? Shape::kTiles : 1];
};

template <typename Shape>
using Norms = Tile<float, Shape::kVec, (Shape::kAlign < 4 ? 4 : Shape::kAlign)>;

// The norms of a tile's columns; 1 where there are none.
template <typename Shape>
__device__ Norms<Shape> norms_at(const float* input_norm, int column) {
  if (input_norm != nullptr) {
    return *reinterpret_cast<const Norms<Shape>*>(input_norm + column);
  }
  Norms<Shape> ones;
#pragma unroll
  for (int i = 0; i < Shape::kVec; ++i) ones.at[i] = 1;
  return ones;
}

constexpr unsigned threads_for(std::int64_t tiles, int tiles_per_thread, int max_threads) {
  const std::int64_t warps = (tiles + tiles_per_thread * kWarp - 1) / (tiles_per_thread * kWarp);
  return static_cast<unsigned>(warps * kWarp < max_threads ? warps * kWarp : max_threads);
}

// start(shape, threads) with the shape for rows of k columns. Rows of up to 32768 columns are held
// on chip, by many threads with few tiles each, so that several CTAs fit an SM and one computes
// while another waits for memory.
template <typename Start>
Status with_tiles(std::int64_t k, Start start) {
  const std::int64_t tiles = (k + kColumnsPerTile - 1) / kColumnsPerTile;
  if (tiles <= 2 * 512) {
    return start(RowShape<kColumnsPerTile, 2, 16, 512>(), threads_for(tiles, 2, 512));
  }
  if (tiles <= 4 * 1024) {
    return start(RowShape<kColumnsPerTile, 4, 16, 1024>(), threads_for(tiles, 4, 1024));
  }
  return start(RowShape<kColumnsPerTile, 0, 16, 1024>(), 1024u);
}

// Whether every tile of the matrix lies on 16 bytes, and none goes beyond its row.
inline bool has_aligned_tiles(const ConstMatrixView& matrix) {
  const std::size_t row_bytes = static_cast<std::size_t>(matrix.ld) * size_of(matrix.dtype);
  return is_aligned(matrix.data) && matrix.cols % kColumnsPerTile == 0 &&
         (matrix.rows <= 1 || row_bytes % 16 == 0);
}

// A grid of a CTA a row, columns counted in int.
inline Status check_grid(const char* op, const ConstMatrixView& matrix) {
  if (matrix.rows <= INT32_MAX && matrix.cols <= INT32_MAX / 2) return {};
  return make_error(StatusCode::kInvalidArgument,
                    "%s: the matrix is %lld x %lld, too large for one call; split its rows", op,
                    static_cast<long long>(matrix.rows), static_cast<long long>(matrix.cols));
}

// start(element) with a value of the C++ type of `dtype`.
template <typename Start>
Status with_element(DType dtype, Start start) {
  switch (dtype) {
    case DType::kFloat32:
      return start(float{});
    case DType::kBFloat16:
      return start(__nv_bfloat16{});
    default:
      return start(__half{});
  }
}

}  // namespace cuda
}  // namespace wanda_ext
