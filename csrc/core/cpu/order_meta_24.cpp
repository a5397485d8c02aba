// Metadata from one order to another, padding added and stripped on the way.
#include "core/check_packed.h"
#include "parallel_chunks.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace {

// Rows of one sm90 atom: ranges of whole atoms write no cache line in common.
constexpr std::int64_t kRowsPerAtom = 64;

}  // namespace

Status order_meta_24(const std::int16_t* src, MetaOrder src_order, std::int16_t* dst,
                     MetaOrder dst_order, std::int64_t n, std::int64_t k,
                     const ParallelFor& parallel) {
  if (Status status = check_order_meta_24(src, src_order, dst, dst_order, n, k); !status.ok()) {
    return status;
  }
  const std::int64_t src_rows = padded_rows_24(src_order, n);
  const std::int64_t src_cols = padded_cols_24(src_order, k);
  const std::int64_t rows = padded_rows_24(dst_order, n);
  const std::int64_t cols = padded_cols_24(dst_order, k);
  for_each_range(
      parallel, rows, kRowsPerAtom, [&](std::int64_t begin, std::int64_t end, std::int64_t) {
        for (std::int64_t r = begin; r < end; ++r) {
          const std::int64_t from = meta_row_24(src_order, r, src_cols);
          const std::int64_t to = meta_row_24(dst_order, r, cols);
          const std::int64_t words = r < n ? k / kColumnsPerMeta : 0;
          for (std::int64_t w = 0; w < words; ++w) {
            dst[to + meta_word_24(dst_order, w, rows)] =
                src[from + meta_word_24(src_order, w, src_rows)];
          }
          for (std::int64_t w = words; w < cols / kColumnsPerMeta; ++w) {
            dst[to + meta_word_24(dst_order, w, rows)] = static_cast<std::int16_t>(kPaddingMeta);
          }
        }
      });
  return {};
}

}  // namespace wanda_ext
