// The weight back from values and metadata: each column of a group of four takes the value that its
// nibble gives it, or zero, one group a vector lane.
#include "core/check_args.h"
#include "core/check_packed.h"
#include "parallel_chunks.h"
#include "simd.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

constexpr std::int64_t kWordsPerBlock = 64;

template <typename Bits>
WANDA_EXT_INLINE Bits mask_of_equal(Bits a, Bits b) {
  return static_cast<Bits>(0 - static_cast<Bits>(a == b));
}

template <typename Bits>
WANDA_EXT_INLINE void unpack_block(const Bits* values, const Bits* nibbles, std::int64_t groups,
                                   Bits* weight) {
  for (std::int64_t g = 0; g < groups; ++g) {
    const Bits low = nibbles[g] & 3;
    const Bits high = nibbles[g] >> 2;
    for (int i = 0; i < 4; ++i) {
      const Bits column = static_cast<Bits>(i);
      weight[4 * g + i] = (mask_of_equal(low, column) & values[2 * g]) |
                          (mask_of_equal(high, column) & values[2 * g + 1]);
    }
  }
}

template <typename Bits>
WANDA_EXT_INLINE void unpack_range(const Bits* values, const std::uint16_t* meta, MetaOrder order,
                                   const MatrixView& weight, std::int64_t begin, std::int64_t end) {
  const std::int64_t rows = padded_rows_24(order, weight.rows);
  const std::int64_t cols = padded_cols_24(order, weight.cols);
  const std::int64_t words = weight.cols / kColumnsPerMeta;
  Bits nibbles[kWordsPerBlock * 4];
  for (std::int64_t r = begin; r < end; ++r) {
    const std::uint16_t* row_meta = meta + meta_row_24(order, r, cols);
    const Bits* row_values = values + r * words * 8;
    Bits* row = static_cast<Bits*>(weight.data) + r * weight.ld;
    for (std::int64_t first = 0; first < words; first += kWordsPerBlock) {
      const std::int64_t rest = words - first;
      const std::int64_t count = rest < kWordsPerBlock ? rest : kWordsPerBlock;
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint16_t word = row_meta[meta_word_24(order, first + i, rows)];
        for (int g = 0; g < 4; ++g) nibbles[4 * i + g] = (word >> (4 * g)) & 15;
      }
      unpack_block(row_values + first * 8, nibbles, count * 4, row + first * 16);
    }
  }
}

WANDA_EXT_CLONES void unpack_range_any(const void* values, const std::uint16_t* meta,
                                       MetaOrder order, const MatrixView& weight,
                                       std::int64_t begin, std::int64_t end) {
  if (weight.dtype == DType::kFloat32) {
    unpack_range(static_cast<const std::uint32_t*>(values), meta, order, weight, begin, end);
  } else {
    unpack_range(static_cast<const std::uint16_t*>(values), meta, order, weight, begin, end);
  }
}

}  // namespace

Status unpack_24(const void* values, const std::int16_t* meta, MetaOrder order, MatrixView weight,
                 const ParallelFor& parallel) {
  if (Status status = check_matrix("unpack_24", "weight", weight); !status.ok()) return status;
  if (Status status = check_order("unpack_24", order); !status.ok()) return status;
  if (Status status = check_packed("unpack_24", values, meta, weight.rows, weight.cols);
      !status.ok()) {
    return status;
  }
  const std::int64_t rows = weight.cols == 0 ? 0 : weight.rows;
  for_each_range(parallel, rows, 1, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
    unpack_range_any(values, reinterpret_cast<const std::uint16_t*>(meta), order, weight, begin,
                     end);
  });
  return {};
}

}  // namespace wanda_ext
