// y = x W^T (+ bias), W packed 2:4.
//
// The kept columns of a row, in order, are dealt to kLanes lanes, one 16-bit word of metadata
// giving each lane one product; linear_panels.h has the sum they make. Two kernels follow it. For a
// few tokens, a word of metadata gathers 8 elements of x to meet its 8 values, so that the weight
// is read once and nothing is expanded. For more, the tokens are the vector lanes.
//
// A pruned column of x is never multiplied: where the dense product would make a NaN of 0 * inf, y
// stays finite.
//
// workspace: where meta_word_24 puts each word of a row; x in fp32, all of it for a few tokens,
// else kTokensPerBlock tokens of it; a Tile for each thread.
#include <cstring>

#include "core/check_args.h"
#include "core/check_packed.h"
#include "dtype.h"
#include "linear_panels.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr std::int64_t kWordsPerChunk = kColumnsPerChunk / kColumnsPerMeta;

typedef std::int32_t Columns __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

// The columns, of 16, that a word of metadata keeps.
WANDA_EXT_INLINE void columns_of(std::uint16_t word, Columns& columns) {
  const Columns shift = {0, 2, 4, 6, 8, 10, 12, 14};
  const Columns group = {0, 0, 4, 4, 8, 8, 12, 12};
  columns = (((Columns{} + word) >> shift) & 3) + group;
}

struct Call : Product {
  const void* values;
  const std::uint16_t* meta;
  MetaOrder order;
  const std::int64_t* word_offsets;

  std::int64_t words() const { return x.cols / kColumnsPerMeta; }

  // meta[meta_row(row) + word_offsets[w]] is word w of a row.
  WANDA_EXT_INLINE std::int64_t meta_row(std::int64_t row) const {
    return meta_row_24(order, row, padded_cols_24(order, x.cols));
  }

  // Columns [first, first + count) of a row, no more than a chunk.
  template <typename T>
  WANDA_EXT_INLINE void expand(std::int64_t row, std::int64_t first, std::int64_t count,
                               Kept& kept) const {
    const T* kept_values = static_cast<const T*>(values) + (row * x.cols + first) / 2;
    const std::uint16_t* row_meta = meta + meta_row(row);
    const std::int64_t* offsets = word_offsets + first / kColumnsPerMeta;
    for (std::int64_t i = 0; i < count / 2; ++i) kept.values[i] = to_float(kept_values[i]);
    for (std::int64_t w = 0; w < count / kColumnsPerMeta; ++w) {
      const auto first_column = static_cast<std::int32_t>(w * kColumnsPerMeta);
      Columns at;
      columns_of(row_meta[offsets[w]], at);
      at = (at + first_column) * kTokensPerPanel;
      std::memcpy(kept.columns + w * kLanes, &at, sizeof(at));
    }
  }
};

// --- A few tokens: the values of a row are the vector lanes ---

// gathered[lane] = x[columns[lane]], of 16 elements of x.
WANDA_EXT_INLINE void gather(const float* x, const Columns& columns, FloatVector* gathered) {
#if defined(__x86_64__) && !defined(__clang__)
  FloatVector low, high;
  std::memcpy(&low, x, sizeof(low));
  std::memcpy(&high, x + kLanes, sizeof(high));
  *gathered = __builtin_shuffle(low, high, columns);
#else
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[columns[lane]];
  std::memcpy(gathered, lanes, sizeof(lanes));
#endif
}

// The products of kRows rows and kTokens tokens, whole.
template <typename T, int kRows, int kTokens>
WANDA_EXT_INLINE void gather_block(const Call& call, std::int64_t row, std::int64_t token) {
  const T* values[kRows];
  std::int64_t meta_rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    values[r] = static_cast<const T*>(call.values) + (row + r) * (call.x.cols / 2);
    meta_rows[r] = call.meta_row(row + r);
  }
  const float* x = call.x_float + token * call.x.cols;
  float sums[kRows][kTokens] = {};
  for (std::int64_t first = 0; first < call.words(); first += kWordsPerChunk) {
    const std::int64_t rest = call.words() - first;
    const std::int64_t end = first + (rest < kWordsPerChunk ? rest : kWordsPerChunk);
    FloatVector lanes[kRows][kTokens][kVectorsPerLanes] = {};
    for (std::int64_t w = first; w < end; ++w) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Columns columns;
        columns_of(call.meta[meta_rows[r] + call.word_offsets[w]], columns);
        float value[kLanes];
        for (int i = 0; i < kLanes; ++i) value[i] = to_float(values[r][w * kLanes + i]);
        FloatVector factors[kVectorsPerLanes];
        std::memcpy(factors, value, sizeof(value));
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          FloatVector gathered[kVectorsPerLanes];
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

// --- One entry of each kind for all dtypes, compiled for every ISA ---

WANDA_EXT_CLONES void gather_range_any(const Call& call, std::int64_t begin, std::int64_t end) {
  WANDA_EXT_FOR_DTYPE(gather_range, call, begin, end);
}

WANDA_EXT_CLONES void multiply_range_any(const Call& call, std::int64_t begin, std::int64_t end,
                                         std::int64_t token, std::int64_t tokens, Tile& tile) {
  WANDA_EXT_FOR_DTYPE(multiply_range, call, begin, end, token, tokens, tile);
}

ProductLayout layout_of(std::int64_t m, std::int64_t k, int threads) {
  const auto words = static_cast<std::size_t>(k / kColumnsPerMeta);
  return product_layout(words * sizeof(std::int64_t), m, k, threads);
}

Status check_linear(const Call& call, const void* workspace) {
  const char* op = "linear_24";
  if (Status status = check_matrix(op, "x", call.x); !status.ok()) return status;
  if (Status status = check_matrix(op, "y", call.y); !status.ok()) return status;
  if (Status status = check_order(op, call.order); !status.ok()) return status;
  if (Status status = check_packed(op, call.values, call.meta, call.y.cols, call.x.cols);
      !status.ok()) {
    return status;
  }
  if (Status status = check_same_rows(op, call.x, call.y); !status.ok()) return status;
  return check_workspace(op, workspace);
}

}  // namespace

std::size_t linear_24_workspace(std::int64_t m, std::int64_t /*n*/, std::int64_t k, int threads) {
  return layout_of(m, k, threads).bytes;
}

Status linear_24(ConstMatrixView x, const void* values, const std::int16_t* meta, MetaOrder order,
                 const void* bias, MatrixView y, void* workspace, const ParallelFor& parallel) {
  const std::int64_t m = x.rows;
  const std::int64_t n = y.cols;
  if (x.cols == 0) x.ld = 0;  // x.data may be null then
  Call call = {{x, {}, bias, y, x.cols, nullptr, nullptr},
               values,
               reinterpret_cast<const std::uint16_t*>(meta),
               order,
               nullptr};
  if (Status status = check_linear(call, workspace); !status.ok()) return status;
  if (m == 0 || n == 0) return {};

  const ProductLayout layout = layout_of(m, x.cols, parallel.threads);
  auto* bytes = static_cast<char*>(workspace);
  auto* word_offsets = reinterpret_cast<std::int64_t*>(bytes);
  for (std::int64_t w = 0; w < call.words(); ++w) {
    word_offsets[w] = meta_word_24(order, w, padded_rows_24(order, n));
  }
  call.word_offsets = word_offsets;
  call.x_float = reinterpret_cast<float*>(bytes + layout.x_float);
  call.tiles = reinterpret_cast<Tile*>(bytes + layout.tiles);

  multiply(call, parallel, 4, gather_range_any, multiply_range_any);
  return {};
}

}  // namespace wanda_ext
