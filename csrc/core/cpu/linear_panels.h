// y = x W^T for many tokens, for any W of which a chunk of a row holds half of its columns: what
// linear_24 and linear_bitmap share.
//
// The tokens are the vector lanes: x lies as panels of kTokensPerPanel tokens, so that a value of W
// meets one column of x for all of them at once. A tile is kRowsPerTile rows of W; each chunk of it
// is spread out once (by `expand` of the op's Call) and meets all panels of a block of tokens.
//
// The sum behind y[m,n]: the kept values of a row are dealt to kLanes lanes. Within a chunk of
// kColumnsPerChunk columns a lane adds its products to +0 in order; the lanes of a chunk add up as
//
//   ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
//
// and the chunks add up in order; then comes the surplus, summed in order from +0, and last the
// bias, before the one rounding to y's type.
#pragma once

#include <algorithm>
#include <cstring>

#include "dtype.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

constexpr int kLanes = 8;
constexpr std::int64_t kColumnsPerChunk = 256;
constexpr std::int64_t kValuesPerChunk = kColumnsPerChunk / 2;

constexpr std::int64_t kFewTokens = 4;  // up to this many, an op has a kernel of its own
constexpr int kTokensPerPanel = 16;
constexpr std::int64_t kTokensPerBlock = 256;
constexpr std::int64_t kRowsPerTile = 32;

// The widest vector that every clone but the baseline holds in a register.
#if defined(__x86_64__)
constexpr int kFloatsPerVector = 8;
#else
constexpr int kFloatsPerVector = 4;
#endif
typedef float FloatVector __attribute__((vector_size(kFloatsPerVector * sizeof(float))));

constexpr int kVectorsPerLanes = kLanes / kFloatsPerVector;
constexpr int kVectorsPerPanel = kTokensPerPanel / kFloatsPerVector;

// One chunk of one row, in fp32.
struct Kept {
  float values[kValuesPerChunk];
  std::int32_t columns[kValuesPerChunk + kLanes];  // in the chunk, times kTokensPerPanel
};

// One chunk of kRowsPerTile rows, and the sums of these rows for a block of tokens.
struct Tile {
  Kept kept[kRowsPerTile];
  float sums[kRowsPerTile][kTokensPerBlock];
};

// What a product needs to know of a call, however W is packed. An op's Call derives from it.
struct Product {
  ConstMatrixView x;
  Surplus surplus;
  const void* bias;
  MatrixView y;
  std::int64_t columns;  // of W as it is packed: k, or more, where those beyond k are zeros
  float* x_float;
  Tile* tiles;
};

template <typename T>
WANDA_EXT_INLINE void write(const Product& call, std::int64_t token, std::int64_t row, float sum) {
  if (call.bias != nullptr) sum += to_float(static_cast<const T*>(call.bias)[row]);
  static_cast<T*>(call.y.data)[token * call.y.ld + row] = from_float<T>(sum);
}

WANDA_EXT_INLINE float sum_lanes(const FloatVector* vectors) {
  float lanes[kLanes];
  std::memcpy(lanes, vectors, sizeof(lanes));
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Adds the products of one row and one panel over `count` values of one chunk to
// sums[kTokensPerPanel]. Half of the lanes at a time: their sums then stay in 16 registers.
WANDA_EXT_INLINE void multiply_panel(const Kept& kept, std::int64_t count, const float* panel,
                                     float* sums) {
  constexpr int kHalf = kLanes / 2;
  FloatVector lanes[2][kHalf][kVectorsPerPanel] = {};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    FloatVector sum[kHalf][kVectorsPerPanel] = {};
    for (std::int64_t first = half * kHalf; first < count; first += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kHalf; ++i) {
        const float* x = panel + kept.columns[first + i];
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsPerPanel; ++v) {
          FloatVector tokens;
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
    FloatVector total;
    std::memcpy(&total, sums + v * kFloatsPerVector, sizeof(total));
    total += ((lanes[0][0][v] + lanes[1][0][v]) + (lanes[0][2][v] + lanes[1][2][v])) +
             ((lanes[0][1][v] + lanes[1][1][v]) + (lanes[0][3][v] + lanes[1][3][v]));
    std::memcpy(sums + v * kFloatsPerVector, &total, sizeof(total));
  }
}

// Adds the products of one row's surplus and `panels` panels to sums[panels * kTokensPerPanel].
template <typename T>
WANDA_EXT_INLINE void add_surplus_panels(const Product& call, std::int64_t row, std::int64_t panels,
                                         float* sums) {
  const T* values = static_cast<const T*>(call.surplus.values);
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const float* x = call.x_float + panel * call.columns * kTokensPerPanel;
    float sum[kTokensPerPanel] = {};
    for (std::int64_t i = call.surplus.rows[row]; i < call.surplus.rows[row + 1]; ++i) {
      const float value = to_float(values[i]);
      const float* tokens = x + std::int64_t{call.surplus.columns[i]} * kTokensPerPanel;
      for (int t = 0; t < kTokensPerPanel; ++t) sum[t] += value * tokens[t];
    }
    for (int t = 0; t < kTokensPerPanel; ++t) sums[panel * kTokensPerPanel + t] += sum[t];
  }
}

// Rows [begin, end), no more than a tile, for `tokens` tokens from `token` on.
// call.expand<T>(row, first, columns, kept) gives a chunk of a row, the columns from `first` on.
template <typename T, typename Call>
WANDA_EXT_INLINE void multiply_tile(const Call& call, std::int64_t begin, std::int64_t end,
                                    std::int64_t token, std::int64_t tokens, Tile& tile) {
  const std::int64_t panels = (tokens + kTokensPerPanel - 1) / kTokensPerPanel;
  std::memset(tile.sums, 0, sizeof(tile.sums));
  for (std::int64_t first = 0; first < call.columns; first += kColumnsPerChunk) {
    const std::int64_t rest = call.columns - first;
    const std::int64_t columns = rest < kColumnsPerChunk ? rest : kColumnsPerChunk;
    for (std::int64_t row = begin; row < end; ++row) {
      call.template expand<T>(row, first, columns, tile.kept[row - begin]);
    }
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const float* x = call.x_float + (panel * call.columns + first) * kTokensPerPanel;
      for (std::int64_t row = begin; row < end; ++row) {
        multiply_panel(tile.kept[row - begin], columns / 2, x,
                       tile.sums[row - begin] + panel * kTokensPerPanel);
      }
    }
  }
  for (std::int64_t row = begin; row < end && call.surplus.rows != nullptr; ++row) {
    add_surplus_panels<T>(call, row, panels, tile.sums[row - begin]);
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t row = begin; row < end; ++row) {
      write<T>(call, token + t, row, tile.sums[row - begin][t]);
    }
  }
}

template <typename T, typename Call>
WANDA_EXT_INLINE void multiply_range(const Call& call, std::int64_t begin, std::int64_t end,
                                     std::int64_t token, std::int64_t tokens, Tile& tile) {
  for (std::int64_t row = begin; row < end; row += kRowsPerTile) {
    const std::int64_t rest = end - row;
    multiply_tile<T>(call, row, row + (rest < kRowsPerTile ? rest : kRowsPerTile), token, tokens,
                     tile);
  }
}

// The dtypes of one entry, which is compiled for every ISA.
#define WANDA_EXT_FOR_DTYPE(function, ...)    \
  switch (call.x.dtype) {                     \
    case DType::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case DType::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
    default:                                  \
      return function<Float16>(__VA_ARGS__);  \
  }

// --- The workspace: what the op itself wants, x in fp32, a Tile for each thread ---

struct ProductLayout {
  std::size_t x_float;
  std::size_t tiles;
  std::size_t bytes;
};

constexpr std::size_t align_64(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

inline ProductLayout product_layout(std::size_t own_bytes, std::int64_t m, std::int64_t columns,
                                    int threads) {
  const bool few = m <= kFewTokens;
  const std::int64_t panels =
      (std::min(m, kTokensPerBlock) + kTokensPerPanel - 1) / kTokensPerPanel;
  const std::int64_t tokens = few ? m : panels * kTokensPerPanel;
  ProductLayout layout;
  layout.x_float = align_64(own_bytes);
  layout.tiles =
      layout.x_float + align_64(static_cast<std::size_t>(tokens * columns) * sizeof(float));
  layout.bytes =
      layout.tiles + (few ? 0 : static_cast<std::size_t>(std::max(threads, 1)) * sizeof(Tile));
  return layout;
}

inline Status check_workspace(const char* op, const void* workspace) {
  if (reinterpret_cast<std::uintptr_t>(workspace) % 64 != 0) {
    return make_error(StatusCode::kInvalidArgument,
                      "%s: workspace must be aligned to 64 bytes, got %p", op, workspace);
  }
  return {};
}

// --- The product ---

// x_float of a few tokens, and of more: [token][columns], and panels of kTokensPerPanel tokens,
// [panel][columns][token]. What is no token or lies beyond k is zero.
void convert_token_any(const Product& call, std::int64_t token);
void pack_panel_any(const Product& call, std::int64_t token, std::int64_t tokens,
                    std::int64_t panel);

// The op's own entries: a few tokens and rows [begin, end), and its multiply_range.
template <typename Call>
using MultiplyFew = void(const Call& call, std::int64_t begin, std::int64_t end);
template <typename Call>
using MultiplyRange = void(const Call& call, std::int64_t begin, std::int64_t end,
                           std::int64_t token, std::int64_t tokens, Tile& tile);

// A few tokens cut the rows at multiples of `grain`.
template <typename Call>
void multiply(const Call& call, const ParallelFor& parallel, std::int64_t grain,
              MultiplyFew<Call>* multiply_few_any, MultiplyRange<Call>* multiply_range_any) {
  const std::int64_t m = call.x.rows;
  if (m <= kFewTokens) {
    for (std::int64_t token = 0; token < m; ++token) convert_token_any(call, token);
    for_each_range(parallel, call.y.cols, grain,
                   [&](std::int64_t begin, std::int64_t end, std::int64_t) {
                     multiply_few_any(call, begin, end);
                   });
    return;
  }
  for (std::int64_t token = 0; token < m; token += kTokensPerBlock) {
    const std::int64_t tokens = std::min(m - token, kTokensPerBlock);
    for_each_chunk(parallel, (tokens + kTokensPerPanel - 1) / kTokensPerPanel,
                   [&](std::int64_t panel) {
                     const std::int64_t first = panel * kTokensPerPanel;
                     pack_panel_any(call, token + first, tokens - first, panel);
                   });
    for_each_range(parallel, call.y.cols, kRowsPerTile,
                   [&](std::int64_t begin, std::int64_t end, std::int64_t range) {
                     multiply_range_any(call, begin, end, token, tokens, call.tiles[range]);
                   });
  }
}

}  // namespace wanda_ext
