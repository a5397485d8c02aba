// y = x W^T (+ bias), W packed 2:4.
//
// The sum behind y[m,n]: the kept columns of a row, in order, are dealt to kLanes lanes, one 16-bit
// word of metadata giving each lane one product. Within a chunk of kColumnsPerChunk columns a lane
// adds its products to +0 in order; the lanes of a chunk add up as
//
//   ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
//
// and the chunks add up in order; the bias comes last, before the one rounding to y's type. Two
// kernels follow that tree. For a few tokens, a word of metadata gathers 8 elements of x to meet
// its 8 values, so that the weight is read once and nothing is expanded. For more, the tokens are
// the vector lanes: each value meets one column of x for kTokensPerPanel tokens at once.
//
// A pruned column of x is never multiplied: where the dense product would make a NaN of 0 * inf, y
// stays finite.
//
// workspace: where meta_word_24 puts each word of a row; x in fp32, all of it for a few tokens,
// else kTokensPerBlock tokens of it; a Tile for each thread.
#include <algorithm>
#include <cstring>

#include "core/check_args.h"
#include "core/check_packed.h"
#include "dtype.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr int kLanes = 8;  // values per word of metadata
constexpr std::int64_t kColumnsPerChunk = 256;
constexpr std::int64_t kWordsPerChunk = kColumnsPerChunk / kColumnsPerMeta;
constexpr std::int64_t kValuesPerChunk = kColumnsPerChunk / 2;

constexpr std::int64_t kFewTokens = 4;
constexpr int kTokensPerPanel = 16;
constexpr std::int64_t kTokensPerBlock = 256;
constexpr std::int64_t kRowsPerTile = 32;

// The widest vector that every clone but the baseline holds in a register.
#if defined(__x86_64__)
constexpr int kFloatsPerVector = 8;
#else
constexpr int kFloatsPerVector = 4;
#endif
typedef float Vector __attribute__((vector_size(kFloatsPerVector * sizeof(float))));

typedef std::int32_t Columns __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

constexpr int kVectorsPerLanes = kLanes / kFloatsPerVector;
constexpr int kVectorsPerPanel = kTokensPerPanel / kFloatsPerVector;

// One chunk of one row, in fp32.
struct Kept {
  float values[kValuesPerChunk];
  std::int32_t columns[kValuesPerChunk];  // in the chunk, times kTokensPerPanel
};

// One chunk of kRowsPerTile rows, and the sums of these rows for a block of tokens.
struct Tile {
  Kept kept[kRowsPerTile];
  float sums[kRowsPerTile][kTokensPerBlock];
};

// What the kernels need to know of a call.
struct Call {
  ConstMatrixView x;
  const void* values;
  const std::uint16_t* meta;
  const void* bias;
  MatrixView y;
  MetaOrder order;
  const std::int64_t* word_offsets;
  float* x_float;
  Tile* tiles;

  std::int64_t words() const { return x.cols / kColumnsPerMeta; }
};

// meta[meta_row + word_offsets[w]] is word w of a row.
WANDA_EXT_INLINE std::int64_t meta_row(const Call& call, std::int64_t row) {
  return meta_row_24(call.order, row, padded_cols_24(call.order, call.x.cols));
}

// The columns, of 16, that a word of metadata keeps.
WANDA_EXT_INLINE void columns_of(std::uint16_t word, Columns& columns) {
  const Columns shift = {0, 2, 4, 6, 8, 10, 12, 14};
  const Columns group = {0, 0, 4, 4, 8, 8, 12, 12};
  columns = (((Columns{} + word) >> shift) & 3) + group;
}

template <typename T>
WANDA_EXT_INLINE void write(const Call& call, std::int64_t token, std::int64_t row, float sum) {
  if (call.bias != nullptr) sum += to_float(static_cast<const T*>(call.bias)[row]);
  static_cast<T*>(call.y.data)[token * call.y.ld + row] = from_float<T>(sum);
}

// --- A few tokens: the values of a row are the vector lanes ---

// gathered[lane] = x[columns[lane]], of 16 elements of x.
WANDA_EXT_INLINE void gather(const float* x, const Columns& columns, Vector* gathered) {
#if defined(__x86_64__) && !defined(__clang__)
  Vector low, high;
  std::memcpy(&low, x, sizeof(low));
  std::memcpy(&high, x + kLanes, sizeof(high));
  *gathered = __builtin_shuffle(low, high, columns);
#else
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[columns[lane]];
  std::memcpy(gathered, lanes, sizeof(lanes));
#endif
}

WANDA_EXT_INLINE float sum_lanes(const Vector* vectors) {
  float lanes[kLanes];
  std::memcpy(lanes, vectors, sizeof(lanes));
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// The products of kRows rows and kTokens tokens, whole.
template <typename T, int kRows, int kTokens>
WANDA_EXT_INLINE void gather_block(const Call& call, std::int64_t row, std::int64_t token) {
  const T* values[kRows];
  std::int64_t meta_rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    values[r] = static_cast<const T*>(call.values) + (row + r) * (call.x.cols / 2);
    meta_rows[r] = meta_row(call, row + r);
  }
  const float* x = call.x_float + token * call.x.cols;
  float sums[kRows][kTokens] = {};
  for (std::int64_t first = 0; first < call.words(); first += kWordsPerChunk) {
    const std::int64_t rest = call.words() - first;
    const std::int64_t end = first + (rest < kWordsPerChunk ? rest : kWordsPerChunk);
    Vector lanes[kRows][kTokens][kVectorsPerLanes] = {};
    for (std::int64_t w = first; w < end; ++w) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Columns columns;
        columns_of(call.meta[meta_rows[r] + call.word_offsets[w]], columns);
        float value[kLanes];
        for (int i = 0; i < kLanes; ++i) value[i] = to_float(values[r][w * kLanes + i]);
        Vector factors[kVectorsPerLanes];
        std::memcpy(factors, value, sizeof(value));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          Vector gathered[kVectorsPerLanes];
          gather(x + t * call.x.cols + w * kColumnsPerMeta, columns, gathered);
          for (int v = 0; v < kVectorsPerLanes; ++v) lanes[r][t][v] += factors[v] * gathered[v];
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) sums[r][t] += sum_lanes(lanes[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) write<T>(call, token + t, row + r, sums[r][t]);
  }
}

// Four sums at once, of four rows or of four tokens, hide the latency of the additions.
template <typename T>
WANDA_EXT_INLINE void gather_range(const Call& call, std::int64_t begin, std::int64_t end) {
  const std::int64_t m = call.x.rows;
  for (std::int64_t row = begin; row < end; row += 4) {
    const std::int64_t last = row + 4 < end ? row + 4 : end;
    std::int64_t t = 0;
    for (; t + 4 <= m; t += 4) {
      for (std::int64_t r = row; r < last; ++r) gather_block<T, 1, 4>(call, r, t);
    }
    for (; t < m && last - row == 4; ++t) gather_block<T, 4, 1>(call, row, t);
    for (; t < m; ++t) {
      for (std::int64_t r = row; r < last; ++r) gather_block<T, 1, 1>(call, r, t);
    }
  }
}

template <typename T>
WANDA_EXT_INLINE void convert_token(const Call& call, std::int64_t token) {
  const T* x = static_cast<const T*>(call.x.data) + token * call.x.ld;
  float* out = call.x_float + token * call.x.cols;
  for (std::int64_t c = 0; c < call.x.cols; ++c) out[c] = to_float(x[c]);
}

// --- Many tokens: the tokens of a panel are the vector lanes ---

// x_float holds panels of kTokensPerPanel tokens, [panel][k][token]; what is no token is zero.
template <typename T>
WANDA_EXT_INLINE void pack_panel(const Call& call, std::int64_t token, std::int64_t tokens,
                                 std::int64_t panel) {
  const T* x = static_cast<const T*>(call.x.data) + token * call.x.ld;
  float* out = call.x_float + panel * call.x.cols * kTokensPerPanel;
  const std::int64_t count = tokens < kTokensPerPanel ? tokens : kTokensPerPanel;
  for (std::int64_t c = 0; c < call.x.cols; ++c) {
    for (std::int64_t t = 0; t < count; ++t) {
      out[c * kTokensPerPanel + t] = to_float(x[t * call.x.ld + c]);
    }
    for (std::int64_t t = count; t < kTokensPerPanel; ++t) out[c * kTokensPerPanel + t] = 0;
  }
}

// Words [first, first + words) of a row, no more than a chunk.
template <typename T>
WANDA_EXT_INLINE void expand(const Call& call, std::int64_t row, std::int64_t first,
                             std::int64_t words, Kept& kept) {
  const T* values = static_cast<const T*>(call.values) + row * (call.x.cols / 2) + first * kLanes;
  const std::uint16_t* meta = call.meta + meta_row(call, row);
  for (std::int64_t i = 0; i < words * kLanes; ++i) kept.values[i] = to_float(values[i]);
  for (std::int64_t w = 0; w < words; ++w) {
    const auto first_column = static_cast<std::int32_t>(w * kColumnsPerMeta);
    Columns columns;
    columns_of(meta[call.word_offsets[first + w]], columns);
    columns = (columns + first_column) * kTokensPerPanel;
    std::memcpy(kept.columns + w * kLanes, &columns, sizeof(columns));
  }
}

// Adds the products of one row and one panel over one chunk to sums[kTokensPerPanel]. Half of the
// lanes at a time: their sums then stay in 16 registers.
WANDA_EXT_INLINE void multiply_panel(const Kept& kept, std::int64_t words, const float* panel,
                                     float* sums) {
  constexpr int kHalf = kLanes / 2;
  Vector lanes[2][kHalf][kVectorsPerPanel] = {};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vector sum[kHalf][kVectorsPerPanel] = {};
    for (std::int64_t w = 0; w < words; ++w) {
      const std::int64_t first = w * kLanes + half * kHalf;
#pragma GCC unroll 4
      for (int i = 0; i < kHalf; ++i) {
        const float* x = panel + kept.columns[first + i];
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsPerPanel; ++v) {
          Vector tokens;
          std::memcpy(&tokens, x + v * kFloatsPerVector, sizeof(tokens));
          sum[i][v] += kept.values[first + i] * tokens;
        }
      }
    }
    for (int i = 0; i < kHalf; ++i) {
      for (int v = 0; v < kVectorsPerPanel; ++v) lanes[half][i][v] = sum[i][v];
    }
  }
  for (int v = 0; v < kVectorsPerPanel; ++v) {
    Vector total;
    std::memcpy(&total, sums + v * kFloatsPerVector, sizeof(total));
    total += ((lanes[0][0][v] + lanes[1][0][v]) + (lanes[0][2][v] + lanes[1][2][v])) +
             ((lanes[0][1][v] + lanes[1][1][v]) + (lanes[0][3][v] + lanes[1][3][v]));
    std::memcpy(sums + v * kFloatsPerVector, &total, sizeof(total));
  }
}

// Rows [begin, end), no more than a tile, for `tokens` tokens from `token` on.
template <typename T>
WANDA_EXT_INLINE void multiply_tile(const Call& call, std::int64_t begin, std::int64_t end,
                                    std::int64_t token, std::int64_t tokens, Tile& tile) {
  const std::int64_t panels = (tokens + kTokensPerPanel - 1) / kTokensPerPanel;
  std::memset(tile.sums, 0, sizeof(tile.sums));
  for (std::int64_t first = 0; first < call.words(); first += kWordsPerChunk) {
    const std::int64_t rest = call.words() - first;
    const std::int64_t words = rest < kWordsPerChunk ? rest : kWordsPerChunk;
    for (std::int64_t row = begin; row < end; ++row) {
      expand<T>(call, row, first, words, tile.kept[row - begin]);
    }
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const float* x =
          call.x_float + (panel * call.x.cols + first * kColumnsPerMeta) * kTokensPerPanel;
      for (std::int64_t row = begin; row < end; ++row) {
        multiply_panel(tile.kept[row - begin], words, x,
                       tile.sums[row - begin] + panel * kTokensPerPanel);
      }
    }
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t row = begin; row < end; ++row) {
      write<T>(call, token + t, row, tile.sums[row - begin][t]);
    }
  }
}

template <typename T>
WANDA_EXT_INLINE void multiply_range(const Call& call, std::int64_t begin, std::int64_t end,
                                     std::int64_t token, std::int64_t tokens, Tile& tile) {
  for (std::int64_t row = begin; row < end; row += kRowsPerTile) {
    const std::int64_t rest = end - row;
    multiply_tile<T>(call, row, row + (rest < kRowsPerTile ? rest : kRowsPerTile), token, tokens,
                     tile);
  }
}

// --- One entry of each kind for all dtypes, compiled for every ISA ---

#define WANDA_EXT_FOR_DTYPE(function, ...)    \
  switch (call.x.dtype) {                     \
    case DType::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case DType::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
    default:                                  \
      return function<Float16>(__VA_ARGS__);  \
  }

WANDA_EXT_CLONES void convert_token_any(const Call& call, std::int64_t token) {
  WANDA_EXT_FOR_DTYPE(convert_token, call, token);
}

WANDA_EXT_CLONES void gather_range_any(const Call& call, std::int64_t begin, std::int64_t end) {
  WANDA_EXT_FOR_DTYPE(gather_range, call, begin, end);
}

WANDA_EXT_CLONES void pack_panel_any(const Call& call, std::int64_t token, std::int64_t tokens,
                                     std::int64_t panel) {
  WANDA_EXT_FOR_DTYPE(pack_panel, call, token, tokens, panel);
}

WANDA_EXT_CLONES void multiply_range_any(const Call& call, std::int64_t begin, std::int64_t end,
                                         std::int64_t token, std::int64_t tokens, Tile& tile) {
  WANDA_EXT_FOR_DTYPE(multiply_range, call, begin, end, token, tokens, tile);
}

// --- The workspace ---

struct Layout {
  std::size_t x_float;
  std::size_t tiles;
  std::size_t bytes;
};

constexpr std::size_t align_64(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

Layout layout_of(std::int64_t m, std::int64_t k, int threads) {
  const bool few = m <= kFewTokens;
  const std::int64_t panels =
      (std::min(m, kTokensPerBlock) + kTokensPerPanel - 1) / kTokensPerPanel;
  const std::int64_t tokens = few ? m : panels * kTokensPerPanel;
  Layout layout;
  layout.x_float = align_64(static_cast<std::size_t>(k / kColumnsPerMeta) * sizeof(std::int64_t));
  layout.tiles = layout.x_float + align_64(static_cast<std::size_t>(tokens * k) * sizeof(float));
  layout.bytes = layout.tiles + (few ? 0 : static_cast<std::size_t>(threads) * sizeof(Tile));
  return layout;
}

Status check_linear(const Call& call, const void* workspace) {
  const MatrixView& y = call.y;
  if (Status status = check_matrix("linear_24", "x", call.x); !status.ok()) return status;
  if (Status status = check_matrix("linear_24", "y", y); !status.ok()) return status;
  if (Status status = check_order("linear_24", call.order); !status.ok()) return status;
  if (Status status = check_packed("linear_24", call.values, call.meta, y.cols, call.x.cols);
      !status.ok()) {
    return status;
  }
  if (y.rows != call.x.rows || y.dtype != call.x.dtype) {
    return make_error(StatusCode::kInvalidArgument,
                      "linear_24: y must have the rows and dtype of x, %lld of %s, got %lld of %s",
                      static_cast<long long>(call.x.rows), name_of(call.x.dtype),
                      static_cast<long long>(y.rows), name_of(y.dtype));
  }
  if (reinterpret_cast<std::uintptr_t>(workspace) % 64 != 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "linear_24: workspace must be aligned to 64 bytes, got %p", workspace);
  }
  return {};
}

}  // namespace

std::size_t linear_24_workspace(std::int64_t m, std::int64_t /*n*/, std::int64_t k, int threads) {
  return layout_of(m, k, std::max(threads, 1)).bytes;
}

Status linear_24(ConstMatrixView x, const void* values, const std::int16_t* meta, MetaOrder order,
                 const void* bias, MatrixView y, void* workspace, const ParallelFor& parallel) {
  const std::int64_t m = x.rows;
  const std::int64_t n = y.cols;
  if (x.cols == 0) x.ld = 0;  // x.data may be null then
  Call call = {x,       values,  reinterpret_cast<const std::uint16_t*>(meta),
               bias,    y,       order,
               nullptr, nullptr, nullptr};
  if (Status status = check_linear(call, workspace); !status.ok()) return status;
  if (m == 0 || n == 0) return {};

  const Layout layout = layout_of(m, x.cols, std::max(parallel.threads, 1));
  auto* bytes = static_cast<char*>(workspace);
  auto* word_offsets = reinterpret_cast<std::int64_t*>(bytes);
  for (std::int64_t w = 0; w < call.words(); ++w) {
    word_offsets[w] = meta_word_24(order, w, padded_rows_24(order, n));
  }
  call.word_offsets = word_offsets;
  call.x_float = reinterpret_cast<float*>(bytes + layout.x_float);
  call.tiles = reinterpret_cast<Tile*>(bytes + layout.tiles);

  if (m <= kFewTokens) {
    for (std::int64_t token = 0; token < m; ++token) convert_token_any(call, token);
    for_each_range(parallel, n, 4, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
      gather_range_any(call, begin, end);
    });
    return {};
  }
  for (std::int64_t token = 0; token < m; token += kTokensPerBlock) {
    const std::int64_t tokens = std::min(m - token, kTokensPerBlock);
    for_each_chunk(parallel, (tokens + kTokensPerPanel - 1) / kTokensPerPanel,
                   [&](std::int64_t panel) {
                     const std::int64_t first = panel * kTokensPerPanel;
                     pack_panel_any(call, token + first, tokens - first, panel);
                   });
    for_each_range(parallel, n, kRowsPerTile,
                   [&](std::int64_t begin, std::int64_t end, std::int64_t range) {
                     multiply_range_any(call, begin, end, token, tokens, call.tiles[range]);
                   });
  }
  return {};
}

}  // namespace wanda_ext
