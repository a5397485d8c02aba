// What a CTA of linear_bitmap.cu does with its records and its x: how a warp makes fragments of W
// out of masks and values, and how x comes to shared memory as fragments beside them.
//
// A lane owns 32 columns of two rows of a tile, so it can make every fragment of these alone. It
// writes each value to where its column belongs, in words of its own bank of shared memory, reads
// the words back, and clears the columns that the mask lacks: nothing has to be zeroed before, no
// lane waits for another, and no two lanes meet in a bank. To write takes four instructions a
// value: highest bit, the bits below it, address, store.
//
// The tensor core adds over columns in any order, as long as W and x agree. Here lane t of a
// fragment's row (or token) holds the columns 32 t + 8 f + 4 u .. + 3 of a tile for product 2 f + u
// of eight: all of them from the 32 that it owns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bitmap_ptx.h"
#include "mma_sp.h"
#include "wanda_ext/bitmap.h"

namespace wanda_ext {
namespace cuda {

constexpr int kRecordWords = kRecordColumns / 2;  // of 16-bit elements
constexpr int kTileRows = kBitmapTileRows;
constexpr int kTileColumns = kBitmapTileColumns;
constexpr int kTokensOfMma = 8;
constexpr int kFragments = 4;  // of 16 bytes a lane: its x of a tile

// What a CTA computes: rows x tokens, its warps sharing tiles of rows and, in turns, of columns.
template <int row_tiles, int token_tiles>
struct BitmapShape {
  static constexpr int kWarps = 16, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = row_tiles, kTokenTiles = token_tiles;
  static constexpr int kRows = row_tiles * kTileRows, kTokens = token_tiles * kTokensOfMma;
  static constexpr int kWarpsOfColumns = kWarps / row_tiles;
  // In a turn each warp multiplies two tiles: one while the other's turn is on its way.
  static constexpr int kTurnTiles = 2 * kWarpsOfColumns;
  // x comes in stages of 16 KB, of which two alternate.
  static constexpr int kStageTiles = 8 / token_tiles;
  static constexpr int kTurnStages = kTurnTiles / kStageTiles;
  static_assert(kTurnStages == 1 || kTurnStages == 2);
};

// The words of a lane's two records, row g and row g + 8. `place` in its bytes: word column / 2, in
// the bank of the lane, half column % 2.
struct Scratch {
  static constexpr int kWordStride = kWarp * 4;
  static constexpr int kRecordBytes = kRecordWords * kWordStride;  // 2 KB, and aligned so
  static constexpr int kBytes = 2 * kRecordBytes;                  // of a warp
};

// 66 column = 128 (column / 2) + 2 (column % 2), and bits that nobody wants: a multiplication, an
// AND and an OR, the two in one instruction, since `words` is 0 in the bits of the AND.
__device__ inline SharedAddress scratch_place(SharedAddress words, unsigned column) {
  return (column * 66 & 0x782u) | words;
}

// A lane's share of a tile of W.
struct Records {
  Tile<unsigned, 2, 8> masks;
  Tile<unsigned, 4, 16> values[4];  // 8 each: two of row g, two of row g + 8

  // Both of this lane.
  __device__ void load(const char* lane_masks, const char* lane_values) {
    load_once(masks, lane_masks);
#pragma unroll
    for (int i = 0; i < 4; ++i) load_once(values[i], lane_values + i * kWarp * sizeof(values[i]));
  }

  // Words j: columns 2 j and 2 j + 1 of row g and of row g + 8. The two records take turns, for
  // each is a chain.
  __device__ void expand(SharedAddress words, unsigned (&low)[kRecordWords],
                         unsigned (&high)[kRecordWords]) const {
    unsigned rest[2] = {masks.at[0], masks.at[1]};
#pragma unroll
    for (int j = 0; j < kRecordValues; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const unsigned column = highest_bit(rest[h]);
        rest[h] = bits_below(rest[h], column);
        const unsigned pair = values[2 * h + j / 8].at[j % 8 / 2];
        store_half(scratch_place(words + h * Scratch::kRecordBytes, column),
                   j % 2 == 0 ? pair : pair >> 16);
      }
    }
#pragma unroll
    for (int j = 0; j < kRecordWords; ++j) {
      low[j] = load_word(words + j * Scratch::kWordStride);
      high[j] = load_word(words + Scratch::kRecordBytes + j * Scratch::kWordStride);
    }
    clear_dropped(masks.at[0], low);
    clear_dropped(masks.at[1], high);
  }

 private:
  // Of word 4 q + 3 - s the columns are bits 8 q + 6 - 2 s and the next: the signs of byte q of the
  // mask, shifted.
  __device__ static void clear_dropped(unsigned mask, unsigned (&word)[kRecordWords]) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const unsigned odd = 8 | q, even = 12 | q;  // which bytes' signs
        word[4 * q + 3 - s] &= select_bytes(mask << 2 * s, mask << (2 * s + 1),
                                            odd << 12 | odd << 8 | even << 4 | even);
      }
    }
  }
};

// Fragments of x: of every tile of tokens and tile of columns of a stage, four of 16 bytes a lane.
template <typename Shape>
struct XStage {
  alignas(16) char at[Shape::kTokenTiles][Shape::kStageTiles][kFragments][kWarp][16];
};

// Lane 4 g + t's fragment f, columns 32 t + 8 f .. + 7 of token g. Both the lanes that copy, 16
// neighbours a token, and those that read meet no bank twice.
__device__ constexpr int fragment_place(int f, int lane) { return lane ^ 2 * f; }

// Brings x to a CTA, stage after stage of its turns.
template <typename Shape>
class XStream {
 public:
  // `first_tile`: of columns, where the CTA begins; after `group_stages` stages of its own a group
  // is over, and the next one begins with column 0; for `stages` stages.
  __device__ XStream(XStage<Shape>* stages, const char* x, std::int64_t stride, int m, int k,
                     unsigned first_stage, unsigned group_stages, unsigned stages_left)
      : place_(reinterpret_cast<char*>(stages) + own_place()),
        from_(x + token() * stride),
        tokens_apart_(stride * kTokensOfMma),
        column_(own_column() + static_cast<int>(first_stage) * kStageColumns),
        group_columns_(static_cast<int>(group_stages) * kStageColumns),
        m_(m),
        k_(k),
        left_(stages_left) {
    from_ += 2 * static_cast<std::int64_t>(column_);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (token(i) < m_) continue;
      for (int stage = 0; stage < 2; ++stage) zero(place_ + stage * kBytes + i * kApart);
    }
    copy(0);
  }

  // Waits for a stage, the first or the second in turn, and lets the next one come in place of the
  // one before it.
  __device__ void next(unsigned stage) {
    wait_copies<0>();
    __syncthreads();
    copy(stage ^ 1);
  }

 private:
  static constexpr int kBytes = sizeof(XStage<Shape>);
  static constexpr int kStageColumns = Shape::kStageTiles * kTileColumns;
  static constexpr int kChunks = kBytes / 16 / Shape::kThreads;  // of a thread
  static constexpr int kApart = kBytes / kChunks;                // in a stage
  static_assert(kChunks == 2);
  // Its second chunk is the same columns of another token, or other columns of the same one.
  static constexpr int kTokensApart = Shape::kTokenTiles == 2 ? kTokensOfMma : 0;
  static constexpr int kColumnsApart = Shape::kTokenTiles == 2 ? 0 : kStageColumns / 2;

  // 16 neighbouring threads copy a token's columns of a tile.
  __device__ static int piece() { return static_cast<int>(threadIdx.x) % 16; }
  __device__ static int tile() { return static_cast<int>(threadIdx.x) / (16 * kTokensOfMma); }
  __device__ static int own_column() { return tile() * kTileColumns + piece() * 8; }
  __device__ static int token(int chunk = 0) {
    return static_cast<int>(threadIdx.x) / 16 % kTokensOfMma + chunk * kTokensApart;
  }
  __device__ static int own_place() {
    const int t = piece() / kFragments, f = piece() % kFragments;
    return ((tile() * kFragments + f) * kWarp + fragment_place(f, 4 * token() + t)) * 16;
  }
  __device__ static void zero(char* place) {
    store_tile<unsigned, 4, 16>(reinterpret_cast<unsigned*>(place), {});
  }

  // The places of tokens beyond m stay zeros.
  __device__ void copy(unsigned stage) {
    if (left_ == 0) return;
    --left_;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      char* place = place_ + stage * kBytes + i * kApart;
      const char* from = from_ + (kTokensApart > 0 ? i * tokens_apart_ : i * kColumnsApart * 2);
      const int column = column_ + i * kColumnsApart;
      if (token(i) >= m_) continue;
      if (column + 8 <= k_) {
        copy_async(place, from, true);
      } else {
        copy_rest(place, from, k_ - column);
      }
    }
    commit_copies();
    column_ += kStageColumns;
    from_ += 2 * kStageColumns;
    if (column_ >= group_columns_) {
      column_ -= group_columns_;
      from_ -= 2 * static_cast<std::int64_t>(group_columns_);
    }
  }

  // What lies beyond the columns of x is not read.
  __device__ static void copy_rest(char* place, const char* from, int elements) {
    zero(place);
#pragma unroll 1
    for (int i = 0; i < elements; ++i) {
      reinterpret_cast<unsigned short*>(place)[i] =
          reinterpret_cast<const unsigned short*>(from)[i];
    }
  }

  char* place_;       // of its first chunk, in the first stage
  const char* from_;  // it comes from
  std::int64_t tokens_apart_;
  int column_, group_columns_;
  int m_, k_;
  unsigned left_;
};

// sums += a tile of W times its columns of x.
template <typename T, typename Shape>
__device__ void multiply_tile(float (&sums)[Shape::kTokenTiles][4], const Records& records,
                              SharedAddress words, const XStage<Shape>& stage, int tile) {
  unsigned low[kRecordWords], high[kRecordWords];
  records.expand(words, low, high);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
  for (int i = 0; i < Shape::kTokenTiles; ++i) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const auto x = load_tile<unsigned, 4, 16>(
          reinterpret_cast<const unsigned*>(stage.at[i][tile][f][fragment_place(f, lane)]));
      mma<T>(sums[i], low[4 * f], high[4 * f], low[4 * f + 1], high[4 * f + 1], x.at[0], x.at[1]);
      mma<T>(sums[i], low[4 * f + 2], high[4 * f + 2], low[4 * f + 3], high[4 * f + 3], x.at[2],
             x.at[3]);
    }
  }
}

}  // namespace cuda
}  // namespace wanda_ext
