// acc[k] += sum over tokens of x[m,k]^2, in the tree of ops.h.
//
// One pass over x at memory speed. A thread owns a range of columns for all tokens, so no sum
// crosses threads. It takes the range in at least two tiles, whose sums (12 bytes a column, on the
// stack) are then no more than a 16-bit row a thread and k floats over all threads, and stay in the
// L1 and L2 cache. Tiles are wide because long runs of a row read faster than short ones.
#include <algorithm>

#include "core/check_args.h"
#include "dtype.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr std::int64_t kMaxTile = 4096;
constexpr std::int64_t kTileGrain = 64;

// The open sums of one tile.
struct TileSums {
  float chunk[kMaxTile];
  double group[kMaxTile];
};

template <typename T>
WANDA_EXT_INLINE float square(T value) {
  const float x = to_float(value);
  return x * x;
}

// sums[c] += the squares of `count` rows, row after row; eight at a time to load and store less.
template <typename T>
WANDA_EXT_INLINE void add_squares(const T* const* rows, int count, std::int64_t cols,
                                  float* __restrict sums) {
  int row = 0;
  for (; row + 8 <= count; row += 8) {
    const T* a = rows[row];
    const T* b = rows[row + 1];
    const T* c = rows[row + 2];
    const T* d = rows[row + 3];
    const T* e = rows[row + 4];
    const T* f = rows[row + 5];
    const T* g = rows[row + 6];
    const T* h = rows[row + 7];
    for (std::int64_t j = 0; j < cols; ++j) {
      const float half = (((sums[j] + square(a[j])) + square(b[j])) + square(c[j])) + square(d[j]);
      sums[j] = (((half + square(e[j])) + square(f[j])) + square(g[j])) + square(h[j]);
    }
  }
  for (; row < count; ++row) {
    const T* a = rows[row];
    for (std::int64_t j = 0; j < cols; ++j) sums[j] += square(a[j]);
  }
}

// Adds the lower level's sums to the next one's and clears them for its next chunk or group.
template <typename From>
WANDA_EXT_INLINE void fold(From* __restrict from, double* __restrict to, std::int64_t cols) {
  for (std::int64_t j = 0; j < cols; ++j) {
    to[j] += static_cast<double>(from[j]);
    from[j] = 0;
  }
}

template <typename T>
WANDA_EXT_INLINE void sum_tile(double* __restrict acc, const T* x, std::int64_t m, std::int64_t ld,
                               std::int64_t cols, const bool* keep) {
  TileSums sums;
  for (std::int64_t j = 0; j < cols; ++j) {
    sums.chunk[j] = 0;
    sums.group[j] = 0;
  }
  const std::int64_t chunks = (m + kRowsPerChunk - 1) / kRowsPerChunk;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t begin = chunk * kRowsPerChunk;
    const std::int64_t end = begin + kRowsPerChunk < m ? begin + kRowsPerChunk : m;
    const T* rows[kRowsPerChunk];
    int count = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      if (keep == nullptr || keep[i]) rows[count++] = x + i * ld;
    }
    add_squares(rows, count, cols, sums.chunk);
    fold(sums.chunk, sums.group, cols);
    if ((chunk + 1) % kChunksPerGroup == 0 || chunk + 1 == chunks) {
      fold(sums.group, acc, cols);
    }
  }
}

WANDA_EXT_CLONES void sum_columns(double* acc, const ConstMatrixView& x, const bool* keep,
                                  std::int64_t begin, std::int64_t cols) {
  switch (x.dtype) {
    case DType::kFloat32:
      return sum_tile(acc + begin, static_cast<const float*>(x.data) + begin, x.rows, x.ld, cols,
                      keep);
    case DType::kBFloat16:
      return sum_tile(acc + begin, static_cast<const BFloat16*>(x.data) + begin, x.rows, x.ld, cols,
                      keep);
    case DType::kFloat16:
      return sum_tile(acc + begin, static_cast<const Float16*>(x.data) + begin, x.rows, x.ld, cols,
                      keep);
  }
}

}  // namespace

Status input_sumsq(double* acc, ConstMatrixView x, const bool* keep, const ParallelFor& parallel) {
  if (Status status = check_matrix("input_sumsq", "x", x); !status.ok()) return status;
  if (acc == nullptr && x.cols > 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "input_sumsq: acc is a null pointer; pass %lld doubles",
                      static_cast<long long>(x.cols));
  }
  for_each_range(
      parallel, x.cols, kTileGrain, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
        const std::int64_t grains = ((end - begin + 1) / 2 + kTileGrain - 1) / kTileGrain;
        const std::int64_t tile = std::min(kMaxTile, grains * kTileGrain);
        for (; begin < end; begin += tile) {
          sum_columns(acc, x, keep, begin, std::min(tile, end - begin));
        }
      });
  return {};
}

}  // namespace wanda_ext
