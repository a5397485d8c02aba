// What a CTA of linear_24_mma.cu does with a tile of rows of W x tokens: how its threads bring a
// stage of columns into shared memory, and how its warps multiply it.
//
// A row of a stage lies in chunks of 16 bytes, swizzled so that ldmatrix, which reads one chunk of
// 8 rows at once, meets no bank twice. Only meta is padded in global memory: what lies outside x
// and values arrives as zeros. Zero metadata is no legal pattern, so what lies outside meta is
// clamped to its last words, and places zeros.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device.h"
#include "mma_sp.h"
#include "wanda_ext/nm24.h"

namespace wanda_ext {
namespace cuda {

constexpr int kChunk = 16;       // bytes, what one copy moves
constexpr int kBlock = 32;       // columns of one mma.sp
constexpr int kRowsOfMeta = 32;  // that one register of metadata serves: two mma.sp
constexpr int kTokensOfMma = 8;

// What a CTA computes, and how its warps share it.
template <int rows, int tokens, int columns, int stages, int warps_of_rows, int warps_of_tokens,
          int warps_of_columns>
struct Shape {
  static constexpr int kRows = rows, kTokens = tokens, kColumns = columns, kStages = stages;
  static constexpr int kWarpsOfRows = warps_of_rows, kWarpsOfTokens = warps_of_tokens;
  static constexpr int kWarpsOfColumns = warps_of_columns;
  static constexpr int kThreads = warps_of_rows * warps_of_tokens * warps_of_columns * kWarp;
  static constexpr int kBlocks = columns / kBlock;
  static constexpr int kWarpRows = rows / warps_of_rows, kWarpTokens = tokens / warps_of_tokens;
  static constexpr int kWarpBlocks = kBlocks / warps_of_columns;
  static_assert(kWarpRows % kRowsOfMeta == 0 && kWarpTokens % kTokensOfMma == 0);
  static_assert(kWarpBlocks == 2 || kWarpBlocks == 4, "one load of sm90 metadata");
};

// Metadata lies in lines of chunks. A line is a block of sm80, a chunk of it four rows; or 128
// columns of sm90, where 16 chunks hold 16 rows.
template <MetaOrder kOrder>
struct MetaLines {
  static constexpr bool kIsSm80 = kOrder == MetaOrder::kSm80;
  static constexpr int kLineColumns = kIsSm80 ? 32 : 128;
  static constexpr int kChunkRows = kIsSm80 ? 4 : 1;
};

template <typename Shape, MetaOrder kOrder>
struct Stage {
  using Lines = MetaLines<kOrder>;
  // Of sm90, half a line comes with the whole of it.
  static constexpr int kLines =
      Shape::kColumns < Lines::kLineColumns ? 1 : Shape::kColumns / Lines::kLineColumns;
  static constexpr int kLineChunks = Shape::kRows / Lines::kChunkRows;

  alignas(16) char values[Shape::kRows * Shape::kColumns];
  alignas(16) char x[Shape::kTokens * Shape::kColumns * 2];
  alignas(16) char meta[kLines * kLineChunks * kChunk];
};

// The sums of a tile, for each of the warps that share its columns.
template <typename Shape>
struct Sums {
  static constexpr int kStride = Shape::kRows + 4;  // lets a warp's lanes write to different banks
  float at[Shape::kWarpsOfColumns][Shape::kTokens][kStride];
};

template <typename Shape, MetaOrder kOrder>
constexpr std::size_t shared_bytes() {
  static_assert(sizeof(Sums<Shape>) <= Shape::kStages * sizeof(Stage<Shape, kOrder>));
  return Shape::kStages * sizeof(Stage<Shape, kOrder>);
}

// Where chunk `chunk` of row `row` lies, rows having kChunks: the same chunk of 8 neighbouring rows
// in 8 different places of a 128-byte line.
template <int kChunks>
__device__ int swizzled(int row, int chunk) {
  constexpr int kSpan = kChunks < 8 ? kChunks : 8;
  return (row * kChunks + (chunk ^ row / (8 / kSpan) % kSpan)) * kChunk;
}

// --- From global memory to a stage ---------------------------------------------------------------

// A thread's share of a tile of rows of kRowBytes bytes. What lies outside the matrix is zero.
template <int kRows, int kRowBytes, int kThreads>
struct TileCopy {
  static constexpr int kChunks = kRowBytes / kChunk;
  static constexpr int kStep = kThreads / kChunks;  // rows that the threads copy side by side
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  static_assert(kStep % 8 == 0 || (8 % kStep == 0 && kChunks >= 8), "see place");

  int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  int place = swizzled<kChunks>(row, chunk);
  const char* from;
  std::int64_t stride;
  unsigned row_bytes;
  int rows;  // from `row` on

  __device__ TileCopy(const char* matrix, std::int64_t stride, unsigned row_bytes,
                      unsigned first_row, unsigned end_row)
      : from(matrix + static_cast<std::int64_t>(first_row + row) * stride + chunk * kChunk),
        stride(stride),
        row_bytes(row_bytes),
        rows(static_cast<int>(std::min<unsigned>(end_row - first_row, kRows)) - row) {}

  __device__ void copy(char* shared, unsigned tile) const {
    const unsigned first_byte = tile * kRowBytes;
    const bool inside = first_byte + chunk * kChunk < row_bytes;
    const char* next = from + first_byte;
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
      // swizzled(row + i, chunk), where row < kStep and kStep divides i.
      copy_async(shared + (place ^ i % 8 * kChunk) + i * kRowBytes, next, inside && i < rows);
      next += kStep * stride;
    }
  }
};

// A thread's chunk of the metadata, if there is one for it.
template <typename Shape, MetaOrder kOrder>
struct MetaCopy {
  using Lines = MetaLines<kOrder>;
  static constexpr int kLineChunks = Stage<Shape, kOrder>::kLineChunks;
  static constexpr int kChunks = Stage<Shape, kOrder>::kLines * kLineChunks;
  static_assert(kChunks <= Shape::kThreads);

  const char* from;
  std::int64_t line_bytes;
  unsigned last_line;

  __device__ MetaCopy(const char* meta, unsigned n, unsigned k, unsigned first_row)
      : line_bytes(padded_rows_24(kOrder, n) / Lines::kChunkRows * kChunk),
        last_line((k - 1) / Lines::kLineColumns) {
    const std::int64_t chunk = first_row / Lines::kChunkRows + threadIdx.x % kLineChunks;
    from = meta + std::min<std::int64_t>(chunk * kChunk, line_bytes - kChunk);
  }

  __device__ void copy(char* shared, unsigned tile) const {
    if (threadIdx.x >= kChunks) return;
    const unsigned line = tile * Shape::kColumns / Lines::kLineColumns + threadIdx.x / kLineChunks;
    copy_async(shared + threadIdx.x * kChunk, from + std::min(line, last_line) * line_bytes, true);
  }
};

// --- From a stage to the tensor cores ------------------------------------------------------------

// The metadata of a warp's blocks, for kRowsOfMeta rows from `row` on.
template <typename Shape, MetaOrder kOrder>
__device__ Tile<unsigned, Shape::kWarpBlocks, 4 * Shape::kWarpBlocks> load_meta(
    const Stage<Shape, kOrder>& stage, int row, int first_block, unsigned tile) {
  constexpr int kBlocks = Shape::kWarpBlocks;
  const int lane = threadIdx.x % kWarp;
  Tile<unsigned, kBlocks, 4 * kBlocks> meta;
  if constexpr (kOrder == MetaOrder::kSm80) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int word = (first_block + b) * Shape::kRows + row + lane;
      meta.at[b] = reinterpret_cast<const unsigned*>(stage.meta)[word];
    }
  } else {
    if (Shape::kColumns == 64) first_block += tile % 2 * 2;  // of the line
    const int chunk =
        first_block / 4 * Shape::kRows + row + lane / 2 % 2 * 16 + lane % 2 * 8 + lane / 4;
    const char* words = stage.meta + chunk * kChunk + first_block % 4 * 4;
    meta = load_tile<unsigned, kBlocks, 4 * kBlocks>(reinterpret_cast<const unsigned*>(words));
  }
  return meta;
}

// A warp's part of the tile, and its sums: of mma.sp i along the rows, j along the tokens.
template <typename T, typename Shape, MetaOrder kOrder>
struct WarpTile {
  static constexpr int kMetas = Shape::kWarpRows / kRowsOfMeta;
  static constexpr int kTokenTiles = Shape::kWarpTokens / kTokensOfMma;

  int row, token, columns;  // in the tile; which of the warps that share the columns
  float sums[2 * kMetas][kTokenTiles][4];

  __device__ WarpTile() : sums{} {
    const int warp = threadIdx.x / kWarp;
    row = warp % Shape::kWarpsOfRows * Shape::kWarpRows;
    token = warp / Shape::kWarpsOfRows % Shape::kWarpsOfTokens * Shape::kWarpTokens;
    columns = warp / (Shape::kWarpsOfRows * Shape::kWarpsOfTokens);
  }

  __device__ void multiply(const Stage<Shape, kOrder>& stage, unsigned tile) {
    constexpr int kChunks = Shape::kColumns / 16;  // of a row of values; x has twice as many
    const int lane = threadIdx.x % kWarp;
    const int first_block = columns * Shape::kWarpBlocks;
    Tile<unsigned, Shape::kWarpBlocks, 4 * Shape::kWarpBlocks> meta[kMetas];
#pragma unroll
    for (int i = 0; i < kMetas; ++i) {
      meta[i] = load_meta<Shape, kOrder>(stage, row + i * kRowsOfMeta, first_block, tile);
    }
#pragma unroll
    for (int b = 0; b < Shape::kWarpBlocks; ++b) {
      const int block = first_block + b;
      unsigned w[2 * kMetas][4];
#pragma unroll
      for (int i = 0; i < 2 * kMetas; ++i) {
        const int place = swizzled<kChunks>(row + i * 16 + lane % 16, block * 2 + lane / 16);
        load_matrices(w[i], stage.values + place);
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int place = swizzled<2 * kChunks>(token + j * kTokensOfMma + lane % 8,  //
                                                block * 4 + lane / 8);
        unsigned x[4];
        load_matrices(x, stage.x + place);
#pragma unroll
        for (int i = 0; i < kMetas; ++i) {
          mma_sp<T, 0>(sums[2 * i][j], w[2 * i], x, meta[i].at[b]);
          mma_sp<T, 1>(sums[2 * i + 1][j], w[2 * i + 1], x, meta[i].at[b]);
        }
      }
    }
  }

  __device__ void store(Sums<Shape>& to) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2 * kMetas; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          to.at[columns][token + j * kTokensOfMma + lane % 4 * 2 + s % 2]
               [row + i * 16 + lane / 4 + s / 2 * 8] = sums[i][j][s];
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace wanda_ext
