// order_meta_24 on the device: metadata from one order to another, padding added and stripped.
//
// A thread writes one 16-bit word. Neighbouring threads write neighbours; what they read lies in
// sectors that the neighbouring warps read too, out of the L1 cache.
//
// Memory: 1/8 byte read and written a weight, 1/16 of a pass over 16-bit weights.
#include <cstdint>

#include "core/check_packed.h"
#include "launch.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {
namespace cuda {
namespace {

constexpr unsigned kThreads = 256;

struct Place {
  unsigned row;
  unsigned word;
};

// The inverse of meta_index_24.
__device__ Place place_at(MetaOrder order, unsigned index, unsigned rows, unsigned cols) {
  if (order == MetaOrder::kSm80) {
    const unsigned strip = index / (2 * rows), rest = index % (2 * rows);
    return {rest / 64 * 32 + rest / 4 % 2 * 16 + rest % 2 * 8 + rest % 64 / 8,
            strip * 2 + rest / 2 % 2};
  }
  if (order == MetaOrder::kSm90) {
    const unsigned strip = index / (8 * rows), rest = index % (8 * rows);
    return {rest / 512 * 64 + rest % 512 / 128 * 16 + rest % 2 * 8 + rest / 8 % 8,
            strip * 8 + rest / 2 % 4 * 2 + rest / 64 % 2};
  }
  const unsigned words = cols / kColumnsPerMeta;
  return {index / words, index % words};
}

__global__ void __launch_bounds__(kThreads)
    reorder(const std::int16_t* __restrict__ src, MetaOrder src_order,
            std::int16_t* __restrict__ dst, MetaOrder dst_order, unsigned n, unsigned k,
            unsigned count) {
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= count) return;
  const Place place =
      place_at(dst_order, index, static_cast<unsigned>(padded_rows_24(dst_order, n)),
               static_cast<unsigned>(padded_cols_24(dst_order, k)));
  const bool inside = place.row < n && place.word < k / kColumnsPerMeta;
  dst[index] = inside
                   ? src[meta_index_24(src_order, place.row, place.word,
                                       padded_rows_24(src_order, n), padded_cols_24(src_order, k))]
                   : static_cast<std::int16_t>(kPaddingMeta);
}

}  // namespace

Status order_meta_24(const std::int16_t* src, MetaOrder src_order, std::int16_t* dst,
                     MetaOrder dst_order, std::int64_t n, std::int64_t k, cudaStream_t stream) {
  if (Status status = check_order_meta_24(src, src_order, dst, dst_order, n, k); !status.ok()) {
    return status;
  }
  const std::int64_t words = padded_cols_24(dst_order, k) / kColumnsPerMeta;
  const std::int64_t rows = padded_rows_24(dst_order, n);
  if (words == 0 || rows == 0) return {};
  if (n > INT32_MAX / 2 || k > INT32_MAX / 2 || rows > INT32_MAX / words) {
    return make_error(StatusCode::kInvalidArgument,
                      "order_meta_24: the weight is %lld x %lld, too large for one call; split its "
                      "rows",
                      static_cast<long long>(n), static_cast<long long>(k));
  }
  const std::int64_t count = rows * words;
  return launch("order_meta_24", reorder,
                dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads),
                stream, src, src_order, dst, dst_order, static_cast<unsigned>(n),
                static_cast<unsigned>(k), static_cast<unsigned>(count));
}

}  // namespace cuda
}  // namespace wanda_ext
