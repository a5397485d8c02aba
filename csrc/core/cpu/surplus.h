// A surplus in the host's memory: that none of it points outside the matrix can be seen at once.
#pragma once

#include <atomic>

#include "core/check_bitmap.h"
#include "parallel_chunks.h"
#include "wanda_ext/ops.h"

namespace wanda_ext {

// For a matrix of n rows and k columns.
inline Status check_surplus_entries(const char* op, const Surplus& surplus, std::int64_t n,
                                    std::int64_t k, const ParallelFor& parallel) {
  if (Status status = check_surplus(op, surplus, k); !status.ok()) return status;
  if (surplus.rows == nullptr || n == 0) return {};
  std::int64_t offset = 0;
  for (std::int64_t r = 0; r <= n; ++r) {
    if (surplus.rows[r] < offset || surplus.rows[r] > surplus.count) {
      return make_error(StatusCode::kInvalidArgument,
                        "%s: the rows of a surplus must ascend from 0 to its count, %lld; got %d "
                        "after %lld at row %lld",
                        op, static_cast<long long>(surplus.count), surplus.rows[r],
                        static_cast<long long>(offset), static_cast<long long>(r));
    }
    offset = surplus.rows[r];
  }
  const std::uint16_t* columns = surplus.columns + surplus.rows[0];
  std::atomic<bool> inside = true;
  for_each_range(parallel, offset - surplus.rows[0], 4096,
                 [&](std::int64_t begin, std::int64_t end, std::int64_t) {
                   bool all = true;
                   for (std::int64_t i = begin; i < end; ++i) all &= columns[i] < k;
                   if (!all) inside = false;
                 });
  if (inside) return {};
  return make_error(StatusCode::kInvalidArgument,
                    "%s: the columns of a surplus must be in [0, %lld), those of the weight", op,
                    static_cast<long long>(k));
}

}  // namespace wanda_ext
